"""Random inputs to grade at: sizes that all differ, so that no transpose fits by chance, and numbers that are not special."""

from __future__ import annotations

from typing import Any

__all__ = ["CASES", "ONE_ROW", "SINGLE", "Draw"]

Array = Any

SINGLE, ONE_ROW = "float32", "one row"  # cases that every puzzle may have; its own are for its own `points` to understand
CASES = ("", "", ONE_ROW, SINGLE)


class Draw:
    """What a puzzle draws the inputs of one point from: the same for the same place and case.

    Attributes
    ----------
    case : str
        What is special about this point; empty if nothing is.
    dtype : str

    Examples
    --------
    >>> draw = Draw(0, "")
    >>> N, n_in = draw.rows(), draw.size()
    >>> N != n_in, draw.normal(N, n_in).shape == (N, n_in), draw.s != 1.0
    (True, True, True)
    """

    def __init__(self, place: int, case: str) -> None:
        import numpy  # the list of puzzles needs none

        self.case, self.rng = case, numpy.random.default_rng(place)
        self.dtype = "float32" if case == SINGLE else "float64"
        self.sizes = [int(n) for n in self.rng.permutation(numpy.arange(4, 9))]
        self.ranks = [int(n) for n in self.rng.permutation(numpy.arange(2, 4))]
        self.s = float(self.rng.choice([0.3, 0.6, 1.7, 2.2]))  # never 1 or a plain fraction, which other mistakes leave too

    def size(self) -> int:
        """A size from 4 to 8 that no other axis has."""
        return self.sizes.pop()

    def rank(self) -> int:
        """2 or 3, and the other one when asked again."""
        return self.ranks.pop()

    def rows(self) -> int:
        """The same, or 1 in the case of one row."""
        return 1 if self.case == ONE_ROW else self.size()

    def normal(self, *shape: int) -> Array:
        """Random numbers of either sign."""
        return self.rng.standard_normal(shape).astype(self.dtype)

    def integers(self, below: int, *shape: int) -> Array:
        """Random whole numbers of which at least two are equal, where there are two."""
        drawn = self.rng.integers(0, below, shape)
        drawn.reshape(-1)[:2] = drawn.reshape(-1)[:1]
        return drawn
