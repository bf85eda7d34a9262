"""What processes that train together say to each other; and the run that is alone."""

from __future__ import annotations

from typing import Any, NoReturn, Protocol

__all__ = ["Comm", "Serial"]

Array = Any


class Comm(Protocol):
    """Processes that hold the same model, and add up their gradients.

    Attributes
    ----------
    rank, size : int
        Which process this is, from 0, and of how many.
    local_rank, local_size : int
        The same among those on this machine.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int

    def sum_(self, flat: Array) -> None:
        """Put the sum over all processes in the place of a contiguous array: the same bits in each of them."""

    def broadcast_(self, flat: Array) -> None:
        """Put rank 0's numbers in the place of a contiguous array."""

    def barrier(self) -> None:
        """Wait until every process is here."""

    def abort(self, status: int) -> NoReturn:
        """End all processes at once, with this exit status."""


class Serial:
    """One process: every sum is complete already."""

    rank, size, local_rank, local_size = 0, 1, 0, 1

    def sum_(self, flat: Array) -> None:
        """Nothing to add."""

    def broadcast_(self, flat: Array) -> None:
        """Nobody to tell."""

    def barrier(self) -> None:
        """Nobody to wait for."""

    def abort(self, status: int) -> NoReturn:
        """End this process."""
        raise SystemExit(status)
