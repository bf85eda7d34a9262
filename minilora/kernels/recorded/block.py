"""GPU: what a recorded step reads anew at every replay, in one block of the device's memory: its arguments and its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy

from ... import backend
from ...errors import StateError

__all__ = ["Block", "from_host", "in_columns", "on_device"]

Array = Any

ALIGNED = 256  # bytes: where CUDA's own memory begins
NUMBERS = 1 << 16  # bytes for numbers that change: some thousands; only those in use are copied
SLOTS = 8  # host copies of the block: so far the host may run ahead


class Block:
    """Arguments and changing numbers side by side in the device's memory, and pinned host memory that one copy takes there."""

    def __init__(self, xp: Any, hosts: Sequence[numpy.ndarray]) -> None:
        self.starts: list[int] = []
        self.used = 0
        for host in hosts:
            self.starts.append(self.used)
            self.used += -(-host.nbytes // ALIGNED) * ALIGNED
        size = self.used + NUMBERS
        self.numbers, self.limit = self.used, size
        self.memory = xp.empty(size, dtype="uint8")
        self.copy = self.memory.data.copy_from_host_async
        pinned = [xp.cuda.alloc_pinned_memory(size) for _ in range(SLOTS)]
        self.slots = [numpy.frombuffer(memory, "uint8", size) for memory in pinned]
        self.addresses = [slot.ctypes.data for slot in self.slots]
        self.copied = [xp.cuda.Event(disable_timing=True) for _ in range(SLOTS)]  # the copy from there is over
        self.slot = 0
        self.inputs = [like(self.memory, start, host) for start, host in zip(self.starts, hosts)]
        self.places = [[like(slot, start, host) for start, host in zip(self.starts, hosts)] for slot in self.slots]

    def next_slot(self) -> list[numpy.ndarray]:
        """Go on to the next slot, and give the places of the arguments there."""
        self.slot = slot = (self.slot + 1) % SLOTS
        self.copied[slot].synchronize()  # eight steps ago: over, as a rule
        return self.places[slot]

    def allocate(self, count: int, dtype: Any) -> tuple[Array, Callable[[Sequence[float]], None]]:
        """Room for numbers, and what puts them into the slot of the moment."""
        start, kind = self.used, numpy.dtype(dtype)
        if start + count * kind.itemsize > self.limit:
            raise StateError(f"record: the numbers that change from call to call of this step take more than {NUMBERS} bytes")
        self.used += -(-count * kind.itemsize // 16) * 16
        places = [view(slot, start, kind, (count,)) for slot in self.slots]

        def put(values: Sequence[float]) -> None:
            places[self.slot][:] = values
        return view(self.memory, start, kind, (count,)), put

    def upload(self, stream: Any) -> None:
        """Queue the copy of all that is in use."""
        slot = self.slot
        if self.used:
            self.copy(self.addresses[slot], self.used, stream)
        self.copied[slot].record(stream)


def view(memory: Array, start: int, dtype: Any, shape: tuple[int, ...]) -> Array:
    count = int(numpy.prod(shape, dtype="int64"))
    return memory[start:start + count * numpy.dtype(dtype).itemsize].view(dtype).reshape(shape)


def like(memory: Array, start: int, host: numpy.ndarray) -> Array:
    """A view of the memory that is laid out as an array of the host."""
    shape = host.shape[::-1] if in_columns(host) else host.shape
    laid = view(memory, start, host.dtype, shape)
    return laid.T if in_columns(host) else laid


def from_host(argument: Any) -> bool:
    """Whether an argument is an array of the host that a device can hold: of numbers, not of text, dates or objects."""
    return isinstance(argument, numpy.ndarray) and argument.dtype.kind in "biufcV" and argument.dtype.names is None


def on_device(argument: Any) -> bool:
    return not isinstance(argument, numpy.ndarray) and type(argument) in backend._by_type


def in_columns(host: numpy.ndarray) -> bool:
    """Whether an array lies column after column, as it will on the device: products may round by that."""
    return bool(host.flags.fnc)
