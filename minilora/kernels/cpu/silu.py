"""SiLU on the CPU, in blocks: the reference takes nine passes over memory and two choices, each as long as several passes."""

from __future__ import annotations

from typing import Any

import numpy

from ...backend import override
from ...ops.activation import SiLU
from .blocks import BLOCK, in_blocks

__all__ = ["BlockedSiLU"]

Array = Any

MOST = {"f": 88.0, "d": 709.0}  # below -88, or -709, x is taken for that: e^-x would overflow, and y is less than 1e-36 there


@override(SiLU, device="cpu")
class BlockedSiLU(SiLU):
    """`SiLU` in one walk over memory each way. Keeps dy/dx in the place of x, in as many bytes: backward is a product."""

    reads_x: bool

    def forward(self, x: Array) -> Array:
        self.reads_x = x.dtype.char not in MOST or not x.flags.c_contiguous
        if self.reads_x:
            self.kernel = ""
            return super().forward(x)
        made = [numpy.empty_like(x) for _ in range(2 if self.needs[0] else 1)]
        in_blocks(self._block, tuple(a.reshape(-1) for a in (x, *made)), MOST[x.dtype.char], scratches=3, block=BLOCK // 4)
        if self.needs[0]:
            self.save(made[1])
        return made[0]

    def _block(self, near: Array, e: Array, p: Array, x: Array, y: Array, *rest: Any) -> None:
        *slope, most = rest
        numpy.maximum(x, -most, out=near)
        numpy.negative(near, out=e)
        numpy.exp(e, out=e)
        e += 1.0
        numpy.divide(1.0, e, out=p)
        numpy.multiply(near, p, out=y)
        for out in slope:  # p + x p (1 - p)
            numpy.subtract(1.0, p, out=e)
            e *= y
            numpy.add(e, p, out=out)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        (kept,) = self.saved
        if self.reads_x:
            return super().backward(dy)
        return (dy * kept,)
