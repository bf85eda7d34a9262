"""CPU: elementwise work in blocks that stay in the cache, so that a chain of passes costs one walk over memory.

On one thread. A second one, measured on two cores, won a quarter on Adam alone but nothing in a training step: OpenBLAS keeps
its own threads spinning for tens of milliseconds after a product, and they occupy the cores that ours would need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy

from ..backend import override
from ..optim.adam import adam_update

__all__ = ["adam_update_blocked"]

Array = Any

# Elements of a block. Five float32 arrays of 2^17 fill 2.5 MB, about one core's second-level cache. A quarter of that costs
# a tenth more in calls, twice that leaves the cache.
BLOCK = 1 << 17


def in_blocks(work: Callable[..., None], arrays: tuple[Array, ...], *settings: float) -> None:
    """Call ``work(scratch, *blocks, *settings)`` on every block of some flat arrays of one size and dtype."""
    n = arrays[0].size
    scratch = numpy.empty(min(BLOCK, n), arrays[0].dtype)
    for low in range(0, n, BLOCK):
        high = min(low + BLOCK, n)
        work(scratch[:high - low], *(a[low:high] for a in arrays), *settings)


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
