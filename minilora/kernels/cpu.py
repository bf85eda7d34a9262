"""CPU: elementwise work in blocks that stay in the cache, spread over the cores.

NumPy's ufuncs release the interpreter lock while they compute, so plain threads run them side by side.
"""

from __future__ import annotations

import contextvars
import os
from collections.abc import Callable
from typing import Any

import numpy

from ..backend import override
from ..optim.adam import adam_update

__all__ = ["adam_update_blocked"]

Array = Any

# Elements of a block. Five float32 arrays of 2^17 fill 2.5 MB, about one core's second-level cache; smaller blocks lose more
# to the interpreter lock between calls than they win (measured: 2^15 is 1.7 times slower with two threads, 2^18 equal).
BLOCK = 1 << 17

_pool: Any = None  # made at the first large array: importing starts no thread


def _forget_pool() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)  # threads do not survive a fork


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_blocks(work: Callable[..., None], arrays: tuple[Array, ...], *settings: float) -> None:
    """Call ``work(scratch, *blocks, *settings)`` on every block of some flat arrays of one size, on all cores.

    Each core takes one stretch of the arrays and walks it block by block with one scratch array of its own. The result does
    not depend on the number of cores, since every element is computed on its own.
    """
    global _pool
    n = arrays[0].size
    stretches = max(1, min(cores(), n // BLOCK))
    bounds = [n * i // stretches for i in range(stretches + 1)]

    def walk(start: int, stop: int) -> None:
        scratch = numpy.empty(min(BLOCK, stop - start), arrays[0].dtype)
        for low in range(start, stop, BLOCK):
            high = min(low + BLOCK, stop)
            work(scratch[:high - low], *(a[low:high] for a in arrays), *settings)

    if stretches == 1:
        return walk(0, n)
    if _pool is None:
        from concurrent.futures import ThreadPoolExecutor  # 5 ms, paid only by who needs it
        _pool = ThreadPoolExecutor(cores(), thread_name_prefix="minilora")
    # Each thread runs in a copy of the caller's context, where NumPy keeps what numpy.errstate says.
    others = [_pool.submit(contextvars.copy_context().run, walk, low, high) for low, high in zip(bounds[1:-1], bounds[2:])]
    walk(bounds[0], bounds[1])
    for other in others:
        other.result()


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
