"""What a recorded training step has to do anew at every replay, and what it relies on.

A recorded step (`minilora.record`) is a list of launches that the device repeats without Python. So what Python would do
between them is told to the `Recording` that is current in this thread while the step runs: numbers that come from memory which
is filled before every replay (`changing`), counters (`repeat`), what must be as it was (`expect`, `reads`), and gradients that
the step finds or leaves (`found_gradient`, `left_gradient`). Without a recording all this costs a look.
"""

from __future__ import annotations

import math
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

from .errors import StateError

__all__ = ["CONTAINERS", "MAPPINGS", "Recording", "changing", "current", "expect", "found_gradient", "left_gradient", "reads",
           "refuse_waiting", "repeat"]

Array = Any
NUMBERS = (bool, int, float, complex, str, bytes)
MAPPINGS = (dict, types.MappingProxyType)
CONTAINERS = (list, tuple, set, deque, *MAPPINGS)
STATE = attrgetter("data", "trainable")


class Guard(NamedTuple):
    """What a step relies on.

    Attributes
    ----------
    name : str or tuple of str
        What it is, in words; or what each of the values is.
    ask : callable
        Gives it, as a tuple.
    kept : tuple
    before, after : bool
        Whether it must be so before each replay; whether the step itself must leave it so.
    """

    name: str | tuple[str, ...]
    ask: Callable[[], tuple[Any, ...]]
    kept: tuple[Any, ...]
    before: bool
    after: bool

    def changes(self) -> list[str]:
        now = self.ask()
        if same(now, self.kept):
            return []
        if isinstance(self.name, str):
            return [self.name]
        return [name for name, one, other in zip(self.name, now, self.kept) if not _same(one, other)]


class Held(NamedTuple):
    """A dict, a list, a set or a deque, and what it held."""

    name: str
    container: Any
    kept: tuple[Any, ...]


class Known(NamedTuple):
    """What a recording compares before a replay, laid out so that one pass over objects does it."""

    parameters: list[Any]
    states: list[Any]  # the array and the flag of each, one behind the other
    guards: list[tuple[Callable[[], tuple[Any, ...]], tuple[Any, ...]]]  # what is asked, and what it must give
    containers: list[Any]
    lengths: list[int]  # how many entries each has
    parts: list[Iterable[Any]]  # the containers, and behind each dict its values
    objects: list[Any]  # what all of these hold, one behind the other


class Recording:
    """What one run of a step has told.

    Attributes
    ----------
    actions : list of (callable, callable)
        To be called before a replay, in this order, each with what gives a picture of all that it changes: a callable that
        puts it back.
    guards : list of Guard
        The replay is right only as long as each gives what it gave.
    held : list of Held
        Containers that the step reads, which must hold what they held.
    parameters : dict
        Parameter -> its array and whether it is trainable, for all that operations were given.
    settled : dict
        Parameter -> its `gathered`, as the step leaves it, for all whose gradient it reads or writes.
    """

    def __init__(self, allocate: Callable[[int, Any], tuple[Array, Callable[[Sequence[float]], None]]]) -> None:
        self.allocate = allocate  # (how many, dtype) -> memory of the device, and what fills it
        self.actions: list[tuple[Callable[[], Any], Callable[[], Any]]] = []
        self.guards: list[Guard] = []
        self.held: list[Held] = []
        self.parameters: dict[Any, tuple[Array, bool]] = {}
        self.settled: dict[Any, Array | None] = {}
        self.known: Known | None = None  # made of all of these by `unchanged`, until there are more
        self.seen: set[int] = set()  # ids of what stands in `guards`, which keep it alive

    def __enter__(self) -> Recording:
        self.before, _state.current = _state.current, self
        return self

    def __exit__(self, *error: object) -> None:
        _state.current = self.before

    def rely(self, name: Any, ask: Callable[[], tuple[Any, ...]], before: bool = True, after: bool = True) -> None:
        self.guards.append(Guard(name, ask, ask(), before, after))
        self.known = None

    def holds(self, name: str, container: Any) -> None:
        self.held.append(Held(name, container, contents(container)))
        self.known = None

    def reads_parameter(self, parameter: Any) -> None:
        self.parameters.setdefault(parameter, STATE(parameter))
        self.known = None

    def unchanged(self) -> bool:
        """Whether the step would do now what it did then."""
        known = self.known = self.known or self.know()
        parameters, states, guards, containers, lengths, parts, objects = known
        if not all(map(is_, chain.from_iterable(map(STATE, parameters)), states)):
            return False
        for ask, kept in guards:
            if not same(ask(), kept):
                return False
        if list(map(len, containers)) == lengths and all(map(is_, chain.from_iterable(parts), objects)):
            return True
        if not all(same(contents(held.container), held.kept) for held in self.held):
            return False
        self.known = known._replace(objects=list(chain.from_iterable(parts)))  # equal values, but other objects
        return True

    def know(self) -> Known:
        containers = [held.container for held in self.held]
        parts = [part for one in containers for part in ((one, one.values()) if isinstance(one, MAPPINGS) else (one,))]
        return Known(list(self.parameters), list(chain.from_iterable(self.parameters.values())),
                     [(guard.ask, guard.kept) for guard in self.guards if guard.before], containers,
                     [len(held.kept) // (2 if isinstance(held.container, MAPPINGS) else 1) for held in self.held],
                     parts, list(chain.from_iterable([held.kept for held in self.held])))

    def changes(self) -> list[str]:
        """What the step itself has changed, although it reads it."""
        changed = [name for guard in self.guards if guard.after for name in guard.changes()]
        changed += [held.name for held in self.held if not same(contents(held.container), held.kept)]
        return list(dict.fromkeys(changed))

    def renew(self) -> None:
        """Take what the step makes once and keeps for what was there before."""
        self.guards = [guard._replace(kept=guard.ask()) if guard.after else guard for guard in self.guards]
        self.held = [held._replace(kept=contents(held.container)) for held in self.held]
        self.parameters, self.known = {p: STATE(p) for p in self.parameters}, None

    def pictures(self) -> list[Callable[[], Any]]:
        """What puts back all that the actions change, as it is now: an action that is interrupted has done a part of it."""
        return [picture() for _, picture in self.actions]

    def repeat(self) -> None:
        """Do before a replay what Python does in a step."""
        for action, _ in self.actions:
            action()


class _State(threading.local):
    current: Recording | None = None


_state = _State()


def same(now: Any, kept: Any) -> bool:
    """Whether two tuples hold the same objects; numbers, text and tuples of these are compared by value, and by sign."""
    return len(now) == len(kept) and (all(map(is_, now, kept)) or all(map(_same, now, kept)))


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple):
        return same(one, other)
    return isinstance(one, NUMBERS) and one == other and (
        type(one) is not float or math.copysign(1.0, one) == math.copysign(1.0, other))


