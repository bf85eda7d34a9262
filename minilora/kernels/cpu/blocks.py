"""How the CPU's versions walk over memory: in blocks that stay in a core's second-level cache from pass to pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy

from ...ops.few import few

__all__ = ["BLOCK", "in_blocks", "row_blocks", "scratch"]

Array = Any

# Elements of a block. Five float32 arrays of 2^17 fill 2.5 MB, about one core's second-level cache. A quarter of that costs
# a tenth more in calls, twice that leaves the cache.
BLOCK = 1 << 17

SMALL = 1 << 16  # bytes that are not worth finding a cache line for
LINE = 64  # bytes of a cache line, and of a vector of AVX-512: where arrays start at one, passes take 1/2 to 9/10 of the time


def in_blocks(work: Callable[..., None], arrays: tuple[Array, ...], *settings: float, scratches: int = 1,
              block: int = BLOCK) -> None:
    """Call ``work(*scratches, *blocks, *settings)`` on every block of some flat arrays of one size and dtype."""
    n = arrays[0].size
    size = min(block, n)
    room = scratch(scratches * size, arrays[0]).reshape(scratches, size)
    for low in few(range(0, n, block), arrays[0]):
        high = min(low + block, n)
        work(*room[:, :high - low], *(a[low:high] for a in arrays), *settings)


def row_blocks(x: Array, block: int) -> Iterator[slice]:
    """Slices of so many whole rows of a matrix that they hold about `block` elements."""
    rows, columns = x.shape
    step = max(1, block // max(1, columns))
    for low in few(range(0, rows, step), x):
        yield slice(low, min(low + step, rows))


def scratch(size: int, x: Array) -> Array:
    """Memory to compute in, for so many numbers of the dtype of x, in an array of its kind: never part of a result."""
    nbytes = size * x.dtype.itemsize
    if nbytes < SMALL:
        return numpy.empty(size, x.dtype, like=x)
    memory = numpy.empty(nbytes + LINE, numpy.uint8, like=x)
    start = -memory.ctypes.data % LINE
    return memory[start:start + nbytes].view(x.dtype)
