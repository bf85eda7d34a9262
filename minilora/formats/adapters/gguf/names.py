"""llama.cpp's names of tensors, and the order that it keeps rows in: for the architectures that minilora has models of.

llama.cpp rotates pairs of neighbouring rows of queries and keys where transformers rotates one half against the other. So the
converter of Llama checkpoints reorders the rows of both, head by head, and an adapter's B must follow: row i of the first half
of a head goes to 2 i, row i of the second half to 2 i + 1. Qwen's are left as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["ARCHITECTURES", "MODEL_TYPES", "Architecture", "permuted", "restored"]

Array = Any


class Architecture(NamedTuple):
    """How the modules of transformers' models are called in GGUF files.

    Attributes
    ----------
    outer : mapping of str to str
        Outside of the layers.
    layers : str
        Where the layers are; what stands for ``blk``.
    inner : mapping of str to str
        Inside a layer.
    permuted : tuple of str
        GGUF's names of the tensors whose rows are reordered.
    """

    outer: Mapping[str, str]
    layers: str
    inner: Mapping[str, str]
    permuted: tuple[str, ...] = ()

    def to_gguf(self, path: str) -> str | None:
        """GGUF's name of a module, without ``.weight``; None for modules that it does not have.

        The path may lack what stands in front of it in the whole model (``model.``): adapters of the inner model have it so.
        """
        front = self.layers.split(".")[0] + "."
        for whole in (path, front + path):
            if whole in self.outer:
                return self.outer[whole]
            found = re.fullmatch(rf"{re.escape(self.layers)}\.(\d{{1,6}})\.(.+)", whole)
            if found and found[2] in self.inner:
                return f"blk.{int(found[1])}.{self.inner[found[2]]}"
        return None

    def from_gguf(self, name: str) -> str | None:
        """The path of the module that GGUF calls so."""
        found = re.fullmatch(r"blk\.(\d{1,6})\.(.+)", name)
        table = self.inner if found else self.outer
        inner = next((path for path, known in table.items() if known == (found[2] if found else name)), None)
        return f"{self.layers}.{int(found[1])}.{inner}" if found and inner else inner

    def is_permuted(self, name: str) -> bool:
        return name.split(".")[-1] in self.permuted


_LLAMA = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
          "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_HEADS = {"model.embed_tokens": "token_embd", "lm_head": "output"}
_GPT2 = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}

ARCHITECTURES = {
    "gpt2": Architecture({"transformer.wte": "token_embd", "lm_head": "output"}, "transformer.h", _GPT2),
    "llama": Architecture(_HEADS, "model.layers", _LLAMA, ("attn_q", "attn_k")),
    "qwen2": Architecture(_HEADS, "model.layers", _LLAMA),
    "qwen3": Architecture(_HEADS, "model.layers", _LLAMA),
}
# What the config.json of a base says, and llama.cpp's architecture for it.
MODEL_TYPES = {"gpt2": "gpt2", "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def permuted(B: Array, heads: int) -> Array:
    """The rows of B in llama.cpp's order; a copy."""
    return B.reshape(heads, 2, len(B) // heads // 2, *B.shape[1:]).swapaxes(1, 2).reshape(B.shape)


def restored(B: Array, heads: int) -> Array:
    """The rows of B in transformers' order again; a copy."""
    return B.reshape(heads, len(B) // heads // 2, 2, *B.shape[1:]).swapaxes(1, 2).reshape(B.shape)
