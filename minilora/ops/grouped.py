"""Matrices in equal groups of rows, as convolutions with groups have them; those of a weight held in low precision too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .. import stored
from ..stored import Stored

__all__ = ["Grouped", "blocks", "by_group", "product"]

Array = Any


def product(a: Array, b: Array, xp: Any, out: Array | None = None) -> Array:
    """a (G, p, q) times b (G, q, s), matrix by matrix."""
    if isinstance(a, (Grouped, Turned)):
        return a.times(b, xp, xp.empty((*a.shape[:2], b.shape[2]), dtype=b.dtype) if out is None else out)
    if len(a) == 1:
        return xp.dot(a[0], b[0], out=None if out is None else out[0])[None]
    if a.shape[2] == 1:
        return xp.multiply(a, b, out=out)  # NumPy's matmul leaves BLAS when the inner length is 1
    return xp.matmul(a, b, out=out)


def by_group(matrix: Array, groups: int) -> Any:
    """The rows of a matrix (p, q) in equal parts (groups, p / groups, q): a view."""
    if isinstance(matrix, Stored):
        return Grouped(matrix, groups)
    return matrix.reshape(groups, matrix.shape[0] // groups, matrix.shape[1])


def blocks(shape: tuple[int, int, int], at_once: int) -> Iterator[tuple[slice, slice]]:
    """Matrices (groups, p, q) in parts [groups, rows] of about `at_once` elements: whole matrices, or rows of one."""
    groups, p, q = shape
    some, step = max(1, at_once // max(1, p * q)), max(1, at_once // max(1, q))
    return ((slice(g, g + some), slice(k, k + step)) for g in range(0, groups, some) for k in range(0, p, step))


class Grouped:
    """A matrix held in low precision as matrices (groups, p, q): a block is decoded when it is read. Never trained.

    Parameters
    ----------
    W : Stored, shape (groups p, q)
    groups : int
    """

    def __init__(self, W: Stored, groups: int) -> None:
        self.W, self.dtype = W, W.dtype
        self.shape = groups, W.shape[0] // groups, W.shape[1]
        self.strides = (0, 1, W.shape[0]) if W.by_columns else (0, W.shape[1], 1)  # in which order it is best walked through

    def __len__(self) -> int:
        return self.shape[0]

    def swapaxes(self, one: int, other: int) -> Grouped | Turned:
        """The last two exchanged: each matrix transposed."""
        return Grouped(self.W.T, 1) if len(self) == 1 else Turned(self)

    def __getitem__(self, place: tuple[slice, slice]) -> Array:
        """``[groups, rows]`` as an array: whole matrices, or rows of one, as `blocks` names them."""
        (some, rows), (_, p, q) = (range(n)[at] for n, at in zip(self.shape, place)), self.shape
        if len(some) == 1:
            return self.W.rows(some.start * p + rows.start, some.start * p + rows.stop)[None]
        return self.W.rows(some.start * p, some.stop * p).reshape(len(some), p, q)[:, place[1]]

    def times(self, b: Array, xp: Any, out: Array) -> Array:
        """Their products with b (groups, q, s), written into `out` (groups, p, s)."""
        for some, rows in blocks(self.shape, stored.TILE):
            xp.matmul(self[some, rows], b[some], out=out[some, rows])
        return out


class Turned:
    """The matrices of a `Grouped`, each transposed: what products need of them."""

    def __init__(self, matrices: Grouped) -> None:
        self.matrices, self.dtype = matrices, matrices.dtype
        self.shape = matrices.shape[0], matrices.shape[2], matrices.shape[1]

    def times(self, b: Array, xp: Any, out: Array) -> Array:
        """Their products with b (groups, p, s), written into `out` (groups, q, s): sums over rows that are decoded in turn."""
        out.fill(0.0)
        for some, rows in blocks(self.matrices.shape, stored.TILE):
            out[some] += xp.matmul(self.matrices[some, rows].swapaxes(1, 2), b[some, rows])
        return out
