"""Arrays of a device added up over processes without a way through the host. A device that can has an override of `links`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from .errors import DeviceError

__all__ = ["Links", "links"]

Array = Any


class Links(Protocol):
    """What connects this process's device with those of the others."""

    def sum_(self, flat: Array) -> None:
        """Put the sum over all processes in the place of a contiguous array of the device."""

    def broadcast_(self, flat: Array) -> None:
        """Put rank 0's numbers in the place of such an array."""

    def abort(self) -> None:
        """Give up what is under way."""


def links(rank: int, size: int, from_first: Callable[[bytes], bytes], gathered: Callable[[str], list[str]]) -> Links:
    """Connect the devices of several processes; all of them call it.

    Parameters
    ----------
    rank, size : int
    from_first : callable
        Gives every process the bytes that rank 0 calls it with.
    gathered : callable
        Gives every process the texts of all, in the order of their ranks.

    Raises
    ------
    DeviceError
        If the device has no such links, as this reference has none; or if two processes compute on one device.
    """
    raise DeviceError("this device cannot add up its arrays over processes: only the GPU can, by NCCL, and with kernels on "
                      "(MINILORA_KERNELS=on, or minilora.use(\"gpu\", kernels=True))")
