"""What a recorded step reads from outside of it, by its code: variables of the functions around it, globals, attributes.

A replay (`minilora.record`) calls no Python. So a variable that has another value now, a list that has grown, an attribute
that was assigned: each must be noticed, or the replay does what the step did long ago. What layers and optimizers read they
tell themselves (`replay`); for everything else the code of the step is read, as it was compiled, and that of the functions
beside it that it calls. What is found is compared before every replay:

- variables and globals by their names, with what lists, dicts, tuples and sets in them hold;
- attributes, where the code asks for them (``self.rate``, ``settings.rate``), and what these hold;
- arrays of the host with few numbers, by their numbers; tensors by their array.

A generator of random numbers must not move while the step is recorded: a replay would not draw.
Not seen is what is computed (``getattr(x, name)``), and what functions of other files read.
"""

from __future__ import annotations

import dis
import functools
import random
import types
from collections.abc import Callable, Iterable
from itertools import repeat
from operator import attrgetter
from typing import Any, NamedTuple

import numpy

from . import replay
from .tensor import Parameter, Tensor

__all__ = ["watch"]

FEW = 64  # numbers of an array that are compared one by one
LIBRARIES = frozenset({"minilora", "numpy", "cupy"})  # of which no module, class or function changes
MISSING = object()
CONTENTS = attrgetter("cell_contents")
INSIDE = ("__wrapped__", "__func__", "func")  # where a function stands that another callable calls


class Names(NamedTuple):
    """What one piece of code asks for.

    Attributes
    ----------
    globals, cells : set of str
    attributes : dict of str to set of str
        Variable -> the attributes that are taken of it, and of what these are: ``a.b.c`` gives b and c.
    loose : set of str
        Attributes of what the code itself computes.
    """

    globals: set[str]
    cells: set[str]
    attributes: dict[str, set[str]]
    loose: set[str]


@functools.lru_cache(maxsize=256)
def names_in(code: types.CodeType) -> Names:
    """What a piece of code asks for, and what the functions that are written inside of it do."""
    found = Names(set(), set(), {}, set())
    owner: set[str] | None = None
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR"):
            (found.loose if owner is None else owner).add(step.argval)
        elif step.opname not in ("EXTENDED_ARG", "CACHE", "PRECALL", "PUSH_NULL", "COPY"):
            owner = None
        if "GLOBAL" in step.opname or step.opname == "LOAD_NAME":
            found.globals.add(step.argval)
        elif "DEREF" in step.opname or "CLOSURE" in step.opname:
            found.cells.add(step.argval)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FAST", "LOAD_FAST_BORROW"):
            owner = found.attributes.setdefault(step.argval, set())
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            more = names_in(inner)
            found.globals.update(more.globals)
            found.cells.update(more.cells)
            found.loose.update(more.loose)
            for name, taken in more.attributes.items():
                found.attributes.setdefault(name, set()).update(taken)
    return found


