"""Tables that make the logits too: whether an update of the table takes part in them differs from program to program.

In PEFT it does not: an adapter of the embedding changes what goes in, and the tied head is the base's. In mlx and here
(`lora.inject`) it takes part in both. So an adapter remembers which (`Adapter.in_head`), and in a PEFT folder the part in the
logits is written as what it is there, an update of the head, with the factors the other way round:

    h (W + s A^T B^T)^T = h W^T + s (h B) A        lora_A of the head is B^T, lora_B is A^T
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy

from ... import nn
from ...errors import FormatError
from ...lora.layers.base import AdaptedLayer
from ...lora.layers.places import named_through
from ...lora.layers.saved import SavedModule
from ..adapters.saved import SavedAdapter, Update

__all__ = ["IN_HEAD", "heads_of", "pair_in", "said_in_head", "written_heads"]

IN_HEAD = "minilora.in_head"  # in the metadata: the tables whose updates take part in the logits, where no head could be named
HEAD = "lm_head"


def heads_of(model: nn.Module) -> dict[str, str | None]:
    """The tables that make the logits of this model, each with the path that a head of its own would have; None if unknown."""
    modules = named_through(model)
    places = {id(module): path for path, module in modules.items()}
    found: dict[str, str | None] = {}
    for path, module in modules.items():
        kind, causal = type(module), getattr(module, HEAD, module) is None
        if causal or hasattr(kind, "output_bias"):
            table = getattr(module, "embedding", None)
            table = table.original if isinstance(table, SavedModule) else table
            if id(table) in places:
                name = HEAD if causal else getattr(module, "head_elsewhere", None)
                found[places[id(table)]] = name and f"{path}.{name}".lstrip(".")
        elif getattr(module, "makes_logits", False):
            found.setdefault(path, None)
    return found


def pair_in(updates: Mapping[str, Update]) -> tuple[str, str] | None:
    """A head and a table whose updates are one, as told at the top of this file; None if there are no such two."""
    for head, update in updates.items():
        if update.kind != "linear" or update.bias is not None or update.magnitude is not None:
            continue
        for table, other in updates.items():
            if other.kind == "embedding" and other.s == update.s and other.magnitude is None and \
                    numpy.array_equal(other.A.T, update.B) and numpy.array_equal(other.B.T, update.A):
                return head, table
    return None


def said_in_head(saved: SavedAdapter) -> set[str]:
    """The tables of a file, by its paths, whose updates take part in the logits although no head says so."""
    if saved.dialect == "mlx":
        return set(saved.updates)
    try:
        paths = json.loads(saved.metadata.get(IN_HEAD, "[]"))
        sound = isinstance(paths, list) and all(isinstance(path, str) for path in paths)
    except (ValueError, RecursionError):
        sound = False
    if not sound:
        raise FormatError(f"the metadata {IN_HEAD!r} of the file are no list of paths")
    return set(paths)


def written_heads(model: nn.Module, layers: Mapping[str, AdaptedLayer], name: str,
                  updates: Mapping[str, Update]) -> tuple[dict[str, Update], list[str]]:
    """Updates of heads to be written beside those of tables; and the tables for which none can be, which the metadata name."""
    heads: dict[str, Update] = {}
    unnamed: list[str] = []
    for path, head in heads_of(model).items():
        if path not in layers or not layers[path].adapters[name].in_head:
            continue
        update = updates[path]
        if head is None or update.magnitude is not None:
            unnamed.append(path)
        else:
            heads[head] = Update("linear", _turned(update.B), _turned(update.A), update.s)
    return heads, unnamed


def _turned(array: Any) -> Any:
    return numpy.ascontiguousarray(array.T)
