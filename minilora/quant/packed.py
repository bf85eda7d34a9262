"""What the kinds of storage share: they hold arrays of one device."""

from __future__ import annotations

from typing import Any

from ..backend import Device, device_of
from ..stored import Stored

__all__ = ["Packed"]

Array = Any


class Packed(Stored):
    """A stored matrix that lives where its arrays live.

    Attributes
    ----------
    coarse : bool
        Whether its numbers are so far apart that a sum of it and an update would lose the update, rounded to them again. Such
        a kind has a method ``like(W)``: another matrix held as this one is.
    """

    coarse = False

    @property
    def device(self) -> Device:
        return device_of(next(iter(self.arrays().values())))