def contents(container: Any) -> tuple[Any, ...]:
    return (*container, *container.values()) if isinstance(container, MAPPINGS) else tuple(container)


def current() -> Recording | None:
    """The recording of this thread; None outside of all, which is the usual case."""
    return _state.current


def nothing() -> Callable[[], Any]:
    """The picture of an action that changes nothing."""
    return bool


def changing(compute: Callable[[], tuple[Any, ...]], dtype: Any,
             picture: Callable[[], Callable[[], Any]] = nothing) -> Sequence[Any]:
    """The numbers that `compute` gives: as they are, or while a step is recorded arrays () of the device that hold them.

    These are computed again, and the arrays filled, before every replay. `picture` gives what puts back all `compute` changes.
    """
    recording = _state.current
    if recording is None:
        return compute()
    values = compute()
    memory, fill = recording.allocate(len(values), dtype)
    recording.actions.append((lambda: fill(compute()), picture))
    fill(values)
    return [memory[i:i + 1].reshape(()) for i in range(len(values))]


def repeat(action: Callable[[], Any], picture: Callable[[], Callable[[], Any]]) -> None:
    """Do this, which was done just now, before every replay, too; `picture` as in `changing`."""
    recording = _state.current
    if recording is not None:
        recording.actions.append((action, picture))


def expect(name: str, ask: Callable[[], tuple[Any, ...]]) -> None:
    """A replay is right only as long as this tuple is what it is now: numbers and tuples by value, others by identity."""
    recording = _state.current
    if recording is not None:
        recording.rely(name, ask)


def reads(owner: Any, parts: Callable[[], Iterable[tuple[str, Any]]]) -> None:
    """While a step is recorded: it reads what the attributes of `owner` hold, and of the other objects that `parts` names.

    Those that their class names in `fresh` are read anew at every replay.
    """
    recording = _state.current
    if recording is None or id(owner) in recording.seen:
        return
    for path, part in parts():
        name = type(owner).__name__ + (f".{path}" if path else "")
        watch_attributes(recording, name, part)


def watch_attributes(recording: Recording, name: str, owner: Any) -> None:
    """Guard all attributes of an object."""
    if id(owner) in recording.seen:
        return
    recording.seen.add(id(owner))
    held, fresh = vars(owner), getattr(type(owner), "fresh", ())
    if fresh:
        names = tuple(key for key in held if key not in fresh)
        recording.rely(name, lambda: (*map(held.get, names), len(held)))
    else:
        recording.holds(name, held)
    for key, value in held.items():
        if key not in fresh:
            watch_inside(recording, f"{name}.{key}", value)


def watch_inside(recording: Recording, name: str, value: Any) -> None:
    """Guard what containers hold, at any depth; all else is guarded where it is named."""
    if isinstance(value, CONTAINERS) and id(value) not in recording.seen:
        recording.seen.add(id(value))
        if not isinstance(value, tuple):
            recording.holds(name, value)
        for key, item in value.items() if isinstance(value, MAPPINGS) else enumerate(value):
            watch_inside(recording, f"{name}[{key!r:.40}]", item)


def found_gradient(parameter: Any) -> None:
    """The step goes on from the gradient that a parameter has now, or from its having none."""
    recording = _state.current
    if recording is not None and parameter not in recording.settled:
        recording.settled[parameter] = None
        recording.rely("the gradient of a parameter", lambda: (parameter.gathered,), after=False)


def left_gradient(parameter: Any) -> None:
    """The step gives a parameter another gradient, or none, whatever it had before."""
    recording = _state.current
    if recording is not None:
        recording.settled.setdefault(parameter)


def refuse_waiting(call: str, why: str = "copies between host and device") -> None:
    """Raise `StateError` while a step is recorded: what the host has to do would be done once and never again."""
    if _state.current is not None:
        raise StateError(f"record: the step calls {call}, which {why}: a replay would not do it again. Give the step what it "
                         "needs as arguments, make other constants before, and read results (item, float, numpy, print) of "
                         "what the step returns, outside of it")
