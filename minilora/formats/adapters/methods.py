"""Methods that are not LoRA, or not told so that minilora could read it: by their keys, with the way out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["cure_for", "foreign_methods"]

_BY_WEIGHTS = "To have it as LoRA: merge it with the program that made it, then lora.extract(W_tuned, W_base, r) for each layer"

# What a key has in it, and the method that writes such keys.
KEYS = {
    "hada_w1_a": "LoHa", "hada_w2_a": "LoHa", "hada_t1": "LoHa", "lokr_w1": "LoKr", "lokr_w2": "LoKr", "lokr_t2": "LoKr",
    "lora_E": "AdaLoRA", "ranknum": "AdaLoRA", "oft_r": "OFT", "oft_R": "OFT", "oft_blocks": "OFT", "oft_diag": "OFT",
    "boft_R": "BOFT", "boft_s": "BOFT", "vera_lambda_b": "VeRA", "vera_lambda_d": "VeRA", "ia3_l": "IA3", "on_input": "IA3",
    "fourierft_spectrum": "FourierFT", "hra_u": "HRA", "vblora_logits_A": "VB-LoRA", "vblora_vector_bank": "VB-LoRA",
    "randlora_lambda": "RandLoRA", "shira_weight": "SHiRA", "c3a_kernel": "C3A", "bone_block": "Bone", "miss_block": "MiSS",
    "prompt_embeddings": "prompt or prefix tuning", "diff_b": "weight differences (LyCORIS full)", "w_norm": "norm differences",
}
PARTS_OF_KEYS = {"parametrizations.weight.0.lora_": "minLoRA"}


def cure_for(method: Any) -> str:
    """What somebody can do who has a file of another method."""
    name = str(method).upper()
    if name in ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"):
        return "It changes no weights, so no LoRA adapter can say it"
    return _BY_WEIGHTS


def foreign_methods(keys: Iterable[str]) -> dict[str, str]:
    """The methods that some keys belong to, each with one of its keys."""
    found: dict[str, str] = {}
    for key in keys:
        words = key.replace(":", ".:").split(".")
        method = next((KEYS[word] for word in words if word in KEYS), None)
        method = method or next((name for part, name in PARTS_OF_KEYS.items() if part in key), None)
        if method is None and (key.endswith((":up", ":down")) or ":up:" in key or ":down:" in key):
            method = "cloneofsimo's LoRA"
        if method:
            found.setdefault(method, key)
    return found
