"""Where in an array something lies, in words: rows, columns, a diagonal, or where the values of another array are negative."""

from __future__ import annotations

import math
from typing import Any

import numpy

__all__ = ["numbers", "place", "sentence"]

Array = Any  # numpy.ndarray: everything here is on the host

MOST = 6  # numbers that are listed one by one
CHANCE = 400  # so many sets of that size there must be, for one that a limit cuts off to be no coincidence


def numbers(indices: Array) -> str:
    """``0, 2, 5 to 8``: three and more in a row become one part, and what goes on for long is cut."""
    parts: list[str] = []
    indices = [int(i) for i in indices]
    k = 0
    while k < len(indices):
        end = k
        while end + 1 < len(indices) and indices[end + 1] == indices[end] + 1:
            end += 1
        parts += [f"{indices[k]} to {indices[end]}"] if end - k > 1 else map(str, indices[k:end + 1])
        k = end + 1
    if len(parts) > MOST:
        return f"{', '.join(parts[:MOST - 1])} ... ({len(indices)} in all)"
    return ", ".join(parts)


def sentence(wrong: Array, x: Array | None = None, name: str = "x") -> str:
    """What is wrong in part, in a sentence; empty if all is wrong, or nothing.

    Parameters
    ----------
    wrong : array of bool
    x : array, optional
        Values of the same shape: what is wrong may be wrong by their sign.
    name : str
        Of these values.
    """
    total, count = wrong.size, int(wrong.sum())
    if not 0 < count < total:
        return ""
    if count == 1:
        return f"only one element wrong, the other {total - 1} are right"
    if (axis := _whole(wrong)) is not None:
        return _of_slices(wrong, axis)
    if words := _by_values(wrong, x, name) or _by_diagonal(wrong):
        return f"wrong in {count} of {total}, just {words}"
    if (axis := _part(wrong)) is not None:
        return _of_slices(wrong, axis)
    if total - count == 1 and wrong.ndim:
        at = tuple(map(int, numpy.argwhere(~wrong)[0]))
        return f"wrong in {count} of {total}, in all but {at if wrong.ndim > 1 else f'element {at[0]}'}"
    if wrong.ndim == 1:
        return f"wrong in {count} of {total}: elements {numbers(numpy.flatnonzero(wrong))}"
    return _of_slices(wrong, int(numpy.argmax(wrong.shape))) if max(wrong.shape) == total else ""


def place(chosen: Array, x: Array | None = None, name: str = "x") -> str:
    """The words for a set of elements: ``rows 3, 4`` or ``where x < 0``; empty if it has no simple shape."""
    if not 0 < int(chosen.sum()) < chosen.size:
        return ""
    if (axis := _whole(chosen)) is not None:
        return _slices(chosen, axis, numpy.flatnonzero(_along(chosen, axis).all(axis=1)))
    if words := _by_values(chosen, x, name) or _by_diagonal(chosen):
        return words
    if chosen.ndim == 1:
        return f"elements {numbers(numpy.flatnonzero(chosen))}"
    return ""


# -- rows and columns -----------------------------------------------------------------------------------------------------


def _along(chosen: Array, axis: int) -> Array:
    """One row for each index along an axis."""
    return numpy.moveaxis(chosen, axis, 0).reshape(chosen.shape[axis], -1)


def _whole(chosen: Array) -> int | None:
    """The axis along which every slice is chosen as a whole or not at all; slices have two elements or more."""
    for axis in range(chosen.ndim):
        rows = _along(chosen, axis)
        if rows.shape[1] > 1 and (rows.all(axis=1) == rows.any(axis=1)).all():
            return axis
    return None


def _part(chosen: Array) -> int | None:
    """The axis along which the smallest part of the slices has anything chosen."""
    axes = [axis for axis in range(chosen.ndim) if _along(chosen, axis).shape[1] > 1]
    shares = {axis: float(_along(chosen, axis).any(axis=1).mean()) for axis in axes}
    best = min(shares, key=lambda axis: shares[axis], default=None)
    return best if best is not None and shares[best] < 1.0 else None


def _slices(chosen: Array, axis: int, indices: Array) -> str:
    """``row 1``, ``columns 0, 2``, ``the last slice along axis 0``."""
    noun = ("row", "column")[axis] if chosen.ndim == 2 else "slice"
    tail = "" if chosen.ndim == 2 else f" along axis {axis}"
    n = chosen.shape[axis]
    if len(indices) == 1 and n > 2 and indices[0] in (0, n - 1):
        return f"the {'last' if indices[0] else 'first'} {noun}{tail}"
    return f"{noun}{'' if len(indices) == 1 else 's'} {numbers(indices)}{tail}"


def _of_slices(wrong: Array, axis: int) -> str:
    rows = _along(wrong, axis)
    bad, n, length = rows.any(axis=1), rows.shape[0], rows.shape[1]
    good = n - int(bad.sum())
    if good < n - good:
        verb = "is" if good == 1 else "are"
        right = f"only {_slices(wrong, axis, numpy.flatnonzero(~bad))} {verb} right, the others are wrong"
        return right if rows[bad].all() else f"{right} in part, in {int(wrong.sum())} of {wrong.size} elements"
    verb = "is" if good == n - 1 else "are"
    counts = rows[bad].sum(axis=1)
    text = f"only {_slices(wrong, axis, numpy.flatnonzero(bad))} {verb} wrong"
    if (counts == length).all():
        return text if length == 1 else f"{text}, in all {length} elements"
    least, most = int(counts.min()), int(counts.max())
    return f"{text}, in {least if least == most else f'{least} to {most}'} of {length} elements"


# -- other sets -----------------------------------------------------------------------------------------------------------


def _by_values(chosen: Array, x: Array | None, name: str) -> str:
    if x is None or x.shape != chosen.shape or chosen.size < 4 or not numpy.isfinite(x).all():
        return ""
    signs = {f"where {name} < 0": x < 0, f"where {name} > 0": x > 0, f"where {name} is 0": x == 0,
             f"where {name} is not 0": x != 0}
    for words, mask in signs.items():
        if (chosen == mask).all():
            return words
    if math.comb(min(chosen.size, 100), min(int(chosen.sum()), int((~chosen).sum()))) < CHANCE:
        return ""
    for words, values in ((name, x), (f"|{name}|", abs(x))):
        inside, outside = values[chosen], values[~chosen]
        if inside.min() > outside.max():
            return f"where {words} > {(inside.min() + outside.max()) / 2:.2g} or so"
        if inside.max() < outside.min():
            return f"where {words} < {(inside.max() + outside.min()) / 2:.2g} or so"
    return ""


def _by_diagonal(chosen: Array) -> str:
    if chosen.ndim != 2 or chosen.shape[0] != chosen.shape[1] or chosen.shape[0] < 3:
        return ""
    i, j = numpy.indices(chosen.shape)
    sets = {"on the diagonal": i == j, "off the diagonal": i != j, "above the diagonal": i < j, "below the diagonal": i > j,
            "on and above the diagonal": i <= j, "on and below the diagonal": i >= j}
    return next((words for words, mask in sets.items() if (chosen == mask).all()), "")
