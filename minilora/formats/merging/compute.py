"""One tensor of a merge, from the mapped file to where it goes, within a bound on the memory of all that run at once."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy

from ...errors import ConfigError, MiniloraError
from ...lora.merging.arithmetic import Rows, blocks, rows_of_block
from ...lora.merging.blockwise import merged_blocks, not_finite
from ...lora.merging.report import Sums, WeightReport
from .checkpoint import Checkpoint
from .fitting import FOUR_BITS
from .patch import PatchWriter
from .plan import Piece, rows_of
from .rows import Kept
from .sinks import STEP, Sink

__all__ = ["Budget", "Computing"]

COPIES = 6  # of the factors: as the file has them, widened, put together, and as the arithmetic has them
BLOCKS = 64  # bytes for each number of a block: some fifteen arrays of it


class Budget:
    """Bytes of memory, taken by one tensor and given back for another."""

    def __init__(self, memory: int) -> None:
        self.memory = self._left = memory
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Wait until so many bytes are left, and have them for the block."""
        with self._changed:
            self._changed.wait_for(lambda: self._left >= count)
            self._left -= count
        try:
            yield
        finally:
            with self._changed:
                self._left += count
                self._changed.notify_all()


def needed(piece: Piece, base: Checkpoint) -> int:
    """The private memory that a tensor needs at most, in bytes: it grows with A and B, and not with the tensor.

    But for a 4-bit weight of which the unquantised file has the transpose: that is decoded as a whole.
    """
    columns = int(numpy.prod(piece.shape[1:], dtype="int64")) if len(piece.shape) > 1 else 1
    block = min(rows_of_block((1, columns)) * columns, int(numpy.prod(piece.shape, dtype="int64")))
    factors = piece.site.numbers() if piece.site is not None else 0
    double = 2 if "F64" in (piece.dtype, piece.was) else 1
    whole = piece.was in FOUR_BITS and str(piece.source).endswith(base.state.turned)
    decoded = 4 * int(numpy.prod(piece.shape, dtype="int64")) if whole else 0
    return double * (BLOCKS * block + 4 * COPIES * factors) + decoded


class Outcome(NamedTuple):
    """What a tensor gave: its report, if it was merged."""

    piece: Piece
    report: WeightReport | None


@dataclass
class Computing:
    """What is the same for all tensors of a merge. Called with each of them, in any thread.

    Attributes
    ----------
    base : Checkpoint
    sink : Sink
    rounding : {"nearest", "stochastic"}
    seed : int
    budget : Budget
    patch : PatchWriter or None
    progress : callable or None
        Called with the name and the bytes of every tensor that is done.
    """

    base: Checkpoint
    sink: Sink
    rounding: str
    seed: int
    budget: Budget
    patch: PatchWriter | None = None
    progress: Any = None
    reports: bool = True

    def __post_init__(self) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self._lock = threading.Lock()

    def check(self, pieces: list[Piece]) -> None:
        """Raise unless every tensor has room by itself."""
        worst = max(pieces, key=lambda piece: needed(piece, self.base), default=None)
        if worst is not None and (most := needed(worst, self.base)) > self.budget.memory:
            raise ConfigError(f"memory: {worst.name} needs {-(-most // 2**20)} MB (a block of rows and its A and B), "
                              f"and memory is {self.budget.memory / 2**20:g} MB: give more")

    def __call__(self, piece: Piece) -> None:
        try:
            with self.budget.taken(needed(piece, self.base)), numpy.errstate(all="ignore"):  # overflow is found, and named
                report = self._computed(piece)
        except MiniloraError as error:
            raise type(error)(f"{piece.name}: {error}") from error
        with self._lock:
            self.outcomes[piece.name] = Outcome(piece, report)
            if self.progress is not None:
                self.progress(piece.name, piece.nbytes)

    def _computed(self, piece: Piece) -> WeightReport | None:
        if piece.copied:
            self.sink.copy(piece, self.base.state)
            if self.patch is not None:
                self.patch.copied(piece, self._digest(piece.name))
            return None
        if piece.fresh:
            self._fresh(piece)
            return None
        W, dtype, wide = rows_of(piece, self.base)
        factors = piece.site.factors(self.base.state) if piece.site is not None else None
        D: Rows = Kept() if piece.site is None else piece.site.rows(W.shape, wide, factors)
        sums = Sums() if factors is not None and self.reports else None
        rounding = "nearest" if dtype == wide or factors is None else self.rounding
        room = self.patch.room(piece) if self.patch is not None and piece.name in self.base.state else None
        done, size = 0, max(1, W.shape[1])
        for block in merged_blocks(W, D, dtype, wide, rounding, self.seed, piece.stream, sums, room is not None):
            self.sink.rows(piece, block.low * size * dtype.itemsize, block.after)
            if room is not None:
                room.add(block.before, block.after, block.correction)
            if (block.high * size - done) * W.dtype.itemsize >= STEP or block.high == len(W):
                self._let_go(piece, done * W.dtype.itemsize, block.high * size * W.dtype.itemsize)
                done = block.high * size
        if room is not None:
            room.close(rows_of_block(W.shape), wide, factors)
        bits = 8 * room.nbytes / max(1, W.size) if room is not None else 0.0
        return None if sums is None else sums.report(piece.shape, dtype.name, rounding, bits)._replace(path=piece.name)

    def _let_go(self, piece: Piece, begin: int, end: int) -> None:
        assert piece.source is not None
        self.base.state.let_go(piece.source, begin, end)

    def _fresh(self, piece: Piece) -> None:
        given, dtype, wide = rows_of(piece, self.base)
        for low, high in blocks(given.shape, rows_of_block(given.shape)):
            block = numpy.ascontiguousarray(given[low:high]).astype(dtype)
            if not numpy.isfinite(block.astype(wide)).all():
                raise not_finite("tensor", {"array": given}, f"it overflows {dtype}")
            self.sink.rows(piece, low * given.shape[1] * dtype.itemsize, block)
        if self.patch is not None and piece.name in self.base.state:
            self.patch.original(piece, self.base.state[piece.name], self._digest(piece.name))

    def _digest(self, name: str) -> str:
        """SHA-256 of the bytes of a tensor of the base."""
        found = hashlib.sha256()
        part, entry = self.base.state.place(name)
        start = part.header.start + entry.begin
        for begin in range(0, entry.end - entry.begin, STEP):
            n = min(STEP, entry.end - entry.begin - begin)
            found.update(memoryview(part.data)[start + begin:start + begin + n])
            self.base.state.let_go(name, begin, begin + n)
        return found.hexdigest()
