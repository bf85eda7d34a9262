"""Rows: which adapter each row of a batch gets. The rows of one adapter are taken out, computed together, and added back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy

from ... import backend, ops
from ...errors import ShapeError
from ...tensor import Tensor
from ..gradients.rows import add_rows, run_of
from .adapter import BASE

__all__ = ["Rows"]

Array = Any


class Rows:
    """The adapters of a batch, row by row.

    Every row is computed with its own adapter alone: r (in + out) products a row, however many adapters there are, and what is
    wrong with one adapter, such as an inf in it, stays in its rows. The names are known on the host, so nothing waits for a
    GPU. Rows of one adapter that follow each other are taken as a view; put requests of one adapter side by side.

    An input of one row, such as the positions that are the same for the whole batch, stands for all rows: it is computed once
    with each adapter, and what comes out has as many rows as there are names.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.places = {name: numpy.array([i for i, other in enumerate(self.names) if other == name])
                       for name in dict.fromkeys(self.names) if name != BASE}

    def check(self, x: Any) -> None:
        """Raise `ShapeError` unless x has one row for each name, or one for all."""
        shape = x.shape if hasattr(x, "shape") else numpy.shape(x)
        if not shape or shape[0] not in (1, len(self.names)):
            raise ShapeError(f"adapter_names has {len(self.names)} names, but this layer's input {shape} has "
                             f"{shape[0] if shape else 'no'} rows on its first axis: give one name for each row of the batch. "
                             "If the model gives this layer what is the same for the whole batch, such as positions, it is to "
                             "give it as one row: x[None]")

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
        if y.shape[0] != len(self.names):
            return self.chosen(y, {name: y + updates[name](x) for name in mine})
        return add_rows(y, [updates[name](_rows(x, places)) for name, places in mine.items()], list(mine.values()))

    def chosen(self, y: Tensor, others: Mapping[str, Tensor]) -> Tensor:
        """Each row from `others[name]`, or from y if its name is not there. All are of one shape."""
        self.check(y)
        tensors, index = [y], numpy.arange(len(self.names)) % y.shape[0]
        for name, places in self.places.items():
            if name in others:
                index[places] += y.shape[0] * len(tensors)
                tensors.append(others[name])
        return y if len(tensors) == 1 else _rows(ops.concatenate(tensors), index)


def _rows(x: Any, places: numpy.ndarray) -> Any:
    """Some rows of an input, in this order; of token ids without a gradient."""
    data = x.data if isinstance(x, Tensor) else x
    if not hasattr(data, "dtype"):
        data = numpy.asarray(data)
    run = run_of(places)
    if data.dtype.kind in "iu":
        device = backend.device_of(data)
        return data[run] if isinstance(run, slice) else device.xp.take(data, backend.to_device(run, device), axis=0)
    x = x if isinstance(x, Tensor) else Tensor(data)
    if isinstance(run, slice):
        return x[run]
    flat = ops.reshape(x, (len(data), math.prod(data.shape[1:])))
    return ops.embedding(run, flat).reshape(len(run), *data.shape[1:])  # as rows of a table: sums in a fixed order
