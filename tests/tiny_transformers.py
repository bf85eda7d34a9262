"""A tiny model of each family, and the tables of its parameters' names: ours, transformers', and the shape.

`{}` stands for the number of a layer, of which there are two.
"""
import numpy as np

from minilora import nn

V, P, D, F = 13, 9, 32, 48  # tokens, positions, width, width of the MLP
LAYERS = 2

CONFIGS = {
    "gpt2": nn.GPT2Config(vocab_size=V, n_positions=P, n_embd=D, n_layer=LAYERS, n_head=4, n_inner=F),
    "bert": nn.BertConfig(vocab_size=V, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=F,
                          max_position_embeddings=P),
    "llama": nn.LlamaConfig(vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS, num_attention_heads=4,
                            num_key_value_heads=2),
}
MODELS = {"gpt2": nn.GPT2, "bert": nn.Bert, "llama": nn.Llama}
CAUSAL = ("gpt2", "llama")

# ours: (transformers' GPT2LMHeadModel, our shape); its c_attn, c_proj and c_fc are transposed
GPT2 = {
    "wte.weight": ("transformer.wte.weight", (V, D)),
    "wpe.weight": ("transformer.wpe.weight", (P, D)),
    "h.{}.ln_1.weight": ("transformer.h.{}.ln_1.weight", (D,)),
    "h.{}.ln_1.bias": ("transformer.h.{}.ln_1.bias", (D,)),
    "h.{}.attn.c_attn.weight": ("transformer.h.{}.attn.c_attn.weight", (3 * D, D)),
    "h.{}.attn.c_attn.bias": ("transformer.h.{}.attn.c_attn.bias", (3 * D,)),
    "h.{}.attn.c_proj.weight": ("transformer.h.{}.attn.c_proj.weight", (D, D)),
    "h.{}.attn.c_proj.bias": ("transformer.h.{}.attn.c_proj.bias", (D,)),
    "h.{}.ln_2.weight": ("transformer.h.{}.ln_2.weight", (D,)),
    "h.{}.ln_2.bias": ("transformer.h.{}.ln_2.bias", (D,)),
    "h.{}.mlp.c_fc.weight": ("transformer.h.{}.mlp.c_fc.weight", (F, D)),
    "h.{}.mlp.c_fc.bias": ("transformer.h.{}.mlp.c_fc.bias", (F,)),
    "h.{}.mlp.c_proj.weight": ("transformer.h.{}.mlp.c_proj.weight", (D, F)),
    "h.{}.mlp.c_proj.bias": ("transformer.h.{}.mlp.c_proj.bias", (D,)),
    "ln_f.weight": ("transformer.ln_f.weight", (D,)),
    "ln_f.bias": ("transformer.ln_f.bias", (D,)),
}

