"""GPU: a linear layer whose bias is added by the product that it belongs to."""

from __future__ import annotations

from typing import Any

from ...backend import override
from ...ops.linear import Linear, rows, unrows
from ...stored import Stored
from ..launch import has_kernel

__all__ = ["FusedLinear", "with_bias"]

Array = Any


def with_bias(xp: Any, x: Array, W: Array, b: Array | None) -> Array | None:
    """x W^T + b (N, out) in one launch for x (N, in); None, and nothing is done, where there is no such product."""
    own = getattr(xp, "products", None)
    if own is None or b is None or not has_kernel(x, b) or x.dtype != W.dtype or not W.size:
        return None
    if isinstance(W, Stored):
        return W.of_16_bits(x, transposed=True, bias=b)
    y = xp.empty((x.shape[0], W.shape[0]), dtype=x.dtype)
    return y if own.gemm(x, W.T, y, bias=b) else None


@override(Linear, device="gpu")
class FusedLinear(Linear):
    """`Linear` with one launch forward, where the reference has one for x W^T and one for the bias.

    The same formula and what is kept as in the reference. A bias that lies where the library cannot read it in passing, as a
    trained one may between its neighbours in an optimizer's array, is added by a launch after all: `products` sees to that.
    """

    def forward(self, x: Array, W: Array, b: Array | None) -> Array:
        y = with_bias(self.xp, rows(x), W, b) if x.ndim else None
        if y is None:
            self.kernel = ""
            return super().forward(x, W, b)
        self.in_shape = x.shape
        self.save(x if self.needs[1] else None, W if self.needs[0] else None)
        return unrows(y, self.in_shape)
