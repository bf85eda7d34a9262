"""Layer normalisation on the CPU: some rows at a time, whose passes stay in the cache."""

from __future__ import annotations

from typing import Any

import numpy

from ...backend import override
from ...ops.linear import rows
from ...ops.norm import LayerNorm
from .blocks import BLOCK, row_blocks

__all__ = ["BlockedLayerNorm"]

Array = Any


@override(LayerNorm, device="cpu")
class BlockedLayerNorm(LayerNorm):
    """`LayerNorm` in one walk over memory each way, with sums along rows as products."""

    block = BLOCK // 2

    def forward(self, x: Array, w: Array | None, b: Array | None) -> Array:
        if x.dtype.char not in "fd":
            self.kernel = ""
            return super().forward(x, w, b)
        self.in_shape = x.shape
        x2 = rows(x)
        y = numpy.empty(x2.shape, x.dtype, like=x)
        mean, rstd = numpy.empty((2, len(x2), 1), x.dtype, like=x)
        D = x2.shape[1]
        ones = numpy.ones(D, x.dtype, like=x)
        for part in row_blocks(x2, self.block):
            out, m, q = y[part], mean[part], rstd[part]
            numpy.dot(x2[part], ones, out=m[:, 0])
            m /= D
            numpy.subtract(x2[part], m, out=out)
            numpy.vecdot(out, out, out=q[:, 0])
            q /= D
            q += self.eps
            numpy.sqrt(q, out=q)
            numpy.divide(1.0, q, out=q)
            out *= q
            if w is not None:
                out *= w
            if b is not None:
                out += b
        if self.needs[0] or self.needs[1]:
            self.save(x, mean, rstd, w if self.needs[0] else None)
        return y.reshape(x.shape)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        if self.needs[1] or not self.needs[0] or dy.dtype.char not in "fd":
            return super().backward(dy)
        x, mean, rstd, w = self.saved
        x, dy = rows(x), rows(dy)
        dx = numpy.empty(self.in_shape, x.dtype, like=x)
        dx2 = rows(dx)
        for part in row_blocks(x, self.block):
            self._block(x[part], dy[part], mean[part], rstd[part], w, dx2[part])
        return dx, None, dy.sum(axis=0) if self.needs[2] else None

    def _block(self, x: Array, dy: Array, mean: Array, rstd: Array, w: Array | None, g: Array) -> None:
        # dx = rstd (g - mean(g) - (x - mean) rstd^2 mean(g (x - mean))), written where g stands
        centred = x - mean
        if w is None:
            g[...] = dy
        else:
            numpy.multiply(dy, w, out=g)
        along = numpy.vecdot(g, centred)[:, None]
        along *= rstd
        along *= rstd
        along /= -x.shape[1]
        level = numpy.dot(g, numpy.full((g.shape[1], 1), 1.0 / g.shape[1], g.dtype, like=g))
        centred *= along
        g -= level
        g += centred
        g *= rstd
