"""Rows: which adapter each row of a batch gets. The rows of one adapter are taken out, computed together, and added back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy

from .. import backend, ops
from ..engine import Op, apply
from ..errors import ShapeError
from ..tensor import Tensor
from .adapter import BASE

__all__ = ["AddRows", "Rows", "add_rows"]

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
    return apply(AddRows, y, *d, places=[run if isinstance(run := _run(rows), slice) else backend.to_device(run, device)
                                         for rows in places])


def _run(places: numpy.ndarray) -> slice | numpy.ndarray:
    """The places as a slice if they follow each other: a view then does, without a copy."""
    first = int(places[0])
    return slice(first, first + len(places)) if (numpy.diff(places) == 1).all() else places


class Rows:
    """The adapters of a batch, row by row.

    Every row is computed with its own adapter alone: r (in + out) products a row, however many adapters there are, and what is
    wrong with one adapter, such as an inf in it, stays in its rows. The names are known on the host, so nothing waits for a
    GPU. Rows of one adapter that follow each other are taken as a view; put requests of one adapter side by side.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.places = {name: numpy.array([i for i, other in enumerate(self.names) if other == name])
                       for name in dict.fromkeys(self.names) if name != BASE}

    def check(self, x: Any) -> None:
        """Raise `ShapeError` unless x has one row for each name."""
        shape = x.shape if hasattr(x, "shape") else numpy.shape(x)
        if not shape or shape[0] != len(self.names):
            raise ShapeError(f"adapter_names has {len(self.names)} names, but this layer's input {shape} has "
                             f"{shape[0] if shape else 'no'} rows on its first axis: give one name for each row of the batch")

    def added(self, y: Tensor, x: Any, updates: Mapping[str, Callable[[Any], Tensor]]) -> Tensor:
        """y, with `updates[name]` of the rows of x that are named so added to the same rows.

        Raises
        ------
        ShapeError
            If x has another number of rows than there are names.
        """
        self.check(x)
        mine = {name: places for name, places in self.places.items() if name in updates}
        if not mine:
            return y
        return add_rows(y, [updates[name](_rows(x, places)) for name, places in mine.items()], list(mine.values()))

    def chosen(self, y: Tensor, others: Mapping[str, Tensor]) -> Tensor:
        """Each row from `others[name]`, or from y if its name is not there. All are of one shape."""
        self.check(y)
        tensors, index = [y], numpy.arange(len(self.names))
        for name, places in self.places.items():
            if name in others:
                index[places] += len(self.names) * len(tensors)
                tensors.append(others[name])
        return y if len(tensors) == 1 else _rows(ops.concatenate(tensors), index)


def _rows(x: Any, places: numpy.ndarray) -> Any:
    """Some rows of an input, in this order; of token ids without a gradient."""
    data = x.data if isinstance(x, Tensor) else x
    if not hasattr(data, "dtype"):
        data = numpy.asarray(data)
    run = _run(places)
    if data.dtype.kind in "iu":
        device = backend.device_of(data)
        return data[run] if isinstance(run, slice) else device.xp.take(data, backend.to_device(run, device), axis=0)
    x = x if isinstance(x, Tensor) else Tensor(data)
    if isinstance(run, slice):
        return x[run]
    flat = ops.reshape(x, (len(data), math.prod(data.shape[1:])))
    return ops.embedding(run, flat).reshape(len(run), *data.shape[1:])  # as rows of a table: sums in a fixed order
