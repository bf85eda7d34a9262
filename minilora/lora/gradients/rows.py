"""Updates of some rows of a batch: y with d_k added to its rows places_k."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from ... import backend
from ...engine import Op, apply
from ...tensor import Tensor

__all__ = ["AddRows", "add_rows", "run_of"]

Array = Any


class AddRows(Op):
    """y with d_k added to its rows `places[k]`, for every k; no row is named twice.

    Every element of y and of each d_k meets one element of the output, once:

        dy_in = dy        dd_k = the rows places[k] of dy        keeps nothing
    """

    places: Sequence[slice | Array]

    def forward(self, y: Array, *d: Array) -> Array:
        out = y.copy()
        for rows, more in zip(self.places, d):
            out[rows] += more
        return out

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        needs_y, *needs = self.needs
        return (dy if needs_y else None, *(self.xp.array(dy[rows]) if needed else None
                                           for rows, needed in zip(self.places, needs)))


def add_rows(y: Any, d: Sequence[Any], places: Sequence[numpy.ndarray]) -> Tensor:
    """y (n, ...) with the rows of d[k] added to its rows places[k]; see `AddRows`.

    Parameters
    ----------
    y : Tensor, shape (n, ...)
    d : sequence of Tensor, shapes (m_k, ...)
    places : sequence of ndarray of int, shapes (m_k,), on the host
        No number twice.

    Examples
    --------
    >>> import numpy, minilora
    >>> y, d = minilora.tensor([[1.0], [2.0], [3.0]]), minilora.tensor([[10.0], [20.0]])
    >>> add_rows(y, [d], [numpy.array([2, 0])]).data.tolist()
    [[21.0], [2.0], [13.0]]
    """
    device = backend.device_of(y.data)
    return apply(AddRows, y, *d, places=[run if isinstance(run := run_of(rows), slice) else backend.to_device(run, device)
                                         for rows in places])


def run_of(places: numpy.ndarray) -> slice | numpy.ndarray:
    """The places as a slice if they follow each other: a view then does, without a copy."""
    first = int(places[0])
    return slice(first, first + len(places)) if (numpy.diff(places) == 1).all() else places
