"""Redrawn: arrays whose rows are made anew, with other random numbers, each time that they are used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy

from ...errors import ConfigError
from ...settings import whole
from ..batch import Batch
from .arrays import Arrays

__all__ = ["Redrawn"]

Draw = Callable[[numpy.random.Generator, Mapping[str, Any]], Mapping[str, Any]]


class Redrawn:
    """Arrays of which every row goes through a function that may draw: noise for a diffusion, a shift of an image.

    What is drawn depends on the seed, the row and the epoch, and on nothing else: not on the size of the batches, on threads or
    on processes, and a run that is resumed draws what it would have drawn. An evaluation draws the same each time.

    Parameters
    ----------
    data : Arrays
    draw : callable
        From a Generator and a row, a dict of arrays (views of the data, not to be changed), to such a dict of the batch's row.
        Of all rows with the same names, shapes and dtypes. It belongs to the data's fingerprint by its repr: give one that
        says what it does.
    seed : int
        Of what is drawn; the order of rows has the run's.

    Attributes
    ----------
    fingerprint : str

    Raises
    ------
    ConfigError
        If `data` are no Arrays, `draw` cannot be called, or the seed is no int >= 0.

    Examples
    --------
    >>> data = Redrawn(Arrays(x=numpy.zeros((3, 2))), lambda rng, row: {"x": row["x"] + rng.standard_normal(2)}, seed=0)
    >>> first, second = (data.batch(data.order(0, epoch, 3)[0]).inputs["x"] for epoch in (0, 1))
    >>> first.shape, bool((first == second).any())
    ((3, 2), False)
    """

    def __init__(self, data: Arrays, draw: Draw, seed: int = 0) -> None:
        if not isinstance(data, Arrays):
            raise ConfigError(f"Redrawn: expected train.data.Arrays, got {type(data).__name__}")
        if not callable(draw):
            raise ConfigError(f"Redrawn: expected a function of a Generator and a row, got {type(draw).__name__}")
        self.data, self.draw, self.seed = data, draw, whole("seed", seed, 0)
        self.notes = data.notes
        said = getattr(draw, "__qualname__", None) or repr(draw)
        self.fingerprint = hashlib.sha256(f"minilora.redrawn/1 {data.fingerprint} {said} {self.seed}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return f"Redrawn({self.data!r})"

    def order(self, seed: int, epoch: int, batch_size: int) -> list[list[int]]:
        """The batches of an epoch. Row i has the number i + epoch len(self): one for each time it is used."""
        first = epoch * len(self)
        return [[first + row for row in rows] for rows in self.data.order(seed, epoch, batch_size)]

    def in_order(self, batch_size: int) -> list[list[int]]:
        """Every row once, in order."""
        return self.data.in_order(batch_size)

    def targets(self, inputs: Mapping[str, Any]) -> int:
        """Rows: the mean loss is one over rows."""
        return self.data.targets(inputs)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows with these numbers, drawn."""
        made = [self._row(int(number)) for number in (rows if len(rows) else [0])]
        inputs = {name: numpy.stack([one[name] for one in made])[:len(rows)] for name in made[0]}
        return Batch(inputs, len(rows), sum(array.size for array in inputs.values()))

    def _row(self, number: int) -> Mapping[str, Any]:
        row = number % len(self)
        arrays = {name: array[row] for name, array in self.data.arrays.items()}
        return self.draw(numpy.random.default_rng((self.seed, number)), arrays)
