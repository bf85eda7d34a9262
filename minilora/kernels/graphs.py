"""GPU: a training step as a CUDA graph.

Whoever records promises CUDA that the launches will find at every replay what they found: memory at the same addresses, numbers
in memory and not in the arguments of kernels. So the step's own memory comes from a pool that nobody else uses and that lives
as long as the graph; its arguments and the numbers that change (minilora/replay.py) lie in one block, which one copy fills
before every replay; and products go through `products`, as CuPy does not let its own be recorded.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy

from .. import backend, replay
from ..backend import override
from ..errors import MiniloraError, StateError
from ..graphs import played
from ..tensor import Tensor

__all__ = ["Played"]

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
        self.inputs = [self.view(start, host.dtype, host.shape) for start, host in zip(self.starts, hosts)]

    def view(self, start: int, dtype: Any, shape: tuple[int, ...]) -> Array:
        count = int(numpy.prod(shape, dtype="int64"))
        return self.memory[start:start + count * numpy.dtype(dtype).itemsize].view(dtype).reshape(shape)

    def next_slot(self) -> None:
        self.slot = (self.slot + 1) % SLOTS
        if self.copied[self.slot] is not None:
            self.copied[self.slot].synchronize()  # eight steps ago: over, as a rule

    def put(self, start: int, host: numpy.ndarray) -> None:
        self.slots[self.slot][start:start + host.nbytes].view(host.dtype)[...] = host.reshape(-1)

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


@override(played, device="gpu")
class Played:
    """The first call runs the step in the pool, the second records it, the others replay it."""

    def __init__(self, step: Callable[..., Any]) -> None:
        self.step = step
        self.xp = xp = backend.current_device().xp
        self.stream = xp.cuda.Stream(non_blocking=True)
        self.pool = xp.cuda.MemoryPool()
        self.kinds: list[Any] | None = None
        self.warmed: replay.Recording | None = None
        self.graph: Any = None

    def __call__(self, *arguments: Any) -> Any:
        kinds = [_kind(argument) for argument in arguments]
        if self.kinds is None:
            self.kinds = kinds
            self.block = Block(self.xp, [a for a in arguments if isinstance(a, numpy.ndarray)])
            rest = iter(self.block.inputs)
            self.inputs = [self.own(argument, rest) for argument in arguments]
        if replay.current() is not None or not _alike(kinds, self.kinds):
            return self.step(*(backend.to_device(a) if isinstance(a, numpy.ndarray) else a for a in arguments))
        if self.graph is not None and not self.recording.unchanged():
            self.graph = self.warmed = None
        self.fill(arguments)
        if self.warmed is None:
            return self.warm()
        if self.graph is None:
            self.capture()
        else:
            for action in self.recording.actions:
                action()
        stream = self.xp.cuda.get_current_stream()
        self.block.upload(stream)
        self.graph.launch(stream)
        for parameter, gathered in self.recording.settled.items():
            parameter.gathered = gathered
        return _copied(self.result)

    def own(self, argument: Any, rest: Any) -> Any:
        """What the step gets in the place of an argument: an array of the device that is filled before every call."""
        if isinstance(argument, numpy.ndarray):
            return next(rest)
        if isinstance(argument, Tensor):
            return Tensor(self.xp.empty_like(argument.data))
        return self.xp.empty_like(argument) if _on_device(argument) else argument

    def fill(self, arguments: Sequence[Any]) -> None:
        self.block.next_slot()
        starts = iter(self.block.starts)
        for argument, own in zip(arguments, self.inputs):
            if isinstance(argument, numpy.ndarray):
                self.block.put(next(starts), argument)
            elif isinstance(argument, Tensor):
                own.data[...] = argument.data
            elif _on_device(argument):
                own[...] = argument

    def warm(self) -> Any:
        """Run the step as it will be recorded: kernels are compiled, the pool has what it takes, numbers come from memory."""
        def allocate(count: int, dtype: Any) -> tuple[Array, Callable[[Sequence[float]], None]]:
            memory, fill = self.block.allocate(count, dtype)

            def fill_at_once(values: Sequence[float]) -> None:
                fill(values)
                self.block.upload(self.stream)
            return memory, fill_at_once

        self.block.used = self.block.numbers
        self.xp.cuda.get_current_stream().synchronize()
        with self.stream:
            self.block.upload(self.stream)
            if hasattr(self.xp, "products"):
                self.xp.products.follow()  # its workspace is not the pool's
            with self.xp.cuda.using_allocator(self.pool.malloc), replay.Recording(allocate) as recording:
                result = self.step(*self.inputs)
        self.stream.synchronize()
        self.warmed = recording
        return _copied(result)

    def capture(self) -> None:
        """Record the step: Python does all that it does in a step, the device nothing yet."""
        self.block.used = self.block.numbers
        before = {parameter: parameter.gathered for parameter in self.warmed.settled}  # type: ignore[union-attr]
        recording, collecting = replay.Recording(self.block.allocate), gc.isenabled()
        self.xp.cuda.get_current_stream().synchronize()
        gc.disable()  # what it frees might not be the pool's
        try:
            with self.stream, self.xp.cuda.using_allocator(self.pool.malloc):
                self.stream.begin_capture()
                try:
                    with recording:
                        self.result = self.step(*self.inputs)
                except BaseException:
                    with suppress(Exception):  # the stream must not record any longer; that the recording is broken is known
                        self.stream.end_capture()
                    raise
                self.graph = self.stream.end_capture()
        except BaseException as error:
            self.graph = self.warmed = None
            recording.take_back()
            for parameter, gathered in before.items():
                parameter.gathered = gathered
            if isinstance(error, MiniloraError) or not isinstance(error, Exception):
                raise
            raise StateError(f"record: the step cannot be recorded: {type(error).__name__}: {error}. While it is recorded, "
                             "nothing may wait for the GPU or copy between host and device, and products must be minilora's "
                             "own. Nothing has changed; call the step itself, without record, to train without a graph"
                             ) from error
        finally:
            if collecting:
                gc.enable()
        recording.settled = {parameter: parameter.gathered for parameter in recording.settled}
        self.recording = recording


def _on_device(argument: Any) -> bool:
    return not isinstance(argument, numpy.ndarray) and type(argument) in backend._by_type


def _kind(argument: Any) -> Any:
    """What must be equal in every call that a replay can stand for."""
    if isinstance(argument, (numpy.ndarray, Tensor)) or _on_device(argument):
        return type(argument), argument.shape, argument.dtype
    return argument


def _alike(kinds: list[Any], others: list[Any]) -> bool:
    return len(kinds) == len(others) and all(
        a is b or type(a) is type(b) and isinstance(a, (tuple, list, int, float, str)) and a == b
        for a, b in zip(kinds, others))


def _copied(result: Any) -> Any:
    """The caller's own: the next replay writes into the graph's."""
    if isinstance(result, Tensor):
        return Tensor(result.data.copy())
    if isinstance(result, (tuple, list)):
        return type(result)(_copied(part) for part in result)
    if isinstance(result, dict):
        return {key: _copied(part) for key, part in result.items()}
    return result.copy() if _on_device(result) else result
