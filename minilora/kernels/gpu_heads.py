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

from .launch import by_row

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


def in_order(xp: Any, x: Array) -> Array:
    """x (..., H, T, hd) itself if it is `even`, else a copy in C order."""
    if even(x):
        return x
    copy = xp.empty(x.shape, dtype=x.dtype)
    _move(xp, "split_heads", x, copy, max(1, x.shape[-2]))
    return copy


def queries(xp: Any, x: Array, blocks: Blocks, g: int) -> list[Array]:
    """The blocks of x (..., H, T, hd), as `piled` wants them: views, or pieces of a copy."""
    if piled(x, g, blocks):
        return [x[..., rows, :] for rows, _ in blocks]
    copy = xp.empty(x.size, dtype=x.dtype)
    _move(xp, "split_heads", x, copy, blocks[-1][0].stop)
    return pieces(copy, x.shape, blocks)


def pieces(flat: Array, shape: tuple[int, ...], blocks: Blocks) -> list[Array]:
    """The blocks of queries (..., H, T, hd) whose numbers lie at the beginning of `flat` in this order."""
    *lead, H, T, hd = shape
    a_token = math.prod(lead) * H * hd
    return [flat[rows.start * a_token:rows.stop * a_token].reshape(*lead, H, rows.stop - rows.start, hd) for rows, _ in blocks]


class Rooms:
    """Where the blocks of a result (..., H, T, hd) are written: `parts`, in the array itself or beside it. `done` moves them."""

    def __init__(self, xp: Any, target: Array | None, blocks: Blocks, g: int) -> None:
        self.xp, self.target, self.size = xp, target, blocks[-1][0].stop
        self.flat: Array = None
        self.parts: Sequence[Array | None]
        if target is None:
            self.parts = [None] * len(blocks)
        elif piled(target, g, blocks):
            self.parts = [target[..., rows, :] for rows, _ in blocks]
        else:
            self.flat = xp.empty(target.size, dtype=target.dtype)
            self.parts = pieces(self.flat, target.shape, blocks)

    def done(self) -> None:
        if self.flat is not None:
            _move(self.xp, "join_heads", self.target, self.flat, self.size)


def move_packed(kernel: str, packed: Array, flat: Array, heads: tuple[int, int], size: int) -> None:
    """Split qkv (..., T, (H + 2 KV) hd), in C order, into `flat`, or join it from there."""
    *lead, T, width = packed.shape
    (H, KV), hd = heads, width // (heads[0] + 2 * heads[1])
    _start(kernel, packed, flat, math.prod(lead), T, size, H, KV, hd, (T * width, width, hd))


def _move(xp: Any, kernel: str, x: Array, flat: Array, size: int) -> None:
    """Bring x (..., H, T, hd) into order, or back from there; memory in other orders than the usual two takes a copy more."""
    *lead, H, T, hd = x.shape
    steps, spare = (H * T * hd, hd, T * hd), None
    base = x if x.flags.c_contiguous else x.swapaxes(-3, -2)
    if base is not x and base.flags.c_contiguous:
        steps = H * T * hd, H * hd, hd
    elif base is not x:
        base = spare = xp.ascontiguousarray(x) if kernel == "split_heads" else xp.empty(x.shape, dtype=x.dtype)
    _start(kernel, base, flat, math.prod(lead), T, size, H, 0, hd, steps)
    if kernel == "join_heads" and spare is not None:
        x[...] = spare


def _start(kernel: str, x: Array, flat: Array, texts: int, T: int, size: int, H: int, KV: int, hd: int,
           steps: tuple[int, int, int]) -> None:
    at_once = WIDE // x.itemsize
    wide = hd % at_once == 0 and x.data.ptr % WIDE == 0 and flat.data.ptr % WIDE == 0
    unit = at_once if wide else 1
    source, target = (x, flat) if kernel == "split_heads" else (flat, x)
    by_row(kernel, texts * T, (H + 2 * KV) * hd // unit, x.dtype, source, target, int(wide), T, size, H, KV, hd // unit,
           *(step // unit for step in steps))
