"""What a guess is made from: a gradient beside what it should be, and what else is known where it was checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

__all__ = ["Difference", "Known", "Other", "products", "relative_errors"]

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
        errors = numpy.asarray(abs(mine - right) / scale)  # NumPy gives a scalar where no axis is left
    errors[(mine == right) | (numpy.isnan(mine) & numpy.isnan(right))] = 0.0
    errors[~numpy.isfinite(errors)] = numpy.inf
    return errors


def products(array: Array, along: Array | None) -> Array:
    """The elements of an array, or its products with the rows of `along`."""
    with numpy.errstate(all="ignore"):
        return array.reshape(-1) if along is None else along @ array.reshape(-1)


@dataclass
class Difference:
    """A gradient, and what it should be.

    Attributes
    ----------
    name : str
        Of the leaf.
    mine : array
        The whole gradient.
    right : array, shape (n,)
        Every element of what it should be, or its products with the rows of `along`.
    wrong : array of bool, shape (n,)
    along : array, shape (n, size), or None
        Directions; None: element by element.
    sure : array of bool, shape (n,)
        Where `right` can be trusted.
    """

    name: str
    mine: Array
    right: Array
    wrong: Array
    along: Array | None = None
    sure: Array = None

    def __post_init__(self) -> None:
        if self.sure is None:
            self.sure = numpy.ones(self.right.shape, bool)
        self.shown = self.seen(self.mine)
        self.target = self.right[self.sure]
        with numpy.errstate(all="ignore"):
            self.off = float(abs(self.shown - self.target).max()) if self.target.size else 0.0

    def seen(self, array: Array) -> Array:
        """What can be compared with `target` of an array of the gradient's shape."""
        return products(array, self.along)[self.sure]

    def explained(self, candidate: Array, times: float = 1.0) -> bool:
        """Whether the gradient would be right if it were `candidate`."""
        seen = times * self.seen(numpy.broadcast_to(candidate, self.mine.shape))
        return bool(seen.size) and bool(abs(seen - self.target).max() <= EXPLAINED * self.off)

    def sign(self, candidate: Array) -> float:
        """1 or -1 if it explains the difference with that sign, else 0."""
        return next((k for k in (1.0, -1.0) if self.explained(candidate, k)), 0.0)

    def off_by(self, rest: Array) -> bool:
        """Whether what is left of the difference is nearly nothing."""
        return bool(abs(rest).max() <= EXPLAINED * self.off)

    @property
    def whole(self) -> Array | None:
        """Every element of what it should be, in the gradient's shape; None where that is not known."""
        return self.right.reshape(self.mine.shape) if self.along is None and self.sure.all() else None

    @property
    def lies_wrong(self) -> Array | None:
        """The wrong elements, in the gradient's shape; None along directions."""
        return (self.wrong & self.sure).reshape(self.mine.shape) if self.along is None else None


@dataclass(frozen=True)
class Other:
    """Another leaf of the same check, and its values."""

    name: str
    x: Array
    difference: Difference
    passed: bool


@dataclass(frozen=True)
class Known:
    """What else is known where a gradient was checked.

    Attributes
    ----------
    x : array, optional
        The leaf's values.
    dy : array, optional
        The cotangent of f's output.
    lengths, settings
        See `factors.about`.
    others : sequence of Other
    before : int
        How many of them come before this leaf.
    ratio : str
        The name of right / mine.
    """

    x: Array | None = None
    dy: Array | None = None
    lengths: Sequence[tuple[int, str]] = ()
    settings: Sequence[tuple[float, str]] = ()
    others: Sequence[Other] = field(default=(), repr=False)
    before: int = 0
    ratio: str = "numerical / analytic"
