"""GPU: heads put in the order in which cuBLAS takes them, and back. The CUDA text is in rows.cu.

cuBLAS multiplies stacks of matrices that are evenly spaced. The heads of several texts are not, where a token's heads lie side
by side, as projections give them; nor are the queries of some tokens under each other, where several heads share keys. One
kernel moves them: into matrices (texts, heads, tokens, hd), for one block of queries after the other. What is in order as it
is, such as the heads of a single text or a cache of keys, stays where it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..launch import by_row

__all__ = ["Rooms", "even", "in_order", "move_packed", "pieces", "queries"]

Array = Any
Blocks = Sequence[tuple[slice, slice]]  # queries and the keys they may see; the first queries come last

WIDE = 16  # bytes that a thread moves at once, if all heads begin at such places


def even(x: Array) -> bool:
    """Whether the matrices of x (..., n, i) are evenly spaced, and each has its rows one after the other."""
    *steps, down, right = (step // x.itemsize for step in x.strides)
    *lead, n, i = x.shape
    if i > 1 and right != 1 or n > 1 and down < i:
        return False
    axes = [(size, step) for size, step in zip(lead, steps) if size > 1]
    return all(step == size * inner for (_, step), (size, inner) in zip(axes, axes[1:])) and (not axes or axes[-1][1] > 0)


def piled(x: Array, g: int, blocks: Blocks) -> bool:
    """Whether each block of queries of x (..., H, T, hd) is in order, with those of g heads under each other."""
    if not even(x):
        return False
    return g == 1 or len(blocks) == 1 and (x.shape[-2] == 1 or x.strides[-3] == x.shape[-2] * x.strides[-2])


def laid(x: Array) -> tuple[Array, tuple[int, int, int]] | None:
    """The memory of x (..., H, T, hd) in C order, and its steps from text to text, token and head; None in another order."""
    H, T, hd = x.shape[-3:]
    if x.flags.c_contiguous:
        return x, (H * T * hd, hd, T * hd)
    turned = x.swapaxes(-3, -2)
    return (turned, (H * T * hd, H * hd, hd)) if turned.flags.c_contiguous else None


def in_order(xp: Any, x: Array) -> Array:
    """x (..., H, T, hd) itself if it is `even`, else a copy in C order."""
    if even(x):
        return x
    memory = laid(x)
    if memory is None:
        return xp.ascontiguousarray(x)
    copy = xp.empty(x.shape, dtype=x.dtype)
    _move("split_heads", memory, copy, x.shape, x.shape[-2])
    return copy


def queries(xp: Any, x: Array, blocks: Blocks, g: int) -> list[Array]:
    """The blocks of x (..., H, T, hd), as `piled` wants them: views, or pieces of a copy."""
    if piled(x, g, blocks):
        return [x[..., rows, :] for rows, _ in blocks]
    memory = laid(x)
    if memory is None:
        return queries(xp, xp.ascontiguousarray(x), blocks, g)
    copy = xp.empty(x.size, dtype=x.dtype)
    _move("split_heads", memory, copy, x.shape, blocks[-1][0].stop)
    return pieces(copy, x.shape, blocks)


def pieces(flat: Array, shape: tuple[int, ...], blocks: Blocks) -> list[Array]:
    """The blocks of queries (..., H, T, hd) whose numbers lie at the beginning of `flat` in this order."""
    *lead, H, T, hd = shape
    a_token = math.prod(lead) * H * hd
    return [flat[rows.start * a_token:rows.stop * a_token].reshape(*lead, H, rows.stop - rows.start, hd) for rows, _ in blocks]


class Rooms:
    """Where the blocks of a result (..., H, T, hd) are written, `parts`: in the array itself, or beside it until `done`."""

    def __init__(self, xp: Any, target: Array | None, blocks: Blocks, g: int) -> None:
        self.target: Any = target
        self.size = blocks[-1][0].stop
        self.flat: Array = None
        self.inner: Rooms | None = None
        self.parts: Sequence[Array | None]
        if target is None:
            self.parts = [None] * len(blocks)
        elif piled(target, g, blocks):
            self.parts = [target[..., rows, :] for rows, _ in blocks]
        elif laid(target):
            self.flat = xp.empty(target.size, dtype=target.dtype)
            self.parts = pieces(self.flat, target.shape, blocks)
        else:
            self.inner = Rooms(xp, xp.empty(target.shape, dtype=target.dtype), blocks, g)
            self.parts = self.inner.parts

    def done(self) -> None:
        if self.inner is not None:
            self.inner.done()
            self.target[...] = self.inner.target
        elif self.flat is not None:
            _move("join_heads", laid(self.target), self.flat, self.target.shape, self.size)


def move_packed(kernel: str, packed: Array, flat: Array, heads: tuple[int, int], size: int) -> None:
    """Split qkv (..., T, (H + 2 KV) hd), in C order, into `flat`, or join it from there."""
    *lead, T, width = packed.shape
    (H, KV), hd = heads, width // (heads[0] + 2 * heads[1])
    _start(kernel, packed, flat, math.prod(lead), T, size, H, KV, hd, (T * width, width, hd))


def _move(kernel: str, memory: Any, flat: Array, shape: tuple[int, ...], size: int) -> None:
    """Bring what is `laid` out as x (..., H, T, hd) into the order of `pieces`, or back from there."""
    *lead, H, T, hd = shape
    _start(kernel, memory[0], flat, math.prod(lead), T, size, H, 0, hd, memory[1])


def _start(kernel: str, x: Array, flat: Array, texts: int, T: int, size: int, H: int, KV: int, hd: int,
           steps: tuple[int, int, int]) -> None:
    at_once = WIDE // x.itemsize
    wide = hd % at_once == 0 and x.data.ptr % WIDE == 0 and flat.data.ptr % WIDE == 0
    unit = at_once if wide else 1
    source, target = (x, flat) if kernel == "split_heads" else (flat, x)
    by_row(kernel, texts * T, (H + 2 * KV) * hd // unit, x.dtype, source, target, int(wide), T, size, H, KV, hd // unit,
           *(step // unit for step in steps))
