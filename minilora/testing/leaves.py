"""One leaf: its gradient measured, and the row of the report about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from . import places
from .differences import Slope
from .evidence import Difference, Known, Other, products, relative_errors
from .guesses import guess
from .point import Surroundings
from .reports import Row

__all__ = ["Measured", "measure", "rows"]

Array = Any


@dataclass
class Measured:
    """A leaf, before anything is guessed. `text` says why its numerical gradient cannot be trusted, where it cannot."""

    x: Array
    difference: Difference
    errors: Array
    worst: int
    text: str
    kink: bool
    arrived: bool

    @property
    def passed(self) -> bool:
        return not self.difference.wrong.any()


def measure(slope: Slope, i: int, dx: Array | None, along: Array | None) -> Measured:
    """Compare the gradient of leaf `i` with the numerical one: every element, or along directions."""
    name, leaf = slope.point.leaves[i]
    gradient = numpy.zeros(leaf.shape) if dx is None else dx
    n = leaf.size if along is None else len(along)

    def direction(j: int) -> Array:
        v = (numpy.arange(leaf.size) == j).astype("float64") if along is None else along[j]
        return v.reshape(leaf.shape)

    analytic = products(gradient, along)
    numerical = numpy.array([slope(i, direction(j)) for j in range(n)])
    errors = relative_errors(analytic, numerical, slope.noise / slope.rtol)
    wrong, sure = errors > slope.rtol, numpy.ones(n, bool)
    worst, text, kink = int(errors.argmax()) if n else 0, "", False
    if wrong.any():
        worst, text, kink, doubtful = _why(slope, i, direction, errors, wrong, numerical)
        sure[doubtful] = False
    difference = Difference(name, gradient, numerical, wrong, along, sure)
    return Measured(slope.point.start[i], difference, errors, worst, text, kink, dx is not None)


def _why(slope: Slope, i: int, direction: Callable[[int], Array], errors: Array, wrong: Array,
         numerical: Array) -> tuple[int, str, bool, list[int]]:
    """The worst place where the numerical value can be trusted, or, if there is none, the worst of all, why it cannot,
    and whether that is a kink. Last, the places where it cannot be trusted, as far as they were looked at.
    """
    places = [int(j) for j in numpy.argsort(-errors, kind="stable")[:int(wrong.sum())]]
    objections = {j: slope.objection(i, direction(j), float(numerical[j])) for j in places[:20]}  # 8 evaluations each
    doubtful = [j for j, (text, _) in objections.items() if text]
    if len(doubtful) < len(objections):
        return next(j for j in objections if j not in doubtful), "", False, doubtful
    text, kink = objections[places[0]]
    if kink:
        text += f", at {len(places)} such place{'s' if len(places) > 1 else ''}. Choose another point"
    return places[0], text, kink, doubtful


def rows(measured: Sequence[Measured], cotangent: Array, surroundings: Surroundings) -> list[Row]:
    """What is found about all leaves, each seen beside the others."""
    others = [Other(one.difference.name, one.x, one.difference, one.passed) for one in measured]
    out = [(n, f"the length of axis {axis} of the output") for axis, n in enumerate(cotangent.shape)]
    out += [(cotangent.size, "the number of elements of the output")]
    found = []
    for k, one in enumerate(measured):
        own = [(n, f"the length of axis {axis} of {others[k].name}") for axis, n in enumerate(one.x.shape)]
        own += [(one.x.size, f"the number of elements of {others[k].name}")]
        known = Known(one.x, cotangent, own + out, surroundings.settings, others[:k] + others[k + 1:], k)
        found.append(_row(one, known))
    return found


def _row(one: Measured, known: Known) -> Row:
    found, text = one.difference, one.text
    along, shape, n = found.along, found.mine.shape, found.right.size
    if not one.passed and not text:
        text = guess(found, known) if one.arrived else (
            "gradient is zero: none arrived. Is the graph cut, by .data or .detach()?")
    compared = f"{n} {'element' if along is None else 'direction'}{'' if n == 1 else 's'}"
    analytic = products(found.mine, along)
    if not n:
        return Row(found.name, shape, compared, 0.0, "-", 0.0, 0.0, True)
    if not (analytic.any() or found.right.any()):
        return Row(found.name, shape, compared, 0.0, "-", 0.0, 0.0, True, untested=True, zeros=found.mine.size)
    if along is None:
        where = str(tuple(map(int, numpy.unravel_index(one.worst, shape))))
        zero = (found.mine == 0.0) & (found.right.reshape(shape) == 0.0)
    else:
        where = f"direction {one.worst}"
        zero = (found.mine == 0.0) & one.passed  # a gradient that is not 0 there would have shown in the directions
    return Row(found.name, shape, compared, float(one.errors[one.worst]), where, float(analytic[one.worst]),
               float(found.right[one.worst]), one.passed, text, one.kink, zeros=int(zero.sum()),
               zeros_at=places.place(zero, one.x, found.name))
