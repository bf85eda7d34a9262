"""The LoRA layer of a tensor in a file: its weight is the mapped array itself. So what merges here is what merges in a model.

What a file does not say about a layer is told by the factors that fit it: A (r, in) and B (out, r) are never transposed, so a
weight (in, out) is GPT-2's. Where in = out, the names and the config decide (`Orientation`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy

from ... import nn
from ...errors import FormatError
from ...lora.layers.base import AdaptedLayer
from ...lora.layers.kinds import adapted_layer
from ...lora.layers.linear import Linear
from ...tensor import Tensor
from ..adapters.saved import Update
from .checkpoint import TRANSPOSED, TRANSPOSED_NAMES

__all__ = ["Orientation", "layer_of"]

Array = Any


class Orientation:
    """Which matrices of a base are stored as (in, out).

    Parameters
    ----------
    config : mapping or None
        The base's config.json.
    fits : iterable of (str, shape, Update)
        Linear updates with the path and the shape of their weight: those that are not square tell.
    said : bool
        Whether the adapters' configs say ``fan_in_fan_out``.
    """

    def __init__(self, config: Mapping[str, Any] | None, fits: Iterable[tuple[str, tuple[int, ...], Update]],
                 said: bool) -> None:
        kind = (config or {}).get("model_type")
        self.by_name = kind in TRANSPOSED if isinstance(kind, str) else None
        self.said = said
        self.seen = {path.rpartition(".")[2] for path, shape, u in fits
                     if len(shape) == 2 and shape[0] != shape[1] and _turned(shape, u)}

    def turned(self, path: str, shape: tuple[int, ...], update: Update) -> bool:
        """Whether the weight at a path is stored as (in, out)."""
        if len(shape) != 2 or update.kind != "linear":
            return False
        if shape[0] != shape[1]:
            return _turned(shape, update)
        last = path.rpartition(".")[2]
        if self.by_name is not None:
            return self.by_name and last in TRANSPOSED_NAMES
        return last in self.seen or (last in TRANSPOSED_NAMES and (self.said or bool(self.seen)))


def _turned(shape: tuple[int, ...], update: Update) -> bool:
    A, B = update.A, update.B
    return A.ndim == 2 and B.ndim == 2 and shape == (A.shape[1], B.shape[0])


def layer_of(view: numpy.ndarray, update: Update, turned: bool, bias: numpy.ndarray | None = None) -> AdaptedLayer:
    """The layer, without adapters yet.

    Parameters
    ----------
    view : ndarray
        The weight, as the file has it.
    update : Update
        One that is for this layer: it says the kind.
    turned : bool
        A linear weight is stored as (in, out).
    bias : ndarray, optional

    Raises
    ------
    FormatError
        If no layer of that kind has such a weight.
    """
    with nn.undrawn():
        layer = adapted_layer(_plain(view.shape, update, turned))
    if turned:
        assert isinstance(layer, Linear)
        layer.fan_in_fan_out = True
    # Tensors, which take bfloat16; nothing here trains.
    vars(layer).update(weight=Tensor(view), bias=None if bias is None else Tensor(bias))
    return layer


def _plain(shape: tuple[int, ...], update: Update, turned: bool) -> nn.Module:
    if 0 in shape or not 2 <= len(shape) <= 4:
        raise FormatError(f"the base has a tensor {shape} there, which is no weight of a layer that can be adapted")
    if len(shape) == 2 and update.kind == "embedding":
        return nn.Embedding(*shape)
    if len(shape) == 2:
        out, n_in = shape[::-1] if turned else shape
        return nn.Linear(n_in, out, bias=False)
    groups = _groups(shape, update)
    if len(shape) == 3:
        return nn.Conv1d(shape[1] * groups, shape[0], shape[2], groups=groups, bias=False)
    return nn.Conv2d(shape[1] * groups, shape[0], shape[2:], groups=groups, bias=False)


def _groups(shape: tuple[int, ...], update: Update) -> int:
    """The groups of a convolution, which its weight (out, in / groups, ...) does not say; B (out, r / groups, ...) does."""
    r, ranks = update.A.shape[0], math.prod(update.B.shape[1:])
    return r // ranks if ranks and r % ranks == 0 and shape[0] % (r // ranks) == 0 else 1
