"""CPU: Adam and GELU in one walk over memory each: a block of elements stays in the cache from the first pass to the last."""

from __future__ import annotations

from typing import Any

import numpy

from ...backend import override
from ...ops.activation import GELU
from ...optim.adam import adam_update
from .blocks import BLOCK, in_blocks

__all__ = ["BlockedGELU", "adam_update_blocked"]

Array = Any


@override(adam_update, device="cpu")
def adam_update_blocked(theta: Array, g: Array, m: Array, v: Array, beta1: float, beta2: float, size: float, eps: float,
                        keep: float) -> None:
    """`adam_update` in one walk over memory: the reference walks it ten times."""
    in_blocks(_adam_block, (theta, g, m, v), beta1, beta2, size, eps, keep)


def _adam_block(t: Array, theta: Array, g: Array, m: Array, v: Array, beta1: float, beta2: float, size: float, eps: float,
                keep: float) -> None:
    m *= beta1
    m += g
    v *= beta2
    v += numpy.multiply(g, g, out=t)
    numpy.sqrt(v, out=t)
    t += eps
    numpy.divide(m, t, out=t)
    t *= size
    if keep != 1.0:
        theta *= keep
    theta -= t


@override(GELU, device="cpu")
class BlockedGELU(GELU):
    """`GELU` in one walk over memory each way; the reference makes a new array for each of its passes.

    Keeps dy/dx in the place of x, in as many bytes: tanh is computed once, and backward is one product.
    """

    def forward(self, x: Array) -> Array:
        if x.dtype.kind != "f" or not x.flags.c_contiguous:
            self.kernel = ""
            return super().forward(x)
        y = numpy.empty_like(x)
        if not self.needs[0]:
            in_blocks(self._value_block, (x.reshape(-1), y.reshape(-1)), block=BLOCK // 4)
            return y
        slope = numpy.empty_like(x)
        in_blocks(self._slope_block, (x.reshape(-1), y.reshape(-1), slope.reshape(-1)), block=BLOCK // 4)
        self.save(slope)
        return y

    def _value_block(self, near: Array, x: Array, y: Array) -> None:
        numpy.clip(x, -10.0, 10.0, out=near)
        numpy.square(near, out=y)
        y *= self.c * self.a
        y += self.c
        y *= near
        numpy.tanh(y, out=y)
        y += 1.0
        y *= x
        y *= 0.5

    def _slope_block(self, near: Array, x: Array, y: Array, slope: Array) -> None:
        # With t = c x (1 + a x^2), x dt/dx = 3 t - 2 c x; so dy/dx = (1 + tanh t) (1/2 + (1 - tanh t) (3/2 t - c x)).
        numpy.clip(x, -10.0, 10.0, out=near)
        numpy.square(near, out=slope)
        slope *= self.c * self.a
        slope += self.c
        slope *= near
        numpy.tanh(slope, out=y)
        slope *= 1.5
        near *= self.c
        slope -= near
        numpy.subtract(1.0, y, out=near)
        slope *= near
        slope += 0.5
        y += 1.0
        slope *= y
        y *= x
        y *= 0.5

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        (kept,) = self.saved
        if kept.dtype.kind != "f" or not kept.flags.c_contiguous:
            return super().backward(dy)  # kept is x
        return (dy * kept,)
