"""One weight, block of rows by block of rows: there and back. What is done with a block is the caller's affair.

For each block of W, in the dtype that is wide enough to compute in:

    d = D's rows            x = kappa W + d            W' = x rounded            p = (W' - d) / kappa rounded, about W

and the correction leads from p to W (`correction`). Blocks share nothing: a weight of any size needs the memory of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy

from ...errors import StateError
from .arithmetic import Rows, blocks, rows_of_block
from .correction import decode, encode
from .report import Sums
from .rounding import random_bits, stochastic

__all__ = ["Block", "merged_blocks", "not_finite", "unmerged_blocks"]


class Block(NamedTuple):
    """Rows `low` to `high` of W and of W', and what the way back from there needs: b"" if it is not asked for."""

    low: int
    high: int
    before: numpy.ndarray
    after: numpy.ndarray
    correction: bytes


def merged_blocks(W: numpy.ndarray, D: Rows, dtype: Any, wide: Any, rounding: str = "nearest", seed: int = 0, stream: int = 0,
                  sums: Sums | None = None, way_back: bool = True) -> Iterator[Block]:
    """W' = round(kappa W + D), in blocks. To be run with numpy's warnings off: what is not finite is found here.

    Parameters
    ----------
    W : ndarray, shape (out, in)
        On the host; it may lie in a file.
    D : Rows
    dtype, wide : dtype
        Of W', and to compute in.
    rounding : {"nearest", "stochastic"}
    seed, stream : int
    sums : Sums, optional
        Takes in every block, for a report.
    way_back : bool
        Compute the corrections too.

    Raises
    ------
    StateError
        If W' would hold NaN or inf.
    """
    for low, high in blocks(W.shape, rows_of_block(W.shape)):
        w = numpy.ascontiguousarray(W[low:high], W.dtype.newbyteorder("="))
        w_wide = w.astype(wide, copy=False)
        d = D.rows(low, high)
        x = D.onto(w_wide, d, low, high)
        if rounding == "nearest":
            m = x.astype(dtype, copy=False)
        else:
            bits = random_bits(low * W.shape[1], high * W.shape[1], seed, stream)
            m = stochastic(x, dtype, bits.reshape(x.shape))
        m_wide = m.astype(wide, copy=False)
        if not numpy.isfinite(m_wide).all():
            raise not_finite("weight", {**D.parts, "weight": W}, f"W + s B A overflows {dtype}")
        if sums is not None:
            sums.add(w_wide, m_wide, d if D.kappa is None else x - w_wide, half=m.dtype.itemsize == 2)
        data = encode(w, D.off(m_wide, d, low, high).astype(w.dtype, copy=False)) if way_back else b""
        yield Block(low, high, w, m, data)


def unmerged_blocks(merged: numpy.ndarray, D: Rows, dtype: Any, wide: Any, rows: int, data: memoryview) -> Iterator[Block]:
    """The W that `merged_blocks` was given, from W', the same D and the corrections, one behind the other.

    Raises
    ------
    StateError
        If the corrections are damaged.
    """
    for low, high in blocks(merged.shape, rows):
        m = numpy.ascontiguousarray(merged[low:high], merged.dtype.newbyteorder("="))
        near = D.off(m.astype(wide, copy=False), D.rows(low, high), low, high).astype(dtype, copy=False)
        try:
            w, data = decode(data, near)
        except ValueError as error:
            raise StateError(f"unmerge: {error}") from error
        yield Block(low, high, w, m, b"")


def not_finite(what: str, parts: Mapping[str, numpy.ndarray], otherwise: str) -> StateError:
    """The error for a merged weight or bias that would not be finite: it names the part that is not, if there is one."""
    culprit = next((name for name, array in parts.items() if not numpy.isfinite(array).all()), f"none of them: {otherwise}")
    return StateError(f"merge: the merged {what} would hold NaN or inf (found in: {culprit}). Nothing was changed")
