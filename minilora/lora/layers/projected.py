"""Updates behind a linear layer: y0 = x W^T + b, then y = y0 + s (y0 A^T) B^T.

**How this differs from the usual placement.** Usually A reads the layer's input, and y = x (W + s B A)^T: the update is *added*
to W, its rows are combinations of the rows of A, and they may be any directions of the input. Here A reads the output:

    y = y0 (I + s B A)^T = x ((I + s B A) W)^T + b (I + s B A)^T

so W is *multiplied* by a matrix that differs from I by one of rank r. Merged, that is W + s B (A W): again an update of rank r,
but its rows are combinations of rows of W. What W maps to 0, or nearly so, stays there: if W has lost a direction of the input,
this placement cannot bring it back, the usual one can. And A is (r, out), not (r, in). The article that describes this form
puts it on the projected keys and values of an attention layer.

**Gradients**, with z = y0 A^T, as in `gradient` but for W's place:

    u = dy B            (N, r)
    dB = s dy^T z       (out, r)
    dA = s u^T y0       (r, out)
    dy0 = dy + s u A    (N, out)
    dx = dy0 W          (N, in)

The layer composes this of `ops.linear`, `LoRAUpdate` and a sum.
"""

from __future__ import annotations

from typing import Any

import numpy

from ... import backend, nn, ops
from ...errors import ConfigError, StateError
from ...nn.by_row import rows_of
from ...tensor import Tensor
from .. import gradient
from .adapter import Adapter
from .base import AdaptedLayer

__all__ = ["Projected"]

Array = Any


class Projected(AdaptedLayer, nn.Linear):
    """A linear layer whose update reads its output; made by ``lora.adapt(layer, r, lora_alpha, on_output=True)``.

    Attributes
    ----------
    weight : Parameter, shape (out, in), frozen
    lora_A : Parameter, shape (r, out)
    lora_B : Parameter, shape (out, r)

    Examples
    --------
    >>> import minilora
    >>> layer = minilora.lora.adapt(minilora.nn.Linear(6, 4, rng=0), r=2, on_output=True, rng=1)
    >>> layer.lora_A.shape, layer.lora_B.shape
    ((2, 4), (4, 2))
    """

    takes_more = False
    only_factors = True

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, self.out_features), (self.out_features, r)

    def frozen(self, x: Any, bias: bool = True) -> Tensor:
        return ops.linear(x, self.weight, self.bias if bias else None)

    def low_rank(self, x: Any, A: Any, B: Any, s: float) -> Tensor:
        return gradient.lora_update(x, A, B, s)

    def forward(self, x: Any) -> Tensor:
        y0 = self.frozen(x)
        if self.merged:
            self.refuse_merged_use()
            return y0
        return self.with_updates(y0, y0, self._update, rows_of(self))

    def update(self, x: Any) -> Tensor:
        self._base()
        return super().update(self.frozen(x))

    def _base(self) -> Array:
        if self.merged:
            raise StateError("this layer is merged: its weight is W', and the update reads W x. Call unmerge() first")
        return self.weight.data

    def as_update(self, A: Array, B: Array) -> tuple[Array, Array]:
        return backend.device_of(A).exact.dot(A, self._base()), B

    def stored(self, A: Array, B: Array) -> tuple[Array, Array]:
        return numpy.dot(A, backend.to_host(self._base())), B

    def bias_update(self, adapter: Adapter) -> Array | None:
        if self.bias is None:
            return None
        dot = self.bias.device.exact.dot
        return dot(adapter.lora_B.data, dot(adapter.lora_A.data, self.bias.data))

    def from_update(self, A: Array, B: Array) -> tuple[Array, Array]:
        raise ConfigError("an update given as factors of D is added to the weight: put it on a plain linear layer, not on one "
                          "whose update reads its output")
