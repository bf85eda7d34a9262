"""What is wrong in a part of a gradient: in some rows or columns, or where the leaf is negative."""

from __future__ import annotations

from typing import Any

import numpy

from . import factors, places
from .evidence import EXPLAINED, Difference, Known

__all__ = ["own_factors", "wrong_part"]

Array = Any  # numpy.ndarray: everything here is on the host


def wrong_part(found: Difference, known: Known) -> str:
    """Where it is wrong, if not everywhere, and what is wrong there."""
    wrong = found.lies_wrong
    if wrong is None or wrong.ndim == 0:
        return ""
    active = (found.mine != 0.0) | (found.right.reshape(wrong.shape) != 0.0)  # where both are 0 nothing was learnt
    text = places.sentence(wrong, known.x, found.name)
    if not active.all() and known.x is not None and "just where" not in text:
        for words, mask in ((f"where {found.name} < 0", known.x < 0), (f"where {found.name} > 0", known.x > 0)):
            if (wrong == (mask & active)).all() and not (wrong == active).all():
                text = f"wrong in {int(wrong.sum())} of {wrong.size}, just {words}"
    if not text:
        return _halves(found, known) if wrong[active].all() else ""
    return text if text.startswith("only one element") else text + _there(found, wrong, known)


def _halves(found: Difference, known: Known) -> str:
    """All is wrong, in one way where the leaf is negative and in another where it is positive."""
    x = known.x
    if x is None or min(int((x < 0).sum()), int((x > 0).sum())) < 2:
        return ""
    negative, positive = (_there(found, mask, known) for mask in (x < 0, x > 0))
    if not negative or not positive or negative == positive:
        return ""
    return f"where {found.name} < 0{negative}. Where {found.name} > 0{positive}"


def _there(found: Difference, wrong: Array, known: Known) -> str:
    """What is wrong in that part."""
    mine, right = found.mine[wrong], found.right.reshape(wrong.shape)[wrong]
    if not mine.any():
        return ": it is 0 there"
    if not right.any():
        dy = known.dy
        same = dy is not None and dy.shape == wrong.shape and abs(mine - dy[wrong]).max() <= 1e-9 * abs(mine).max()
        return f": there it should be 0{', and is dy' if same else ''}"
    factor = factors.constant_ratio(mine, right)
    if factor is not None:
        return f": {factors.about(factor, known.ratio, known.lengths, known.settings, '')}"
    off = mine - right
    if off.size > 1 and abs(off - off[0]).max() <= EXPLAINED * abs(off).max():
        return f": there it differs by a constant {off[0]:.6g}"
    return ""


def own_factors(found: Difference, known: Known) -> str:
    """A factor of its own for each row, or for each column."""
    mine, right = found.mine, found.whole
    if right is None:
        return ""
    a, b = mine / abs(right).max(), right / abs(right).max()
    for axis in range(mine.ndim) if mine.ndim > 1 else ():
        n, rest = mine.shape[axis], tuple(other for other in range(mine.ndim) if other != axis)
        if n < 2 or mine.size // n < 2:
            continue
        k = (a * b).sum(axis=rest, keepdims=True) / (a * a).sum(axis=rest, keepdims=True)
        others = k[abs(k - 1.0) > 1e-6]  # of the rows that are wrong: one factor for all of them is a simpler guess
        differ = others.size > 1 and float(numpy.ptp(others)) > 1e-6 * float(abs(others).max())
        if differ and numpy.isfinite(k).all() and found.explained(k * mine):
            noun = ("row", "column")[axis] if mine.ndim == 2 else f"slice along axis {axis}"
            return f"each {noun} has a factor of its own: is one of shape {k.shape} left out, or too many?"
    return ""
