"""Arrays: plain arrays of one length as data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from ... import backend
from ...errors import ConfigError, DTypeError, ShapeError
from ...tensor import Tensor
from ..batch import Batch
from .buckets import in_batches, shuffled

__all__ = ["Arrays"]

SHOWN = 5

Array = Any


class Arrays:
    """Arrays that share their first axis: row i of each belongs together.

    Parameters
    ----------
    drawn : bool
        Whether the rows of an epoch come in a drawn order; else in their own.
    allow_nonfinite : bool
        Whether NaN and inf are accepted.
    **arrays
        By the names under which a loss function finds them in a batch. Arrays on a GPU are copied to the host, others are not
        copied: leave them as they are.

    Attributes
    ----------
    fingerprint : str
        Of what is in the arrays when they are given.
    notes : list of str
        What is no error and worth a look: columns that are the same in every row.

    Raises
    ------
    ShapeError
        If there is no array or no row, or the lengths differ.
    DTypeError
        If an array is not one of numbers.
    ConfigError
        If there are NaN or inf: which array, how many, and where the first one is.

    Examples
    --------
    >>> import numpy
    >>> data = Arrays(x=numpy.arange(6.0).reshape(3, 2), y=numpy.array([0, 1, 0]), drawn=False)
    >>> batch = data.batch(data.order(seed=0, epoch=0, batch_size=2)[0])
    >>> batch.inputs["x"], batch.targets
    (array([[0., 1.],
           [2., 3.]]), 2)
    """

    def __init__(self, *, drawn: bool = True, allow_nonfinite: bool = False, **arrays: Any) -> None:
        self.drawn = drawn
        self.arrays = {name: on_host(name, value) for name, value in arrays.items()}
        lengths = {name: len(array) for name, array in self.arrays.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ShapeError("Arrays: expected arrays with the same number of rows, at least 1, got "
                             + (", ".join(f"{name} with {n}" for name, n in lengths.items()) or "none"))
        self._rows = next(iter(lengths.values()))
        problems = [] if allow_nonfinite else [text for name, array in self.arrays.items() if (text := nonfinite(name, array))]
        if problems:
            raise ConfigError("Arrays: " + "; ".join(problems) + ". Remove these rows, or fill them in. What is to hold NaN or "
                              "inf: allow_nonfinite=True")
        self.notes = [text for name, array in self.arrays.items() if (text := constant(name, array))]
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return self._rows

    def __repr__(self) -> str:
        return "Arrays(" + ", ".join(f"{name}: {a.dtype} {a.shape}" for name, a in self.arrays.items()) + ")"

    def _fingerprint(self) -> str:
        sha = hashlib.sha256(f"minilora.arrays/1 drawn {self.drawn}".encode())
        for name, array in self.arrays.items():
            sha.update(f" {name!r} {array.dtype.str} {array.shape} ".encode())
            sha.update(numpy.ascontiguousarray(array).tobytes() if array.dtype.kind == "V" else
                       numpy.ascontiguousarray(array).data)
        return sha.hexdigest()

    def order(self, seed: int, epoch: int, batch_size: int) -> list[list[int]]:
        """The batches of an epoch as row numbers: every row once."""
        batches = shuffled(numpy.zeros(len(self), "int8"), seed, epoch, batch_size)
        return batches if self.drawn else self.in_order(batch_size)

    def in_order(self, batch_size: int) -> list[list[int]]:
        """Every row once, in order."""
        return in_batches(numpy.arange(len(self)), batch_size)

    def targets(self, inputs: Mapping[str, Any]) -> int:
        """Rows: the mean loss is one over rows."""
        return len(next(iter(inputs.values())))

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows with these numbers, copied."""
        chosen = numpy.asarray(rows, "int64")
        inputs = {name: array[chosen] for name, array in self.arrays.items()}
        return Batch(inputs, len(chosen), sum(array.size for array in inputs.values()))


def on_host(name: str, value: Any) -> Array:
    """A value as an array of numbers on the host, with rows."""
    value = value.data if isinstance(value, Tensor) else value
    if isinstance(value, numpy.ma.MaskedArray):
        raise DTypeError(f"Arrays: {name} has a mask, which would be lost: give {name}.filled(0.0)")
    host = isinstance(value, (numpy.ndarray, list, tuple, int, float))
    array = numpy.asarray(value if host else backend.to_host(value))
    if not (array.dtype.kind in "biuf" or array.dtype.kind == "V" and array.dtype.names is None and array.dtype.isbuiltin == 2):
        raise DTypeError(f"Arrays: {name} must be an array of numbers, got {array.dtype}")
    if not array.ndim:
        raise ShapeError(f"Arrays: {name} must have rows, got a single number")
    return array


def nonfinite(name: str, array: Array) -> str:
    """How many numbers are NaN or inf, and where the first is; "" if none."""
    if array.dtype.kind in "biu" or numpy.isfinite(array).all():
        return ""
    places = numpy.argwhere(~numpy.isfinite(array))
    row, *column = places[0].tolist()
    where = f"row {row}" + (f", column {column[0] if len(column) == 1 else tuple(column)}" if column else "")
    count = "1 number is" if len(places) == 1 else f"{len(places):,} numbers are"
    return f"{name}: {count} not finite, the first in {where} ({float(array[tuple(places[0])])})"


def constant(name: str, array: Array) -> str:
    """Which columns are the same in every row; "" if none."""
    if len(array) < 2 or not array.size:
        return ""
    same = numpy.argwhere((array == array[:1]).all(axis=0))
    if not len(same):
        return ""
    if array.ndim == 1:
        return f"{name} is {array[0].item()} in every row: there is nothing to learn from it"
    columns = [str(place[0] if len(place) == 1 else tuple(place)) for place in same[:SHOWN].tolist()]
    more = f" and {len(same) - SHOWN:,} more" if len(same) > SHOWN else ""
    return f"{name}: {'column' if len(same) == 1 else 'columns'} {', '.join(columns)}{more} the same in every row"
