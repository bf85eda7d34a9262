"""GPU: a training step as CUDA graphs, one for each kind of arguments and each state of what it reads from Python."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from ... import backend
from ...backend import override
from ...graphs import played
from ...recording import watcher
from ...tensor import Parameter, Tensor
from .block import from_host, in_columns, on_device
from .take import Take, built

__all__ = ["Played"]


@override(played, device="gpu")
class Played:
    """Looks for the take that fits a call, and makes one where there is room."""

    def __init__(self, step: Callable[..., Any], most: int, idle: int) -> None:
        self.step, self.most, self.idle = step, most, idle
        self.xp = xp = backend.current_device().xp
        self.stream = xp.cuda.Stream(non_blocking=True)
        self.pool = xp.cuda.MemoryPool(functools.partial(more, xp))
        self.takes: dict[Any, list[Take]] = {}
        self.calls = 0
        self.last: Any = None  # the stream of the last call
        self.lock = threading.RLock()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        leaves: list[Any] = []
        key = kind_of(arguments, leaves), kind_of(named, leaves)
        looked_at = watcher.get() is not None  # somebody wants to see every operation
        if looked_at or [leaf for leaf in leaves if type(leaf) is Tensor and leaf.node is not None]:
            return self.called(arguments, named, leaves)  # and gradients that leave the step do so in the caller's graph
        with self.lock:
            take = self.take_for(key, (arguments, named))
            if take is None:
                return self.called(arguments, named, leaves)
            stream = self.follow()
            try:
                return take(leaves, stream)
            finally:
                if take.recording is None:
                    self.drop(take)

    @property
    def graphs(self) -> int:
        return sum(take.graph is not None for takes in self.takes.values() for take in takes)

    def called(self, arguments: Any, named: Any, leaves: Sequence[Any]) -> Any:
        """The step as it is."""
        moved = iter([backend.to_device(a) if from_host(a) else a for a in leaves])
        arguments, named = built((arguments, named), moved)
        return self.step(*arguments, **named)

    def take_for(self, key: Any, arguments: Any) -> Take | None:
        """The take that fits, or a new one; None where there is no room for one."""
        self.calls += 1
        for take in self.takes.get(key, ()):
            if take.fits():
                break
        else:
            every = [one for takes in self.takes.values() for one in takes]
            if len(every) >= self.most:
                oldest = min(every, key=lambda one: one.used)
                if self.calls - oldest.used <= self.idle:
                    return None
                self.last.synchronize()  # nothing that is about to go is still running
                self.drop(oldest)
            take = Take(self.xp, self.step, arguments, self.stream, self.pool)
            self.takes.setdefault(key, []).append(take)
        take.used = self.calls
        return take

    def drop(self, take: Take) -> None:
        self.takes = {key: kept for key, takes in self.takes.items() if (kept := [one for one in takes if one is not take])}

    def follow(self) -> Any:
        """The stream of this call, which waits for that of the last one, whose memory it uses."""
        stream = self.xp.cuda.get_current_stream()
        if self.last is not None and self.last.ptr != stream.ptr:
            so_far = self.xp.cuda.Event(disable_timing=True)
            so_far.record(self.last)
            stream.wait_event(so_far)
        self.last = stream
        return stream


def more(xp: Any, size: int) -> Any:
    """Memory for the pool. CuPy's own allocator would free, where there is none left, what only graphs use now."""
    try:
        return xp.cuda.MemoryPointer(xp.cuda.Memory(size), 0)
    except xp.cuda.runtime.CUDARuntimeError:
        xp.get_default_memory_pool().free_all_blocks()  # which CuPy keeps for later, and nobody uses
    try:
        return xp.cuda.MemoryPointer(xp.cuda.Memory(size), 0)
    except xp.cuda.runtime.CUDARuntimeError as error:
        raise MemoryError(f"record: the GPU has no room for {size:,} bytes more beside what the graphs of this step hold: make "
                          "batches smaller, or call the step itself, without record") from error


def kind_of(value: Any, leaves: list[Any]) -> Any:
    """What must be equal in every call that a take can stand for, as the key of a dict; its leaves (`leaves_of`) are added."""
    kind = type(value)
    if kind is not numpy.ndarray:  # the usual case
        if isinstance(value, (tuple, list)):
            return kind, tuple([kind_of(part, leaves) for part in value])
        if isinstance(value, dict):
            return kind, tuple([(key, kind_of(part, leaves)) for key, part in value.items()])
    leaves.append(value)
    if from_host(value):
        return kind, value.shape, value.dtype, in_columns(value)
    if kind is Tensor:
        return Tensor, value.shape, value.dtype, strides_of(value.data)
    if on_device(value):
        return kind, value.shape, value.dtype, strides_of(value)
    if isinstance(value, (bool, int, float, complex, str, bytes, numpy.generic)):
        return kind, repr(value)  # tells 0.0 from -0.0
    return Parameter if isinstance(value, Parameter) else kind, Same(value)


def strides_of(array: Any) -> Any:
    return getattr(array, "strides", None)


class Same:
    """An object, equal to itself alone, and alive as long as it is a key."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)
