"""The batches that are looked at: read once, and the same for all checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from ...tensor import Tensor
from ..batch import Batch, Data
from ..settings import Settings

__all__ = ["Picked", "pick"]


class Picked:
    """Some batches as data: each of them is a row, and an epoch is all of them, in order.

    Attributes
    ----------
    batches : list of Batch
    counts : list of int
        Their rows.
    """

    def __init__(self, data: Data, batches: Sequence[Batch], counts: Sequence[int]) -> None:
        self.data, self.batches, self.counts = data, list(batches), list(counts)
        self.fingerprint = data.fingerprint

    def __len__(self) -> int:
        return len(self.batches)

    def order(self, seed: int, epoch: int, batch_size: int) -> list[list[int]]:
        return self.in_order(batch_size)

    def in_order(self, batch_size: int) -> list[list[int]]:
        return [[number] for number in range(len(self))]

    def targets(self, inputs: Mapping[str, Any]) -> int:
        return self.data.targets(inputs)

    def batch(self, rows: Sequence[int]) -> Batch:
        (number,) = rows
        return self.batches[number]

    def few(self, rows: int) -> Picked:
        """No more than the first so many rows of the first batch; all of that one, if those have no target."""
        batch, count = self.batches[0], self.counts[0]
        inputs = {name: first(value, rows, count) for name, value in batch.inputs.items()}
        targets = self.targets(inputs)
        if not targets or count <= rows:
            return Picked(self.data, [batch], [count])
        return Picked(self.data, [Batch(inputs, targets, batch.tokens * rows // count)], [rows])


def pick(data: Data, settings: Settings, most: int) -> Picked:
    """The first batches of the first epoch that have targets.

    Raises
    ------
    ConfigError
        If there is none.
    """
    if isinstance(data, Picked):
        return data
    if not len(data):
        raise ConfigError("the data have no rows: there is nothing to learn from. Is the file empty, or every row left out?")
    found: list[Batch] = []
    counts: list[int] = []
    seen = 0
    for rows in data.order(settings.seed, 0, min(settings.batch_size, len(data))):
        numbers = list(rows)
        batch, seen = data.batch(numbers), seen + 1
        if batch.targets:
            found.append(batch)
            counts.append(len(numbers))
            if len(found) == most:
                break
    if not found:
        raise ConfigError(f"no target in {seen} batch{'es' if seen != 1 else ''} of {len(data):,} rows: every position is "
                          "ignored, so that nothing can be learned. Are all labels -100, is the mask the wrong way round, or "
                          "are the completions cut off (max_length)?")
    return Picked(data, found, counts)


def first(value: Any, rows: int, count: int) -> Any:
    """The first rows of what has `count` of them; anything else as it is."""
    if isinstance(value, Tensor):
        return Tensor(first(value.data, rows, count))
    shape = getattr(value, "shape", (len(value),) if isinstance(value, (list, tuple)) else ())
    return value[:rows] if shape and shape[0] == count else value