class Walk:
    """A way through all that a function reads."""

    def __init__(self, recording: replay.Recording, inside: dict[str, Any]) -> None:
        self.recording, self.inside = recording, inside  # the globals of the step's file
        self.loose: set[str] = set()
        self.reached: list[tuple[str, Any, set[str]]] = []
        self.done: set[Any] = set()  # of which object which attributes are guarded, and which methods are read
        self.seen: set[int] = set()  # functions and containers, which the step keeps alive

    def function(self, function: Any) -> None:
        """A callable: a function, a method, a partial, or an object with `__call__`."""
        if id(function) in self.seen:
            return
        self.seen.add(id(function))
        if isinstance(function, functools.partial):
            self.function(function.func)
            self.value("an argument of partial", [*function.args, *function.keywords.values()])
        elif isinstance(function, types.MethodType):
            self.code(function.__func__, function.__self__)
        elif isinstance(function, types.FunctionType):
            self.code(function)
        elif hasattr(function, "__wrapped__"):
            self.function(function.__wrapped__)
        elif isinstance(getattr(type(function), "__call__", None), types.FunctionType):
            self.code(type(function).__call__, function)

    def code(self, function: Any, owner: Any = MISSING) -> None:
        if not isinstance(function, types.FunctionType) or foreign(function) or (id(function), id(owner)) in self.done:
            return
        self.done.add((id(function), id(owner)))
        names, code = names_in(function.__code__), function.__code__
        self.loose |= names.loose
        cells = dict(zip(code.co_freevars, function.__closure__ or ()))
        if cells:
            self.recording.rely(tuple(cells), functools.partial(contents, tuple(cells.values())))
        for name, value in zip(cells, contents(cells.values())):
            self.value(name, value, names.attributes.get(name, ()), closure=True)
        held = function.__globals__
        found = tuple(sorted(names.globals & held.keys()))
        if found:
            self.recording.rely(found, functools.partial(entries, held, found))
        for name in found:
            self.value(name, held[name], names.attributes.get(name, ()))
        for name, value in zip(code.co_varnames, [] if owner is MISSING else [owner]):
            self.value(name, value, names.attributes.get(name, ()))
        if hasattr(function, "__wrapped__"):
            self.function(function.__wrapped__)

    def value(self, name: str, value: Any, taken: Iterable[str] = (), closure: bool = False) -> None:
        """Something that was found: guard what it holds."""
        if isinstance(value, types.FunctionType):
            if closure or value.__globals__ is self.inside:
                self.function(value)
        elif isinstance(value, (types.MethodType, functools.partial)):
            self.function(value)
        elif isinstance(value, (list, tuple, dict, set)):
            if id(value) not in self.seen:
                self.seen.add(id(value))
                replay.watch_inside(self.recording, name, value)
                for i, part in value.items() if isinstance(value, dict) else enumerate(value):
                    if not isinstance(part, (bool, int, float, str, type(None))):
                        self.value(f"{name}[{i!r:.40}]", part, taken, closure)
        elif isinstance(value, Tensor):
            ask = functools.partial(lambda x: (x.data, isinstance(x, Parameter) and x.trainable), value)
            self.recording.rely(f"the array of {name}", ask)
        elif isinstance(value, numpy.ndarray):
            if value.size <= FEW and not value.dtype.hasobject:
                self.recording.rely(f"the numbers in {name}", lambda: (value.tobytes(),))
        elif (state := drawing(value)) is not None:
            self.recording.rely(f"the random numbers of {name}", state, before=False)
        else:
            self.reached.append((name, value, set(taken)))

    def attributes(self, name: str, value: Any, taken: set[str]) -> None:
        """Guard those attributes of an object that the code takes, and go on with what they are."""
        held = getattr(value, "__dict__", None)
        if held is None or foreign(value) and isinstance(value, (type, types.ModuleType)):
            return
        fresh = getattr(value if isinstance(value, type) else type(value), "fresh", ())
        wanted = [key for key in sorted(taken) if (id(value), key) not in self.done and key not in fresh
                  and (key in held or is_plain(getattr(type(value), key, MISSING)))]
        self.done.update((id(value), key) for key in wanted)
        if wanted:
            self.recording.rely(tuple(f"{name}.{key}" for key in wanted), functools.partial(entries, held, tuple(wanted)))
        for key in wanted:
            self.value(f"{name}.{key}", held.get(key), taken)
        if not isinstance(value, (type, types.ModuleType)) and not foreign(type(value)):
            self.value(type(value).__name__, type(value), taken)
            for key in sorted(taken | {"__call__", "forward"}):  # its methods: `model(x)` is its forward
                self.code(getattr(type(value), key, None), value)

    def finish(self) -> None:
        """Ask all objects that were reached for what the code takes of them; they may lead to others."""
        place = 0
        while place < len(self.reached):
            name, value, taken = self.reached[place]
            self.attributes(name, value, taken | self.loose)
            place += 1


def watch(step: Callable[..., Any], arguments: Iterable[Any] = ()) -> None:
    """While a step is recorded: it reads from outside what its code asks for, and of its arguments what these hold."""
    recording = replay.current()
    if recording is None:
        return
    function: Any = step
    while inner := next((getattr(function, name) for name in INSIDE if hasattr(function, name)), None):
        function = inner
    walk = Walk(recording, getattr(function, "__globals__", {}))
    walk.function(step)
    for argument in arguments:
        if not isinstance(argument, Tensor):
            walk.value("an argument", argument)
    for name, state in (("numpy.random", numpy.random.get_state), ("random", random.getstate)):
        recording.rely(name, functools.partial(drawn, state), before=False)
    walk.finish()


def foreign(value: Any) -> bool:
    """Whether a module, a class or a function belongs to a library."""
    name = getattr(value, "__name__", "") if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return str(name).partition(".")[0] in LIBRARIES


def is_plain(value: Any) -> bool:
    return value is not MISSING and not callable(value) and not hasattr(value, "__get__")


def contents(cells: Iterable[Any]) -> tuple[Any, ...]:
    try:
        return tuple(map(CONTENTS, cells))
    except ValueError:  # nothing was assigned yet, or it was deleted
        return tuple([cell.cell_contents if cell != types.CellType() else MISSING for cell in cells])


def entries(held: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(map(held.get, names, repeat(MISSING)))


def drawing(value: Any) -> Callable[[], tuple[Any, ...]] | None:
    """What tells how far a generator of random numbers is; None of anything else."""
    if isinstance(value, numpy.random.Generator):
        return functools.partial(drawn, lambda: value.bit_generator.state)
    if isinstance(value, numpy.random.RandomState):
        return functools.partial(drawn, value.get_state)
    return functools.partial(drawn, value.getstate) if isinstance(value, random.Random) else None


def drawn(state: Callable[[], Any]) -> tuple[Any, ...]:
    return (frozen(state()),)


def frozen(state: Any) -> Any:
    if isinstance(state, (tuple, list)):
        return tuple([frozen(part) for part in state])
    if isinstance(state, dict):
        return tuple([(key, frozen(part)) for key, part in state.items()])
    return state.tobytes() if isinstance(state, numpy.ndarray) else state