# ours: (transformers' BertModel, our shape)
BERT = {
    "embeddings.word_embeddings.weight": ("embeddings.word_embeddings.weight", (V, D)),
    "embeddings.position_embeddings.weight": ("embeddings.position_embeddings.weight", (P, D)),
    "embeddings.token_type_embeddings.weight": ("embeddings.token_type_embeddings.weight", (2, D)),
    "embeddings.LayerNorm.weight": ("embeddings.LayerNorm.weight", (D,)),
    "embeddings.LayerNorm.bias": ("embeddings.LayerNorm.bias", (D,)),
    "encoder.layer.{}.attention.self.query.weight": ("encoder.layer.{}.attention.self.query.weight", (D, D)),
    "encoder.layer.{}.attention.self.query.bias": ("encoder.layer.{}.attention.self.query.bias", (D,)),
    "encoder.layer.{}.attention.self.key.weight": ("encoder.layer.{}.attention.self.key.weight", (D, D)),
    "encoder.layer.{}.attention.self.key.bias": ("encoder.layer.{}.attention.self.key.bias", (D,)),
    "encoder.layer.{}.attention.self.value.weight": ("encoder.layer.{}.attention.self.value.weight", (D, D)),
    "encoder.layer.{}.attention.self.value.bias": ("encoder.layer.{}.attention.self.value.bias", (D,)),
    "encoder.layer.{}.attention.output.dense.weight": ("encoder.layer.{}.attention.output.dense.weight", (D, D)),
    "encoder.layer.{}.attention.output.dense.bias": ("encoder.layer.{}.attention.output.dense.bias", (D,)),
    "encoder.layer.{}.attention.output.LayerNorm.weight": ("encoder.layer.{}.attention.output.LayerNorm.weight", (D,)),
    "encoder.layer.{}.attention.output.LayerNorm.bias": ("encoder.layer.{}.attention.output.LayerNorm.bias", (D,)),
    "encoder.layer.{}.intermediate.dense.weight": ("encoder.layer.{}.intermediate.dense.weight", (F, D)),
    "encoder.layer.{}.intermediate.dense.bias": ("encoder.layer.{}.intermediate.dense.bias", (F,)),
    "encoder.layer.{}.output.dense.weight": ("encoder.layer.{}.output.dense.weight", (D, F)),
    "encoder.layer.{}.output.dense.bias": ("encoder.layer.{}.output.dense.bias", (D,)),
    "encoder.layer.{}.output.LayerNorm.weight": ("encoder.layer.{}.output.LayerNorm.weight", (D,)),
    "encoder.layer.{}.output.LayerNorm.bias": ("encoder.layer.{}.output.LayerNorm.bias", (D,)),
    "pooler.dense.weight": ("pooler.dense.weight", (D, D)),
    "pooler.dense.bias": ("pooler.dense.bias", (D,)),
}

# ours: (transformers' LlamaForCausalLM, our shape)
LLAMA = {
    "model.embed_tokens.weight": ("model.embed_tokens.weight", (V, D)),
    "model.layers.{}.input_layernorm.weight": ("model.layers.{}.input_layernorm.weight", (D,)),
    "model.layers.{}.self_attn.q_proj.weight": ("model.layers.{}.self_attn.q_proj.weight", (D, D)),
    "model.layers.{}.self_attn.k_proj.weight": ("model.layers.{}.self_attn.k_proj.weight", (D // 2, D)),
    "model.layers.{}.self_attn.v_proj.weight": ("model.layers.{}.self_attn.v_proj.weight", (D // 2, D)),
    "model.layers.{}.self_attn.o_proj.weight": ("model.layers.{}.self_attn.o_proj.weight", (D, D)),
    "model.layers.{}.post_attention_layernorm.weight": ("model.layers.{}.post_attention_layernorm.weight", (D,)),
    "model.layers.{}.mlp.gate_proj.weight": ("model.layers.{}.mlp.gate_proj.weight", (F, D)),
    "model.layers.{}.mlp.up_proj.weight": ("model.layers.{}.mlp.up_proj.weight", (F, D)),
    "model.layers.{}.mlp.down_proj.weight": ("model.layers.{}.mlp.down_proj.weight", (D, F)),
    "model.norm.weight": ("model.norm.weight", (D,)),
    "lm_head.weight": ("lm_head.weight", (V, D)),
}

TABLES = {"gpt2": GPT2, "bert": BERT, "llama": LLAMA}


def names(family):
    """The table with the layers' numbers written in: {ours: (theirs, our shape)}."""
    return {ours.format(i): (theirs.format(i), shape) for ours, (theirs, shape) in TABLES[family].items()
            for i in range(LAYERS if "{}" in ours else 1)}


def build(family, dtype="float64", rng=0, **changes):
    """A tiny model; `changes` are to its config."""
    config = CONFIGS[family]
    return MODELS[family](type(config)(**{**vars(config), **changes}), dtype=dtype, rng=rng)


def randomise(model, seed=7, std=0.3):
    """Biases and norms too, and weights so large that every part of the model counts; rows of padding stay 0."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, value in model.named_parameters():  # not the counters of dropout
        state[name] = rng.normal(1.0 if "norm.weight" in name.lower() or "ln_" in name else 0.0, std, value.shape)
        state[name] = state[name].astype(value.dtype)
        if "word_embeddings" in name:
            state[name][0] = 0.0
    model.load_state_dict(state, strict=False)
    return model


def token_ids(*shape, seed=1):
    """None of them 0, which is BERT's padding."""
    return np.random.default_rng(seed).integers(1, V, shape)
