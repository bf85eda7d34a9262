"""Arguments as PyTorch, PEFT and transformers call them, and what they are here."""

from __future__ import annotations

__all__ = ["BY_PLACE", "LEFT_OUT", "MISSING", "RENAMED"]

# name there: names here, of which the first that the call has is meant. The value goes over as it is.
RENAMED = {
    "dim": ("axis", "axes"), "dims": ("axes", "axis"), "keepdim": ("keepdims",), "tensors": ("xs",),
    "input": ("x", "x1", "ids", "logits", "prediction"), "other": ("x2",), "self": ("x",), "target": ("labels", "target"),
    "min": ("low",), "max": ("high",), "weight": ("W", "w"), "bias": ("b", "bias"), "num_groups": ("groups", "num_groups"),
    "size": ("shape",), "split_size_or_sections": ("indices_or_sections",), "sections": ("indices_or_sections",),
    "chunks": ("indices_or_sections",), "query": ("q",), "key": ("k",), "value": ("v", "value"), "is_causal": ("causal",),
    "attn_mask": ("mask",), "attention_mask": ("key_padding",), "grad": ("gradient",), "data": ("value", "data"),
    "input_ids": ("ids",), "use_bias": ("bias",), "requires_grad": ("mode", "trainable"),
    "input_dim": ("in_features", "num_embeddings"), "output_dim": ("out_features", "embedding_dim"),
    # optimizers and schedules
    "parameters": ("params",), "learning_rate": ("lr", "learning_rate"), "lr": ("learning_rate", "lr"), "T_max": ("total",),
    "num_training_steps": ("total",), "total_iters": ("total",), "num_warmup_steps": ("warmup",), "step_size": ("every",),
    "gamma": ("factor",), "lr_lambda": ("schedule",), "init_scale": ("start",), "growth_interval": ("growth_steps",),
    # adapters
    "adapter_name": ("name", "names"), "adapter": ("name",), "peft_config": ("config",), "lora_config": ("config",),
    "is_trainable": ("trainable",), "base_model": ("model",), "model_id": ("source", "path", "folder"),
    "save_directory": ("path", "folder"), "pretrained_model_name_or_path": ("folder", "source"), "batch_size": ("batch",),
    "loraplus_lr_ratio": ("ratio",), "peft_model_state_dict": ("state",), "filename": ("path",), "f": ("path",),
    # models and text
    "torch_dtype": ("dtype",), "pad_token_id": ("pad_id",), "eos_token_id": ("stop_ids",),
    "streamer": ("stream",), "generator": ("seed", "rng"), "seed": ("rng",), "hidden_size": ("n_embd", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers"), "num_attention_heads": ("n_head", "n_heads"),
    "max_position_embeddings": ("n_positions",), "n_layer": ("num_hidden_layers",), "n_head": ("num_attention_heads",),
    "n_embd": ("hidden_size",), "n_positions": ("max_position_embeddings",), "intermediate_size": ("n_inner",),
    # training
    "num_train_epochs": ("epochs",), "per_device_train_batch_size": ("batch_size",), "train_batch_size": ("batch_size",),
    "gradient_accumulation_steps": ("accumulation",), "max_steps": ("steps",), "lr_scheduler_type": ("schedule",),
    "warmup_steps": ("warmup",), "warmup_ratio": ("warmup",), "logging_steps": ("steps_per_report",),
    "eval_steps": ("steps_per_eval",), "save_steps": ("save_every",), "save_total_limit": ("keep",),
    "early_stopping_patience": ("patience",), "train_dataset": ("data",), "eval_dataset": ("valid",),
    "valid_dataset": ("valid",), "args": ("settings",), "output_dir": ("folder",), "resume_from_checkpoint": ("resume",),
    "loss_fn": ("loss",), "criterion": ("loss",), "optimizers": ("optimizer",), "callbacks": ("beside",),
}

_PLACE = "leave it out: minilora.use('gpu') says where new arrays are made"
_MEAN = "leave it out: it is always the mean; for a sum, multiply by the number of rows"
_VARIANT = "leave it out: this variant is not here, and a subclass of minilora.optim.Optimizer can have it"
_FAST = "leave it out: each update is one pass anyway"
_ALWAYS = "leave it out: that is always so"
_FIT = "give it to minilora.train.fit(model, data, settings, folder=...)"
_SETTING = "write minilora.train.fit(model, data, minilora.train.Settings({name}={value}))"
_CONFIG = "make a config of it: minilora.lora.Config({name}={value}, target_modules=...)"
# name there: what to do about it, where no argument here is the same. One with a place in front goes before.
LEFT_OUT = {
    "inplace": "leave it out: nothing is done in place, and a new tensor comes back",
    "out": "leave it out: a new tensor comes back", "device": _PLACE, "device_map": _PLACE, "torch_device": _PLACE,
    "map_location": _PLACE, "non_blocking": "leave it out", "ops.dtype": "leave it out, and write x.astype(dtype) before",
    "dtype": "leave it out",
    "requires_grad": "leave it out: a minilora.Parameter is trained, a minilora.tensor is not; p.trainable is the switch",
    "retain_graph": "leave it out: a graph is used once. Add the losses and call backward() once, or compute the loss again",
    "create_graph": "leave it out: there is no gradient of a gradient; what needs one is an operation, minilora.engine.Op",
    ".backward.inputs": "leave it out: every trainable parameter gets its gradient; p.trainable = False keeps one from it",
    "reduction": _MEAN, "size_average": _MEAN, "reduce": _MEAN,
    "weight": "leave it out: there are no weights of classes",
    "dropout_p": "leave it out: probabilities of attention are not dropped",
    "nn.MultiheadAttention.dropout": "leave it out: probabilities of attention are not dropped",
    "key_padding_mask": "write key_padding=..., where True means the opposite: this key may be attended",
    "enable_gqa": _ALWAYS, "batch_first": _ALWAYS, "need_weights": "leave it out: the probabilities are never kept",
    "training": "leave it out, and call it in training only; or use a layer, which model.train() and model.eval() switch",
    "normalized_shape": "leave it out: it is the last axis",
    "dim0": "name all axes in their new order, such as x.transpose(1, 0)",
    "dim1": "name all axes in their new order, such as x.transpose(1, 0)",
    "padding_mode": "leave it out: zeros are padded", "nn.Upsample.mode": "leave it out: the nearest",
    "ops.upsample.mode": "leave it out: the nearest", "nn.Upsample.size": "write scale_factor=..., how many times larger",
    "ceil_mode": "leave it out",
    "count_include_pad": "leave it out", "return_indices": "leave it out", "align_corners": "leave it out",
    "max_norm": "leave it out", "norm_type": "leave it out: it is the norm of all gradients together",
    "sparse": "leave it out", "scale_grad_by_freq": "leave it out", "divisor_override": "leave it out",
    "force": "leave it out: it is always a copy on the host", "recurse": _ALWAYS,
    "prefix": "leave it out, and put it before the names",
    "assign": "leave it out: numbers are written into the arrays that are there",
    "amsgrad": _VARIANT, "nesterov": _VARIANT, "dampening": _VARIANT, "maximize": "leave it out, and write (-loss).backward()",
    "foreach": _FAST, "fused": _FAST, "capturable": "leave it out: minilora.record(step) records any",
    "differentiable": "leave it out",
    "set_to_none": "leave it out: gradients become None", "closure": "leave it out, and call loss.backward() before",
    "last_epoch": "leave it out: load_state_dict goes on where another stood", "verbose": "leave it out",
    "eta_min": "write final=..., the share of the learning rate that is left at the end",
    "safe_merge": "leave it out: a merge is always checked, and refused as a whole", "progressbar": "leave it out",
    "lora.activate.adapter_name": "write lora.activate(model, {value})",
    "adapter_names": "choose them before: minilora.lora.activate(model, *names)",
    "low_cpu_mem_usage": "leave it out: files are mapped, not copied",
    "autocast_adapter_dtype": "leave it out: what is trained beside float16 is float32",
    "safe_serialization": "leave it out: safetensors is the only format",
    "weights_only": "leave it out: pickles are never read",
    "is_main_process": "leave it out, and save in one process", "selected_adapters": "write name=..., one adapter a call",
    "quantization_config": "leave it out, and call minilora.quant.quantize(model)",
    "load_in_4bit": "leave it out, and call minilora.quant.quantize(model)",
    "load_in_8bit": "leave it out, and call minilora.quant.quantize(model, 'int8')",
    "quant.quantize.bits": "write kind='nf4' or kind='int8'",
    "attn_implementation": "leave it out", "trust_remote_code": "leave it out: no code of a model is run",
    "cache_dir": "leave it out: nothing is downloaded", "token": "leave it out: nothing is downloaded",
    "local_files_only": _ALWAYS, "num_labels": "write labels=[...], their names, or their number", "use_fast": _ALWAYS,
    "do_sample": "leave it out: temperature=1.0 draws, temperature=0.0 takes the likeliest token", "num_beams": "leave it out",
    "token_type_ids": "leave it out: this model has none", "return_tensors": "leave it out: arrays come back",
    "position_ids": "leave it out: positions are counted", "return_dict": "leave it out: a tensor comes back",
    "output_hidden_states": "leave it out, and call model.hidden(ids)",
    "fp16": "write precision='mixed'", "bf16": "write precision='mixed': float16, for bfloat16 is for frozen weights only",
    "optim": "leave it out: it is AdamW, or what minilora.train.fit gets as optimizer=...",
    "gradient_checkpointing": "leave it out, and call minilora.nn.grad_checkpoint(model)", "report_to": "leave it out",
    "evaluation_strategy": "write steps_per_eval=...", "eval_strategy": "write steps_per_eval=...",
    "save_strategy": "write save_every=...", "logging_dir": _FIT, "output_dir": _FIT,
    "tokenizer": "leave it out: minilora.train.data.read reads texts with one", "data_collator": "leave it out",
    "compute_metrics": "leave it out: minilora.train.evaluate scores a model", "use_reentrant": "leave it out",
    **{f"train.fit.{name}": _SETTING for name in ("epochs", "steps", "learning_rate", "batch_size", "seed", "threads")},
    "train.fit.lr": _SETTING.replace("{name}", "learning_rate"), "max_length": "write max_new_tokens=..., without the prompt",
    **dict.fromkeys([f"lora.{call}.{name}" for call in ("inject", "plan", "match", "what_fits")
                     for name in ("r", "lora_alpha", "target_modules")], _CONFIG),
    "testing.gradcheck.eps": "leave it out: the steps are chosen for each number",
    "testing.gradcheck.atol": "leave it out: the tolerance follows from the dtype",
    "testing.gradcheck.rtol": "leave it out: the tolerance follows from the dtype",
    "testing.gradcheck.inputs": "write gradcheck(f, x, y)", "minilora.use.device": "write minilora.use({value})",
    "minilora.tensor.device": _PLACE,
}
# A call with too many arguments without a name: what to write.
BY_PLACE = {
    "ops.transpose": "write ops.transpose(x, (1, 0)), with all axes in their new order",
    "ops.reshape": "write ops.reshape(x, shape), with the shape as a tuple",
    "ops.layer_norm": "write ops.layer_norm(x, w, b): it is the last axis that is normalised",
    "nn.Upsample": "write nn.Upsample(scale_factor=2)",
    "lora.merge": "the active adapters are merged: lora.activate(model, name) chooses them",
    "lora.unmerge": "write lora.unmerge(model)",
    "train.data.Arrays": "write train.data.Arrays(x=array, labels=array), by the names that the model's forward has",
    ".clip_grad_norm": "write optimizer.clip_grad_norm(1.0): the parameters are those of the optimizer",
    ".step": "write optimizer.step() after loss.backward()",
}
# An argument that is missing: why it is needed, and what to write.
MISSING = {
    "ops.dropout": "write ops.dropout(x, 0.1, seed=0): masks are a function of seed and step",
    "optim.SGD": "write optim.SGD(model.parameters(), lr=0.1)",
    "optim.Scheduler": "write optim.Scheduler(optimizer, optim.cosine(total=100))",
    "lora.inject": "write lora.inject(model, lora.Config(r=8, target_modules=...))",
    "lora.remove": "write lora.remove(model, 'default'); lora.status(model) lists the names",
    "formats.load_adapter": "write formats.load_adapter(model, folder)",
    "nn.Upsample": "write nn.Upsample(scale_factor=2)",
}
