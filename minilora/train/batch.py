"""What the loop asks of data: batches by number, in an order that a seed and an epoch fix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

__all__ = ["Batch", "Data"]


class Batch(NamedTuple):
    """Rows of data as a model takes them.

    Attributes
    ----------
    inputs : dict
        Keyword arguments of the model, host arrays that share the first axis: for a model of `minilora.models` ``ids``,
        ``key_padding`` and ``labels``. For other models whatever the loss function of `fit` reads.
    targets : int
        How many targets the mean loss is over: tokens, texts, or rows. Known before the forward pass, so that several batches,
        and several processes, can be weighted by it. 0 for a batch that has none.
    tokens : int
        How many numbers of the input were read, padding not counted: for tokens/s.
    """

    inputs: Mapping[str, Any]
    targets: int
    tokens: int


class Data(Protocol):
    """A set of rows. `minilora.train.data` makes such objects out of files and arrays.

    Attributes
    ----------
    fingerprint : str
        SHA-256, as hexadecimal digits, of all that batches are made from: a resumed run must have the same.
    """

    fingerprint: str

    def __len__(self) -> int:
        """The number of rows."""

    def order(self, seed: int, epoch: int, batch_size: int) -> Sequence[Sequence[int]]:
        """The batches of an epoch as row numbers: a pure function of its arguments, each row at most once."""

    def in_order(self, batch_size: int) -> Sequence[Sequence[int]]:
        """Every row once, for an evaluation."""

    def targets(self, inputs: Mapping[str, Any]) -> int:
        """The targets in a batch's inputs, or in a part of its rows."""

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows with these numbers; of no rows, an empty batch of 0 targets."""
