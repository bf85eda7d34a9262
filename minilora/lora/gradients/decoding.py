"""Matrices that come in groups and are walked block by block; a weight held in low precision as one of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...ops.conv import by_group
from ...stored import Stored, Transposed

__all__ = ["Decoding", "blocks", "grouped"]

Array = Any


class Decoding:
    """A matrix held in low precision, as one group (1, out, n): a block of it is decoded when it is read. Never trained."""

    def __init__(self, W: Stored) -> None:
        self.W, self.shape, self.dtype = W, (1, *W.shape), W.dtype
        self.strides = (0, 1, W.shape[0]) if isinstance(W, Transposed) else (0, W.shape[1], 1)  # along which rows it is held

    def swapaxes(self, one: int, other: int) -> Decoding:
        return Decoding(self.W.T)

    def __getitem__(self, place: tuple[slice, slice]) -> Array:
        return self.W[place[1]][None]

    def add_products(self, dA: Array | None, dB: Array | None, left: Array, A: Array) -> None:
        """dA += left W and dB += W A^T, of those that are not None, in the dtype of `left`; left (1, r, out), A (1, r, n)."""
        W = self.W.astype(left.dtype)
        if dA is not None:
            dA[0] += W.after(left[0])
        if dB is not None:
            dB[0] += W.after_transposed(A[0]).T


def blocks(shape: tuple[int, int, int], at_once: int) -> Iterator[tuple[slice, slice]]:
    """Matrices (groups, p, q) in parts [groups, rows] of about `at_once` elements: whole matrices, or rows of one."""
    groups, p, q = shape
    some, step = max(1, at_once // max(1, p * q)), max(1, at_once // max(1, q))
    return ((slice(g, g + some), slice(k, k + step)) for g in range(0, groups, some) for k in range(0, p, step))


def grouped(W: Array, groups: int) -> Any:
    """A matrix in equal parts (groups, out / groups, n): a view."""
    return Decoding(W) if isinstance(W, Stored) else by_group(W, groups)
