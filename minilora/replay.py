"""What a recorded training step has to do anew at every replay: for those whose numbers change from step to step.

A recorded step (`minilora.record`) is a list of launches that the device repeats without Python. So what Python would do
between them is told to the `Recording` that is current in this thread while the step runs: numbers that come from memory which
is filled before every replay (`changing`), counters (`repeat`), and what must be as it was (`expect`). Without a recording all
this costs a look.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from .errors import StateError

__all__ = ["Recording", "changing", "current", "expect", "refuse_waiting", "repeat"]

Array = Any


class Recording:
    """What one run of a step has told.

    Attributes
    ----------
    actions : list of callable
        To be called before a replay, in this order.
    undo : list of callable
        What takes back the actions of this run, should the recording fail.
    guards : list of (callable, value)
        The replay is right only as long as each gives its value.
    settled : dict
        Parameter -> its `gathered`, as the step leaves it.
    zeroed : set
        Parameters whose gradient the step itself has forgotten.
    """

    def __init__(self, allocate: Callable[[int, Any], tuple[Array, Callable[[Sequence[float]], None]]]) -> None:
        self.allocate = allocate  # (how many, dtype) -> memory of the device, and what fills it
        self.actions: list[Callable[[], None]] = []
        self.undo: list[Callable[[], None]] = []
        self.guards: list[tuple[Callable[[], Any], Any]] = []
        self.settled: dict[Any, Array | None] = {}
        self.zeroed: set[Any] = set()

    def __enter__(self) -> Recording:
        self.before, _state.current = _state.current, self
        return self

    def __exit__(self, *error: object) -> None:
        _state.current = self.before

    def unchanged(self) -> bool:
        return all(_same(ask(), value) for ask, value in self.guards)

    def take_back(self) -> None:
        for action in reversed(self.undo):
            action()


class _State(threading.local):
    current: Recording | None = None


_state = _State()


def _same(one: Any, other: Any) -> bool:
    return one is other or bool(type(one) is type(other) and isinstance(one, (tuple, float, int, str, bool)) and one == other)


def current() -> Recording | None:
    """The recording of this thread; None outside of all, which is the usual case."""
    return _state.current


def changing(compute: Callable[[], tuple[Any, ...]], dtype: Any, undo: Callable[[], None] | None = None) -> Sequence[Any]:
    """The numbers that `compute` gives: as they are, or while a step is recorded arrays () of the device that hold them.

    These are computed again, and the arrays filled, before every replay. `undo` takes back what `compute` has done once.
    """
    recording = _state.current
    if recording is None:
        return compute()
    values = compute()
    recording.undo += [] if undo is None else [undo]
    memory, fill = recording.allocate(len(values), dtype)
    fill(values)
    recording.actions.append(lambda: fill(compute()))
    return [memory[i:i + 1].reshape(()) for i in range(len(values))]


def repeat(action: Callable[[], None], undo: Callable[[], None]) -> None:
    """Do this before every replay, too; `undo` takes back once what this run has done."""
    recording = _state.current
    if recording is not None:
        recording.actions.append(action)
        recording.undo.append(undo)


def expect(ask: Callable[[], Any]) -> None:
    """A replay is right only as long as this gives what it gives now: tuples and numbers by value, others by identity."""
    recording = _state.current
    if recording is not None:
        recording.guards.append((ask, ask()))


def refuse_waiting(call: str) -> None:
    """Raise `StateError` while a step is recorded: what crosses from or to the host would be done once and never again."""
    if _state.current is not None:
        raise StateError(f"record: the step calls {call}, which copies between host and device: a replay would not do it "
                         "again. Give the step what it needs as arguments, make other constants before, and read results "
                         "(item, float, numpy, print) of what the step returns, outside of it")
