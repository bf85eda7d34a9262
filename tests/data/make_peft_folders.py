"""Make peft_folders.npz: adapter folders as PEFT wrote them, byte for byte, and what PEFT computes from them.

Run it where torch, peft and transformers are installed; the tests that read the file need neither.

    python tests/data/make_peft_folders.py
"""
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

nn = torch.nn
FILES = ("adapter_config.json", "adapter_model.safetensors")


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.wte = nn.Embedding(5, 4), nn.Embedding(5, 4)
        self.lin, self.nobias = nn.Linear(4, 3), nn.Linear(4, 4, bias=False)
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(2, 4, 3), nn.Conv2d(2, 4, 3), nn.Conv3d(2, 4, 2)
        self.ln, self.head, self.pre_head = nn.LayerNorm(4), nn.Linear(4, 2), nn.Linear(4, 4)
        self.att = nn.MultiheadAttention(4, 2)


def tiny(kind, model_type, **more):
    sizes = {"gpt2": dict(n_embd=4, n_layer=1, n_head=2, n_positions=8, vocab_size=7),
             "distilbert": dict(dim=4, hidden_dim=4, n_layers=1, n_heads=2, max_position_embeddings=8, vocab_size=7),
             "llama": dict(hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
                           num_key_value_heads=2, vocab_size=7)}[model_type]
    return getattr(transformers, kind)(transformers.AutoConfig.for_model(model_type, **sizes, **more))


FOLDERS = {
    "kinds": (Layers, dict(target_modules=["emb", "lin", "conv1", "conv2", "conv3"], lora_alpha=3)),
    "dora": (Layers, dict(target_modules=["emb", "lin", "conv1", "conv2", "conv3"], use_dora=True)),
    "rslora": (Layers, dict(target_modules=["lin", "head"], use_rslora=True, lora_alpha=4, rank_pattern={"^head": 4},
                            alpha_pattern={"^head": 2})),
    "lora_bias": (Layers, dict(target_modules=["lin", "conv1"], lora_bias=True)),
    "biases": (Layers, dict(target_modules=["lin", "nobias"], bias="lora_only")),
    "all_biases": (Layers, dict(target_modules=["lin"], bias="all", modules_to_save=["head"])),
    "attention": (Layers, dict(target_modules=["att"])),
    "tokens": (Layers, dict(target_modules=["lin"], trainable_token_indices={"wte": [3, 1]})),
    "half": (Layers, dict(target_modules=["lin"], revision="main", base_model_name_or_path="some/base")),
    "eva": (Layers, dict(target_modules=["lin"], init_lora_weights="eva")),
    "gpt2_classifier": (lambda: tiny("GPT2ForSequenceClassification", "gpt2", num_labels=3, pad_token_id=0),
                        dict(target_modules=["c_attn"], fan_in_fan_out=True, task_type="SEQ_CLS")),
    "distilbert_classifier": (lambda: tiny("DistilBertForSequenceClassification", "distilbert"),
                              dict(target_modules=["q_lin", "v_lin"], task_type="SEQ_CLS")),
    "llama_embedding": (lambda: tiny("LlamaForCausalLM", "llama"),
                        dict(target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")),
    "llama_tokens": (lambda: tiny("LlamaForCausalLM", "llama", tie_word_embeddings=True),
                     dict(target_modules="all-linear", trainable_token_indices=[1, 4], task_type="CAUSAL_LM")),
}


def made(name, folder):
    """The bytes of the two files, and s and the update D of each layer that PEFT can tell them of."""
    build, settings = FOLDERS[name]
    if name == "eva":
        settings = {**settings, "eva_config": peft.EvaConfig()}
    torch.manual_seed(0)
    model = peft.get_peft_model(build(), peft.LoraConfig(r=2, **settings))
    if name == "half":
        model = model.half()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape))
    model.save_pretrained(folder)
    out = {file: np.frombuffer((folder / file).read_bytes(), "uint8") for file in FILES}
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            path = path.replace("base_layer.", "")
            out[f"s/{path}"] = np.array(module.scaling["default"])
            if not isinstance(module.base_layer, nn.MultiheadAttention):
                out[f"D/{path}"] = module.float().get_delta_weight("default").detach().numpy()
    return out


def main():
    arrays = {}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as place:
        warnings.simplefilter("ignore")
        for name in FOLDERS:
            arrays.update({f"{name}/{key}": value for key, value in made(name, Path(place) / name).items()})
    arrays["versions"] = np.array(json.dumps({"peft": peft.__version__, "torch": torch.__version__}))
    np.savez_compressed(Path(__file__).with_name("peft_folders.npz"), **arrays)


if __name__ == "__main__":
    main()
