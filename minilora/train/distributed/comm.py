"""What processes that train together say to each other; and the run that is alone."""

from __future__ import annotations

from types import TracebackType
from typing import Any, NoReturn, Protocol

from ... import parallel

__all__ = ["Comm", "Serial"]

Array = Any


class Comm(Protocol):
    """Processes that hold the same model, and add up their gradients.

    In a ``with`` statement what only rank 0 prints is seen, and an error of one process ends all of them: it does not leave the
    others waiting for its next message. `str` of it says in one line who takes part.

    Attributes
    ----------
    rank, size : int
        Which process this is, from 0, and of how many.
    local_rank, local_size : int
        The same among those on this machine.
    cores : int
        This process's share of the machine's cores.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    cores: int

    def sum_(self, flat: Array) -> None:
        """Put the sum over all processes in the place of a contiguous array: the same bits in each of them.

        float32, float64 or int64, of the same size everywhere; a host array, or one of the device that this was made for.
        """

    def broadcast_(self, flat: Array) -> None:
        """Put rank 0's numbers in the place of such an array."""

    def barrier(self) -> None:
        """Wait until every process is here."""

    def abort(self, status: int) -> NoReturn:
        """End all processes at once, with this exit status."""

    def __enter__(self) -> Comm:
        """Begin what all do together."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End it, and all processes with it after an error that is not everybody's."""


class Serial:
    """One process: every sum is complete already."""

    rank, size, local_rank, local_size = 0, 1, 0, 1

    def __init__(self) -> None:
        self.cores = parallel.cores()

    def __str__(self) -> str:
        return "one process"

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nobody waits: the error goes its way."""

    def sum_(self, flat: Array) -> None:
        """Nothing to add."""

    def broadcast_(self, flat: Array) -> None:
        """Nobody to tell."""

    def barrier(self) -> None:
        """Nobody to wait for."""

    def abort(self, status: int) -> NoReturn:
        """End this process."""
        raise SystemExit(status)
