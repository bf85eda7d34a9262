"""How far apart two lists of numbers are, and what kind of mistake would make just that difference."""

from __future__ import annotations

from typing import Any

import numpy

__all__ = ["guess", "relative_errors", "transposed"]

Array = Any  # numpy.ndarray: everything here is on the host

# An element is measured against itself, but against no less than this part of the largest one. A sum of n terms of the
# largest size carries a rounding error of up to n eps of it, which says nothing about the formula: with rtol = 1e-9
# this allows 1e-12 of the largest, room for n = 4500.
SMALL = 1e-3
# A guess must explain this much: what remains of the difference is at most a thousandth.
EXPLAINED = 1e-3


def relative_errors(mine: Array, right: Array, floor: float = 0.0) -> Array:
    """|mine - right| / max(|mine|, |right|, floor, SMALL max|right|, SMALL max|mine|), element by element.

    0 where both are equal, inf where they differ and one is not finite.
    """
    if mine.size == 0:
        return numpy.zeros(mine.shape)
    with numpy.errstate(all="ignore"):
        sizes = numpy.maximum(abs(mine), abs(right))
        finite = sizes[numpy.isfinite(sizes)]
        scale = numpy.maximum(sizes, max(floor, SMALL * float(finite.max()) if finite.size else 0.0))
        errors = numpy.asarray(abs(mine - right) / scale)  # where no axis is left, NumPy gives a number
    errors[(mine == right) | (numpy.isnan(mine) & numpy.isnan(right))] = 0.0
    errors[~numpy.isfinite(errors)] = numpy.inf
    return errors


def transposed(array: Array) -> Array | None:
    """The same numbers read in the order of the transpose; None if there are not two axes longer than 1."""
    if array.ndim != 2 or min(array.shape) < 2:
        return None
    return array.reshape(array.shape[::-1]).T


def guess(mine: Array, right: Array, wrong: Array, turned: Array | None = None, *,
          ratio: str = "numerical / analytic") -> str:
    """One line about why `mine` differs from `right`, the likeliest cause first.

    Parameters
    ----------
    mine, right : array, shape (n,)
    wrong : array of bool, shape (n,)
    turned : array, shape (n,), optional
        What `mine` would be if it were transposed.
    ratio : str
        The name of right / mine.
    """
    if not numpy.isfinite(mine).all():
        return f"not finite: NaN or inf in {int((~numpy.isfinite(mine)).sum())} of {mine.size}"
    if not numpy.isfinite(right).all():
        return "the reference itself is not finite here: choose another point"
    if not mine.any():
        return "gradient is zero" if "analytic" in ratio else "all zero"
    if not right.any():
        return "not zero, although f does not depend on it" if "analytic" in ratio else "the reference is zero"
    size = abs(right).max()
    mine, right = mine / size, right / size  # sizes near 1, so that squares stay in range
    off = float(abs(mine - right).max())

    def explains(candidate: Array) -> bool:
        return bool(abs(candidate - right).max() <= EXPLAINED * off)

    with numpy.errstate(all="ignore"):
        factor = float(mine @ right / (mine @ mine))
    if numpy.isfinite(factor) and factor and explains(factor * mine) and (mine.size > 1 or _is_plain(factor)):
        return _about_factor(factor, ratio)
    turned = None if turned is None else turned / size
    if turned is not None and explains(turned):
        return "equals the transpose"
    if turned is not None and explains(-turned):
        return "equals the transpose, sign flipped"
    count = int(wrong.sum())
    if count == 1 and mine.size > 1:
        return f"only one element wrong, the other {mine.size - 1} are right"
    return f"wrong in {count} of {mine.size}"


def _is_plain(factor: float) -> bool:
    """Whether a factor, or its inverse, is a whole number: on a single element any other factor proves nothing."""
    return any(abs(f - round(f)) < 1e-6 * abs(f) for f in (factor, 1.0 / factor))


def _about_factor(factor: float, ratio: str) -> str:
    if abs(factor + 1.0) < 1e-6:
        return "sign flipped"
    digits = ".3f" if 0.01 < abs(factor) < 1e4 and abs(factor - 1.0) > 0.01 else ".12g"
    text = f"{ratio} = {factor:{digits}} everywhere"
    if abs(factor) > 1.5 and _is_plain(factor):
        return f"{text}: a missing factor {round(factor)}?"
    if abs(factor) < 0.7 and _is_plain(factor):
        return f"{text}: a factor {round(1.0 / factor)} too many?"
    return f"{text}: scaled by a constant that is missing, such as s or 1/n?"
