"""Rows: which adapter each row of a batch gets. The rows of one adapter are gathered, computed together, and put back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy

from .. import backend, ops
from ..errors import ShapeError
from ..tensor import Tensor
from .adapter import BASE

__all__ = ["Rows"]


class Rows:
    """The adapters of a batch, row by row.

    Every row is computed with its own adapter alone: r (in + out) products a row, however many adapters there are, and what is
    wrong with one adapter, such as an inf in it, stays in its rows. The names are known on the host, so nothing waits for a
    GPU; the gathering copies each row of the input once and each row of the updates once.
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
        parts = [updates[name](_rows(x, places)) for name, places in mine.items()]
        rest = numpy.setdiff1d(numpy.arange(len(self.names)), numpy.concatenate(list(mine.values())))
        if rest.size:
            parts.append(Tensor(y.device.xp.zeros((len(rest), *y.shape[1:]), dtype=y.dtype)))
        order = numpy.argsort(numpy.concatenate([*mine.values(), rest]))  # where each row of the batch stands in the parts
        return y + _rows(ops.concatenate(parts), order)  # type: ignore[no-any-return]

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
    if data.dtype.kind in "iu":
        device = backend.device_of(data)
        return device.xp.take(data, backend.to_device(places, device), axis=0)
    flat = ops.reshape(x if isinstance(x, Tensor) else Tensor(data), (len(data), math.prod(data.shape[1:])))
    return ops.embedding(places, flat).reshape(len(places), *data.shape[1:])  # as rows of a table: sums in a fixed order
