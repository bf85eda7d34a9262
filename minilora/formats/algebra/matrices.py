"""An update of a file as matrices in factored form, and back.

D of a linear layer is (out, in), of an embedding (d, V), of a convolution (out, C_in * kernel). With groups B reads of z its
own group's part only: D is then one such matrix for each group, of its own rows, and what is calculated is calculated for each;
an ordinary layer has one group. Factors are widened to float64, which is exact, and rounded once, when they are stored again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy

from ...errors import FormatError, StateError
from ...lora.algebra.combine import cat
from ...lora.algebra.factors import LowRank
from ..adapters.saved import Update

__all__ = ["blocks_of", "layer_of", "of_a_group", "stored", "summed", "touched", "widest"]

Array = Any


def blocks_of(update: Update) -> list[LowRank]:
    """D of each group, in float64; `StateError` for NaN and inf, of which no norm or SVD can be had."""
    bad = [name for name, factor in (("A", update.A), ("B", update.B)) if not numpy.isfinite(factor).all()]
    if bad:
        raise StateError(f"{' and '.join(bad)} {'hold' if len(bad) > 1 else 'holds'} NaN or inf")
    A = update.A.reshape(update.r, -1).astype("float64")
    B = update.B.reshape(len(update.B), -1).astype("float64")
    groups = layer_of(update)[1]
    parts = zip(numpy.split(A, groups), numpy.split(B, groups))
    return [LowRank(a, b, update.s) for a, b in parts]


def layer_of(update: Update) -> tuple[str, int, int, tuple[int, ...]]:
    """What two updates of one layer have in common: kind, groups, out, inputs (with the kernel)."""
    return update.kind, max(1, update.r // max(1, update.B.shape[1])), len(update.B), tuple(update.A.shape[1:])


def of_a_group(rank: int | None, groups: int) -> int | None:
    """The rank of one group, of a rank of the whole layer: at least 1."""
    return None if rank is None else max(1, rank // groups)


def summed(sources: Sequence[Sequence[LowRank]], weights: Sequence[float]) -> list[LowRank]:
    """sum_i w_i D_i of each group, exactly."""
    return [cat(parts, weights) for parts in zip(*sources)]


def touched(sources: Sequence[Sequence[LowRank]]) -> list[tuple[Array, Array]]:
    """For each group, which rows and which columns of D any of the sources can change.

    A sum is 0 outside of them. What an SVD makes of a 0 there is a rounding error: a token that no adapter has ever seen would
    get an update, and a convolution with groups would read another group's channels.
    """
    return [(numpy.any([part.B.any(axis=1) for part in parts], axis=0),
             numpy.any([part.A.any(axis=0) for part in parts], axis=0)) for parts in zip(*sources)]


def stored(blocks: Sequence[LowRank], like: Update, dtype: Any, where: Sequence[tuple[Array, Array]]) -> tuple[Update, float]:
    """Groups as one update of a file, and how far rounding the factors to `dtype` has moved D.

    Parameters
    ----------
    blocks : sequence of LowRank
        In float64, with one s for all. Where their ranks differ, zeros fill up.
    like : Update
        The kind of the layer, and its shapes but for the rank.
    dtype : dtype
    where : sequence of (rows, columns)
        Of `touched`: the rest is set to 0.

    Raises
    ------
    FormatError
        If a number is too large for `dtype`.
    """
    r, factors, s = max(block.r for block in blocks), [], blocks[0].s
    for block, (rows, columns) in zip(blocks, where):
        A, B = numpy.zeros((r, block.shape[1])), numpy.zeros((block.shape[0], r))
        A[:block.r], B[:, :block.r] = block.A * columns, block.B * rows[:, None]
        factors.append((_rounded(A, dtype), _rounded(B, dtype)))
    A, B = numpy.concatenate([A for A, _ in factors]), numpy.concatenate([B for _, B in factors])
    made = Update(like.kind, A.reshape(len(A), *like.A.shape[1:]), B.reshape(len(B), r, *like.B.shape[2:]), s)
    moved = [cat([block, now], [1.0, -1.0]).norm() for block, now in zip(blocks, blocks_of(made))]
    return made, math.hypot(*moved)


def widest(dtypes: Iterable[Any]) -> Any:
    """The one dtype, or the less of float32 and float64 that holds all: the two halves do not hold each other."""
    kinds = {dtype.name: dtype for dtype in dtypes}
    return next(iter(kinds.values())) if len(kinds) == 1 else numpy.dtype("float64" if "float64" in kinds else "float32")


def _rounded(factor: Array, dtype: Any) -> Array:
    with numpy.errstate(over="ignore", under="ignore", invalid="ignore"):
        small = factor.astype(dtype)
    if not numpy.isfinite(small.astype("float64")).all() and numpy.isfinite(factor).all():
        raise FormatError(f"a number of {abs(factor).max():.3g} is too large for {small.dtype}: give dtype='float32'")
    return small
