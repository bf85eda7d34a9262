"""Exact GELU on the CPU: the normal distribution function out of a table, in float32.

Phi from plain ufuncs takes two exponentials, each as long as a dozen other passes, and forty passes more. Here Phi and its
density p stand in a table at points x0 that are 1/512 apart, and Taylor's series leads from the nearest one to x. Since
p(x) = p(x0) e^-q with q = (x^2 - x0^2) / 2,

    p(x) = p(x0) (1 - q (1 - q/2)) + ...        Phi(x) = Phi(x0) + p(x0) (x - x0) (1 - q/2) + ...

What both leave out is a share of about |q|^3 / 6, of p and of Phi on the left. As |x - x0| <= 1/1024, that is 1e-8 where
|x| < 4, a tenth of a rounding error, and 2.9 eps at x = -13, where Phi leaves float32's normal numbers. Nothing cancels.

Adding a power of two whose last bit is worth 1/512 rounds x to x0, and leaves the place in the table in the sum's last bits.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy

from ...backend import override
from ...ops.activation import ExactGELU
from ...ops.erf import normal
from .blocks import BLOCK, in_blocks

__all__ = ["TabulatedExactGELU"]

Array = Any

STEPS = 512  # points in a unit of x
END = 16  # the table starts at -END; from -15 down, Phi and p are 0 in float32, and from 15 up 1 and 0
POINTS = 2 * END * STEPS  # a power of two
RAISED = 2 ** 23 // STEPS + END  # x + RAISED has a last bit of 1 / STEPS, and k in the last bits at the point -END + k / STEPS


@functools.cache
def table() -> tuple[Array, Array]:
    """Phi, and a quarter of its density, at the points -END + k / STEPS: 64 kB each."""
    x = numpy.arange(POINTS) / STEPS - END
    phi, bell = normal(x, numpy)
    return phi.astype("float32"), (bell * (ExactGELU.density / 4.0)).astype("float32")


@override(ExactGELU, device="cpu")
class TabulatedExactGELU(ExactGELU):
    """`ExactGELU` in one walk over memory each way. Keeps dy/dx in the place of x, in as many bytes: backward is a product."""

    def forward(self, x: Array) -> Array:
        if x.dtype.char != "f" or not x.flags.c_contiguous:
            self.kernel = ""
            return super().forward(x)
        made = [numpy.empty_like(x) for _ in range(2 if self.needs[0] else 1)]
        # Smaller blocks would stay in a nearer cache, and cost more in calls than that gains.
        in_blocks(self._block, tuple(a.reshape(-1) for a in (x, *made)), scratches=5, block=BLOCK // 2)
        if self.needs[0]:
            self.save(made[1])
        return made[0]

    def _block(self, near: Array, point: Array, step: Array, phi: Array, p: Array, x: Array, y: Array,
               slope: Array | None = None) -> None:
        numpy.clip(x, 1.0 - END, END - 1.0, out=near)
        numpy.add(near, RAISED, out=point)
        places = numpy.bitwise_and(point.view("int32"), POINTS - 1).astype(numpy.intp)
        for column, values in zip(table(), (phi, p)):
            numpy.take(column, places, out=values, mode="wrap")  # the fastest way: all are in the table, those of NaN too
        point -= RAISED
        numpy.subtract(near, point, out=step)
        point += near
        point *= step  # 2 q, of which 1 - q/2 is a quarter of 4 - 2 q
        numpy.subtract(4.0, point, out=y)
        step *= p
        step *= y
        phi += step
        if slope is not None:  # Phi + x p, with 1 - q (1 - q/2) as an eighth of 8 - 2 q (4 - 2 q)
            point *= y
            numpy.subtract(8.0, point, out=point)
            point *= 0.5
            point *= p
            point *= near
            numpy.add(phi, point, out=slope)
        numpy.multiply(x, phi, out=y)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        (kept,) = self.saved
        if kept.dtype.char != "f" or not kept.flags.c_contiguous:
            return super().backward(dy)  # kept is x
        return (numpy.multiply(dy, kept, out=kept),)  # in its place: nobody else has seen it, and it is used once
