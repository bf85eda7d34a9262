"""CPU: elementwise work in blocks that stay in the cache, so that a chain of passes costs one walk over memory.

On one thread. A second one, measured on two cores, won a quarter on Adam alone but nothing in a training step: OpenBLAS keeps
its own threads spinning for tens of milliseconds after a product, and they occupy the cores that ours would need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy

from ..backend import override
from ..ops.activation import GELU
from ..ops.cross_entropy import LinearCrossEntropy
from ..optim.adam import adam_update

__all__ = ["BlockedGELU", "BlockedLinearCrossEntropy", "adam_update_blocked"]

Array = Any

# Elements of a block. Five float32 arrays of 2^17 fill 2.5 MB, about one core's second-level cache. A quarter of that costs
# a tenth more in calls, twice that leaves the cache.
BLOCK = 1 << 17


def in_blocks(work: Callable[..., None], arrays: tuple[Array, ...], *settings: float, scratches: int = 1,
              block: int = BLOCK) -> None:
    """Call ``work(*scratches, *blocks, *settings)`` on every block of some flat arrays of one size and dtype."""
    n = arrays[0].size
    scratch = numpy.empty((scratches, min(block, n)), arrays[0].dtype)
    for low in range(0, n, block):
        high = min(low + block, n)
        work(*scratch[:, :high - low], *(a[low:high] for a in arrays), *settings)


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
    """`GELU` in one walk over memory each way; the reference makes a new array for each of its passes."""

    def forward(self, x: Array) -> Array:
        if x.dtype.kind != "f" or not x.flags.c_contiguous:
            return super().forward(x)
        self.save(x)
        y = numpy.empty_like(x)
        in_blocks(self._forward_block, (x.reshape(-1), y.reshape(-1)), scratches=1, block=BLOCK // 2)
        return y

    def _tanh_block(self, near: Array, th: Array, x: Array) -> None:
        """near = x within [-10, 10], th = tanh(c near (1 + a near^2))."""
        numpy.clip(x, -10.0, 10.0, out=near)
        numpy.multiply(near, near, out=th)
        th *= self.c * self.a
        th += self.c
        th *= near
        numpy.tanh(th, out=th)

    def _forward_block(self, t: Array, x: Array, y: Array) -> None:
        self._tanh_block(t, y, x)
        y += 1.0
        y *= x
        y *= 0.5

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        (x,) = self.saved
        if x.dtype.kind != "f" or not (x.flags.c_contiguous and dy.flags.c_contiguous):
            return super().backward(dy)
        dx = numpy.empty_like(x)
        in_blocks(self._backward_block, (x.reshape(-1), dy.reshape(-1), dx.reshape(-1)), scratches=2, block=BLOCK // 2)
        return (dx,)

    def _backward_block(self, t: Array, th: Array, x: Array, dy: Array, dx: Array) -> None:
        # dx = dy ((1 + th) + x (1 - th^2) c (1 + 3 a near^2)) / 2
        self._tanh_block(t, th, x)
        numpy.multiply(t, t, out=dx)
        dx *= 3.0 * self.a * self.c
        dx += self.c
        dx *= x
        numpy.multiply(th, th, out=t)
        numpy.subtract(1.0, t, out=t)
        dx *= t
        dx += th
        dx += 1.0
        dx *= dy
        dx *= 0.5


@override(LinearCrossEntropy, device="cpu")
class BlockedLinearCrossEntropy(LinearCrossEntropy):
    """`LinearCrossEntropy` that turns logits into gradients a few rows at a time: they stay in the cache from pass to pass."""

    def finish(self, z: Array, labels: Array, weights: Array) -> Array:
        step = max(1, BLOCK // z.shape[1])
        parts = [slice(i, i + step) for i in range(0, z.shape[0], step)]
        return sum(super(BlockedLinearCrossEntropy, self).finish(z[part], labels[part], weights[part]) for part in parts)
