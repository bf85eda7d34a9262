"""Make peft_load_vectors.json: adapters that PEFT wrote, and the outputs of the models that it wrapped. Needs torch and peft.

    python tests/data/make_peft_load_vectors.py

The models are those of tests/twins.py, whose numbers are written down by a formula, as the inputs are: the file holds
configs, tensors of adapters and outputs alone. float64, and float32 where PEFT refuses float64.
"""
import json
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

CASES = {
    "linear": ("text", dict(target_modules=["fc"], r=2, lora_alpha=3)),
    "rslora, patterns": ("text", dict(target_modules=["fc", "pre_classifier"], r=2, lora_alpha=3, use_rslora=True,
                                      rank_pattern={"h.1.fc": 4}, alpha_pattern={"pre_classifier": 1})),
    "Conv1D, bias all": ("text", dict(target_modules=["c_proj"], r=2, lora_alpha=3, fan_in_fan_out=True, bias="all")),
    "table, dora, lora_only": ("text", dict(target_modules=["emb", "fc"], r=2, lora_alpha=3, use_dora=True,
                                            bias="lora_only")),
    "lora_bias, heads": ("text", dict(target_modules=["fc"], r=2, lora_alpha=3, lora_bias=True,
                                      modules_to_save=["classifier"])),
    "tokens": ("text", dict(target_modules=["fc"], r=2, lora_alpha=3, trainable_token_indices=[7, 2])),
    "pissa": ("text", dict(target_modules=["fc"], r=2, lora_alpha=3, init_lora_weights="pissa")),
    "olora": ("text", dict(target_modules=["fc"], r=2, lora_alpha=3, init_lora_weights="olora")),
    "convolutions": ("image", dict(target_modules=["conv1", "conv2", "line"], r=2, lora_alpha=3)),
    "convolutions, dora": ("image", dict(target_modules=["conv1", "line", "head"], r=2, lora_alpha=3, use_dora=True)),
}


def made(name, kind, settings):
    import peft
    import torch
    import transformers
    import twins
    from checkpoint_cases import numbers
    from safetensors.numpy import load_file

    dtype = "float32" if settings.get("init_lora_weights") in ("pissa", "olora") else "float64"
    plain = twins.theirs(torch, transformers, kind, dtype)
    with torch.no_grad():
        for path, p in plain.named_parameters():
            p.copy_(torch.tensor(numbers(path, tuple(p.shape))))
    torch.manual_seed(0)
    model = peft.get_peft_model(plain, peft.LoraConfig(**settings))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.tensor(np.round((p + 0.2 * torch.randn(p.shape)).numpy(), 4)))
    x = twins.drawn_input(kind)
    y = model.eval()(torch.tensor(x if kind == "text" else x.astype(dtype))).detach().numpy()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
    return {"kind": kind, "dtype": dtype, "config": config,
            "tensors": {key: array.tolist() for key, array in sorted(tensors.items())}, "output": y.tolist()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    vectors = {name: made(name, kind, settings) for name, (kind, settings) in CASES.items()}
    (HERE / "peft_load_vectors.json").write_text(json.dumps(vectors, indent=0) + "\n")
