"""The files of sentence-transformers as values: what modules.json and a module's config.json say.

The modules are run one after the other, each from a folder that modules.json names. `models` reads and writes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["CLASSES", "DENSE", "IDENTITY", "MODES", "dense_fields", "module_fields", "pooling_fields"]

CLASSES = ("Transformer", "Pooling", "Dense")  # of a classifier
IDENTITY = "torch.nn.modules.linear.Identity"  # what a Dense has behind it, where nothing is to be computed
PLACES = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "2_Dense"}
DENSE = PLACES["Dense"]
MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


def module_fields(kinds: Iterable[str]) -> list[dict[str, Any]]:
    """modules.json for modules of these kinds."""
    return [{"idx": i, "name": str(i), "path": PLACES[kind], "type": f"sentence_transformers.models.{kind}"}
            for i, kind in enumerate(kinds)]


def pooling_fields(width: int, pooling: str) -> dict[str, Any]:
    """1_Pooling/config.json for vectors of this length: the mean of the tokens, or the first one (cls)."""
    fields: dict[str, Any] = {"word_embedding_dimension": width, "pooling_mode_max_tokens": False,
                              "pooling_mode_mean_sqrt_len_tokens": False}
    return {**fields, **{name: mode == pooling for name, mode in MODES.items()}}


def dense_fields(n: int, d: int) -> dict[str, Any]:
    """2_Dense/config.json of a classifier: (d, n), with a bias, and nothing behind it."""
    return {"in_features": d, "out_features": n, "bias": True, "activation_function": IDENTITY}
