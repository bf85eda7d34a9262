"""What the kinds of storage share: they hold arrays of one device."""

from __future__ import annotations

from typing import Any

from ..backend import Device, device_of
from ..stored import Stored

__all__ = ["Packed"]

Array = Any


class Packed(Stored):
    """A stored matrix that lives where its arrays live."""

    @property
    def device(self) -> Device:
        return device_of(next(iter(self.arrays().values())))
