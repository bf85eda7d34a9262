"""Products with a weight held in low precision that DoRA's lengths need; it is decoded some rows at a time."""

from __future__ import annotations

from typing import Any

from ... import stored
from ...ops.grouped import Grouped, blocks

__all__ = ["add_products"]

Array = Any


def add_products(W: Grouped, dA: Array | None, dB: Array | None, left: Array, A: Array) -> None:
    """dA += left W and dB += W A^T, of those that are not None, in the dtype of `left`.

    W (G, p, q), left (G, r, p), A (G, r, q).
    """
    if len(W) == 1:  # in the order in which it is held
        whole = W.W.astype(left.dtype)
        if dA is not None:
            dA[0] += whole.after(left[0])
        if dB is not None:
            dB[0] += whole.after_transposed(A[0]).T
        return
    xp = W.W.device.xp
    for some, rows in blocks(W.shape, stored.TILE):
        part = W[some, rows].astype(left.dtype, copy=False)
        if dA is not None:
            dA[some] += xp.matmul(left[some, :, rows], part)
        if dB is not None:
            dB[some, rows] += xp.matmul(part, A[some].swapaxes(1, 2))
