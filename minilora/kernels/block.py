"""GPU: what a recorded step reads anew at every replay, in one block of the device's memory: its arguments and its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy

from ..errors import StateError

__all__ = ["Block"]

Array = Any

ALIGNED = 256  # bytes: where CUDA's own memory begins
NUMBERS = 1 << 16  # bytes for numbers that change: some thousands; only those in use are copied
SLOTS = 8  # host copies of the block: so far the host may run ahead


class Block:
    """Arguments and changing numbers side by side in the device's memory, and pinned host memory that one copy takes there."""

    def __init__(self, xp: Any, hosts: Sequence[numpy.ndarray]) -> None:
        self.xp = xp
        self.starts: list[int] = []
        self.used = 0
        for host in hosts:
            self.starts.append(self.used)
            self.used += -(-host.nbytes // ALIGNED) * ALIGNED
        size = self.used + NUMBERS
        self.numbers, self.limit = self.used, size
        self.memory = xp.empty(size, dtype="uint8")
        pinned = [xp.cuda.alloc_pinned_memory(size) for _ in range(SLOTS)]
        self.slots = [numpy.frombuffer(memory, "uint8", size) for memory in pinned]
        self.copied: list[Any] = [None] * SLOTS  # an event each: the copy from there is over
        self.slot = 0
        self.inputs = [self.view(start, host.dtype, host.shape[::-1]).T if in_columns(host) else
                       self.view(start, host.dtype, host.shape) for start, host in zip(self.starts, hosts)]

    def view(self, start: int, dtype: Any, shape: tuple[int, ...]) -> Array:
        count = int(numpy.prod(shape, dtype="int64"))
        return self.memory[start:start + count * numpy.dtype(dtype).itemsize].view(dtype).reshape(shape)

    def next_slot(self) -> None:
        self.slot = (self.slot + 1) % SLOTS
        if self.copied[self.slot] is not None:
            self.copied[self.slot].synchronize()  # eight steps ago: over, as a rule

    def put(self, start: int, host: numpy.ndarray) -> None:
        self.slots[self.slot][start:start + host.nbytes].view(host.dtype)[...] = host.reshape(-1, order="A")

    def allocate(self, count: int, dtype: Any) -> tuple[Array, Callable[[Sequence[float]], None]]:
        """Room for numbers, and what puts them into the slot of the moment."""
        start, kind = self.used, numpy.dtype(dtype)
        if start + count * kind.itemsize > self.limit:
            raise StateError(f"record: the numbers that change from call to call of this step take more than {NUMBERS} bytes")
        self.used += -(-count * kind.itemsize // 16) * 16
        return self.view(start, kind, (count,)), lambda values: self.put(start, numpy.array(values, kind))

    def upload(self, stream: Any) -> None:
        """Queue the copy of all that is in use."""
        host = self.slots[self.slot]
        if self.used:
            self.memory.data.copy_from_host_async(host.ctypes.data, self.used, stream)
        self.copied[self.slot] = event = self.xp.cuda.Event(disable_timing=True)
        event.record(stream)


def in_columns(host: numpy.ndarray) -> bool:
    """Whether an array lies column after column, as it will on the device: products may round by that."""
    return host.flags.f_contiguous and not host.flags.c_contiguous
