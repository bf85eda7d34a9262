"""The numbers of a weight for merging, on the host, and back into what holds them: an array, or a weight in 16 bits."""

from __future__ import annotations

from typing import Any

import numpy

from ... import backend
from ...stored import Stored

__all__ = ["held_like", "make_read_only", "numbers_of"]

Array = Any


def numbers_of(weight: Array) -> numpy.ndarray:
    """A weight as merging rounds to it: the array itself where it lies on the host; of one held in 16 bits, these."""
    return weight.numbers if isinstance(weight, Stored) else backend.to_host(weight)


def held_like(weight: Array, new: numpy.ndarray) -> Array:
    """New numbers for a weight, of its size and dtype, held as it is and where it is."""
    new = new.reshape(weight.shape)
    return weight.like(new) if isinstance(weight, Stored) else backend.to_device(new, backend.device_of(weight))


def make_read_only(weight: Array) -> None:
    """What is written to a weight while something is merged into it would be lost."""
    for array in weight.arrays().values() if isinstance(weight, Stored) else [weight]:
        if isinstance(array, numpy.ndarray):
            array.flags.writeable = False
