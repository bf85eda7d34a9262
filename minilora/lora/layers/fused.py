"""MergedLinear: several linear layers fused into one matrix, with an update in some of them. loralib's layer of that name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from ... import backend, nn, ops
from ...errors import ConfigError
from ...tensor import Tensor
from ..gradients.fused import block_diagonal, lora_merged_linear, lora_merged_update, slots_of
from .base import AdaptedLayer
from .start import new_adapter

__all__ = ["MergedLinear"]


class MergedLinear(AdaptedLayer, nn.Linear):
    """A fused projection, such as queries, keys and values in one matrix, with low-rank updates in the enabled slots.

    Slot i of L has the outputs i out / L to (i + 1) out / L. Each enabled slot has an update of its own, of rank r, with rows
    of A and of B of its own; the others have none. In one plain `Linear` the slots would share A.

    Parameters
    ----------
    in_features, out_features : int
        out_features is a multiple of the number of slots.
    r, lora_alpha, lora_dropout
        As in `Linear`; r is the rank of each slot.
    enable_lora : sequence of bool
        One for each slot: ``(True, False, True)`` for queries and values.
    bias, dtype, rng
        As in `Linear`.

    Attributes
    ----------
    weight : Parameter, shape (out, in), frozen
    lora_A : Parameter, shape (m r, in)
        m is the number of enabled slots.
    lora_B : Parameter, shape (m out / L, r)

    Raises
    ------
    ConfigError
        For a setting outside its range.

    Notes
    -----
    For a layer that exists: ``lora.adapt(layer, r, enable_lora=(True, False, True))``. Of the options of `lora.adapt` it has
    use_rslora and init_lora_weights, True or "gaussian". The gradients: `gradients.fused`.

    Examples
    --------
    >>> import minilora
    >>> layer = minilora.lora.MergedLinear(4, 12, r=2, enable_lora=(True, False, True), rng=0)
    >>> layer.lora_A.shape, layer.lora_B.shape
    ((4, 4), (8, 2))
    """

    OWN = AdaptedLayer.OWN | {"enable_lora"}
    takes_more = False
    only_factors = True
    enable_lora: tuple[bool, ...]

    def __init__(self, in_features: int, out_features: int, r: int = 8, lora_alpha: float = 8, lora_dropout: float = 0.0,
                 enable_lora: Sequence[bool] = (True,), bias: bool = True, *, dtype: Any = "float32",
                 rng: numpy.random.Generator | int | None = None, **options: Any) -> None:
        rng = numpy.random.default_rng(rng)
        self.adopt(nn.Linear(in_features, out_features, bias, dtype=dtype, rng=rng).requires_grad(False))
        self.enable(enable_lora)
        self.begin(new_adapter(self, r, lora_alpha, lora_dropout, rng=rng, **options))

    def enable(self, enable_lora: Sequence[bool]) -> None:
        """Say which slots have an update: once, before there is an adapter."""
        m = sum(on is True for on in enable_lora) if isinstance(enable_lora, (tuple, list)) else 0
        rows = m * self.out_features // len(enable_lora) if m else 0
        slots_of("MergedLinear", enable_lora, self.out_features, None, (m, 1), (rows, 1))  # raises if they do not fit
        self.enable_lora = tuple(enable_lora)

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        m = sum(self.enable_lora)
        return (m * r, self.in_features), (m * self.out_features // len(self.enable_lora), r)

    def frozen(self, x: Any, bias: bool = True) -> Tensor:
        return ops.linear(x, self.weight, self.bias if bias else None)

    def fused(self, x: Any, A: Any, B: Any, s: float, bias: bool = True) -> Tensor:
        return lora_merged_linear(x, self.weight, self.bias if bias else None, A, B, s, self.enable_lora)

    def low_rank(self, x: Any, A: Any, B: Any, s: float) -> Tensor:
        return lora_merged_update(x, A, B, s, self.enable_lora, self.out_features)

    def as_update(self, A: Any, B: Any) -> tuple[Any, Any]:
        return block_diagonal(A, B, 1.0, self.enable_lora, self.out_features)[:2]

    stored = as_update

    def rank_for(self, r: int) -> int:
        m = sum(self.enable_lora)
        if r % m:
            raise ConfigError(f"MergedLinear: an update of rank {r} has no equal parts for {m} slots")
        return r // m

    def from_update(self, A: Any, B: Any) -> tuple[Any, Any]:
        o, r = self.out_features // len(self.enable_lora), self.rank_for(len(A))
        enabled = [i for i, on in enumerate(self.enable_lora) if on]
        own = [B[i * o:(i + 1) * o, e * r:(e + 1) * r] for e, i in enumerate(enabled)]
        if int((B != 0).sum()) != sum(int((part != 0).sum()) for part in own):
            raise ConfigError("MergedLinear: the update mixes the slots of this layer: put it on a plain linear layer")
        return A, backend.device_of(B).xp.concatenate(own)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, enable_lora={self.enable_lora}"
