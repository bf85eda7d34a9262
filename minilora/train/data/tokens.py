"""Tokens: rows of token ids as data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy

from ...errors import ConfigError, DTypeError, ShapeError
from ...settings import whole
from ..batch import Batch
from .buckets import in_batches, shuffled

__all__ = ["IGNORED", "Tokens"]

IGNORED = -100  # a label that counts nothing
MULTIPLE = 8  # batches are as long as a multiple of it

Array = Any


class Tokens:
    """Rows of token ids of different lengths, in batches of about one length.

    Parameters
    ----------
    rows : sequence of sequences of int
        At least one token each.
    learned : sequence of sequences of (int, int), optional
        For each row from and to which places its tokens are to be learned. By default all of them.
    answers : array, shape (n,) or (n, k), optional
        What is to be learned of each row, in place of its tokens: classes (integers) or numbers.
    pad_id : int
        What stands behind the end of a row that is shorter than its batch. Any id does: no token sees it.
    max_length : int, optional
        Batches are not padded beyond it.
    few_lengths : bool
        Batches come in few lengths: four in every octave, see the notes.

    Attributes
    ----------
    lengths : numpy.ndarray of int64, shape (n,)
    fingerprint : str

    Notes
    -----
    A batch's inputs are ``ids`` (B, T), ``key_padding`` (B, T), True for tokens, and ``labels``: (B, T), the ids where they are
    to be learned and -100 elsewhere, or the answers. T is a multiple of 8; with `few_lengths` one of 8, 16, 24, ... 64, then
    80, 96, 112, 128, then 160, ..., 28 lengths up to 2,048, for which a recorded run has a graph each, and at most a quarter
    longer than the longest row. The first token of a row is no target: there is nothing before it that it could be predicted
    from.

    Examples
    --------
    >>> data = Tokens([[1, 2, 3], [4, 5]], learned=[[(1, 3)], [(0, 2)]])
    >>> batch = data.batch([0, 1])
    >>> batch.inputs["labels"][:, :4]
    array([[-100,    2,    3, -100],
           [   4,    5, -100, -100]])
    >>> batch.targets, batch.tokens
    (3, 5)
    """

    def __init__(self, rows: Sequence[Sequence[int]], learned: Sequence[Sequence[tuple[int, int]]] | None = None, *,
                 answers: Any = None, pad_id: int = 0, max_length: int | None = None,
                 few_lengths: bool = False) -> None:
        self.lengths = numpy.fromiter(map(len, rows), "int64", len(rows))
        if not len(rows) or not self.lengths.all():
            raise ShapeError("Tokens: there are no rows" if not len(rows) else
                             f"Tokens: row {int(self.lengths.argmin())} has no tokens")
        self._starts = numpy.concatenate([[0], self.lengths.cumsum()])
        self._ids = flat(rows, int(self._starts[-1]))
        self.pad_id, self.max_length, self.few_lengths = whole("pad_id", pad_id, 0), max_length, bool(few_lengths)
        self.answers = None if answers is None else checked_answers(answers, len(rows))
        self._learned = numpy.full(len(self._ids), learned is None)
        for start, parts in zip(self._starts, learned or ()):
            for low, high in parts:
                self._learned[start + low:start + high] = True
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        return f"Tokens({len(self):,} rows, {len(self._ids):,} tokens, {self.total_targets:,} targets)"

    def _fingerprint(self) -> str:
        padded = " few lengths" if self.few_lengths else ""
        sha = hashlib.sha256(f"minilora.tokens/1 pad {self.pad_id} most {self.max_length}{padded}".encode())
        answers = numpy.zeros(0, "int64") if self.answers is None else self.answers
        for part in (self.lengths, self._ids, self._learned, answers):
            sha.update(f" {part.dtype.str} {part.shape} ".encode())
            sha.update(numpy.ascontiguousarray(part).data)
        return sha.hexdigest()

    def row(self, number: int) -> Array:
        """The token ids of a row."""
        return self._ids[self._starts[number]:self._starts[number + 1]].astype("int64")

    @property
    def total_targets(self) -> int:
        """The targets of all rows."""
        if self.answers is not None:
            return len(self)
        return int(self._learned.sum() - self._learned[self._starts[:-1]].sum())

    # -- as data ----------------------------------------------------------------------------------------------------

    def order(self, seed: int, epoch: int, batch_size: int) -> list[list[int]]:
        """The batches of an epoch as row numbers: every row once; see `buckets.shuffled`."""
        return shuffled(self.lengths, seed, epoch, batch_size)

    def in_order(self, batch_size: int) -> list[list[int]]:
        """Every row once, the longest first: what does not fit into memory shows at once."""
        return in_batches(numpy.argsort(-self.lengths, kind="stable"), batch_size)

    def targets(self, inputs: Mapping[str, Any]) -> int:
        """The targets in a batch's inputs, or in a part of its rows."""
        labels = inputs["labels"]
        return len(labels) if self.answers is not None else int((labels[:, 1:] != IGNORED).sum())

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows with these numbers, padded at the right."""
        lengths = self.lengths[list(rows)]
        ids = numpy.full((len(lengths), self._width(lengths)), self.pad_id, "int64")
        labels = numpy.full(ids.shape, IGNORED, "int64")
        for i, (row, n) in enumerate(zip(rows, lengths)):
            place = slice(self._starts[row], self._starts[row] + n)
            ids[i, :n] = self._ids[place]
            labels[i, :n][self._learned[place]] = ids[i, :n][self._learned[place]]
        wanted = labels if self.answers is None else self.answers[list(rows)]
        inputs = {"ids": ids, "key_padding": numpy.arange(ids.shape[1]) < lengths[:, None], "labels": wanted}
        return Batch(inputs, self.targets(inputs), int(lengths.sum()))

    def _width(self, lengths: Array) -> int:
        """The longest row, rounded up as the notes say, but not beyond max_length."""
        longest = int(lengths.max(initial=1))
        multiple = max(MULTIPLE, 1 << (longest - 1).bit_length() >> 3) if self.few_lengths else MULTIPLE
        rounded = -(-longest // multiple) * multiple
        return rounded if self.max_length is None else max(longest, min(rounded, self.max_length))


def flat(rows: Sequence[Sequence[int]], count: int) -> Array:
    """All ids in one array of int32, after one another."""
    try:
        ids = numpy.fromiter(chain.from_iterable(rows), "int64", count)
    except (TypeError, ValueError) as error:
        raise DTypeError(f"Tokens: expected rows of token ids, whole numbers: {error}") from error
    if ids.min() < 0 or ids.max() >= 1 << 31:
        raise DTypeError(f"Tokens: token ids are from 0 to 2^31 - 1, and here are {ids.min()} to {ids.max()}")
    return ids.astype("int32")


def checked_answers(answers: Any, rows: int) -> Array:
    """Answers as an array with an entry for each row, integers as int64 and numbers as float32."""
    array = numpy.asarray(answers)
    if array.dtype.kind not in "iuf" or array.ndim not in (1, 2) or len(array) != rows:
        raise ShapeError(f"Tokens: expected an answer for each of {rows} rows, a class or numbers, got {array.dtype} "
                         f"{array.shape}")
    if not numpy.isfinite(array).all():
        raise ConfigError(f"Tokens: the answer of row {int(numpy.argwhere(~numpy.isfinite(array))[0, 0])} is not finite")
    return array.astype("int64" if array.dtype.kind in "iu" else "float32")
