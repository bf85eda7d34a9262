"""What a recorded step reads from outside of it, by its code: variables of the functions around it, globals, attributes.

A replay (`minilora.record`) calls no Python. So a variable that has another value now, a list that has grown, an attribute
that was assigned: each must be noticed, or the replay does what the step did long ago. What layers and optimizers read they
tell themselves (`replay`); for everything else the code of the step is read, as it was compiled, and that of the functions
beside it that it calls. What is found is compared before every replay:

- variables, globals and defaults of arguments, with what lists, dicts, tuples, sets and deques in them hold;
- of every object that these lead to, the attributes of whose names the code asks for any (``self.rate``, ``settings.rate``),
  its own, those of its classes, those in slots, and those that a property computes, whose code is read, too;
- arrays and buffers of the host with few numbers, by their numbers; tensors by their array; context variables.

Generators of random numbers and iterators must not move while the step is recorded: a replay would not draw.
Not seen is what is computed (``getattr(x, name)``), and what functions of other files read.
"""

from __future__ import annotations

import array
import builtins
import functools
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from itertools import repeat
from operator import attrgetter
from typing import Any

import numpy

from . import backend, replay
from .asked import names_in
from .tensor import Parameter, Tensor

__all__ = ["watch"]

FEW = 4096  # numbers of an array that are compared one by one
LIBRARIES = frozenset({"minilora", "numpy", "cupy"})  # of which no module, class or function changes
MISSING = object()
CONTENTS = attrgetter("cell_contents")
INSIDE = ("__wrapped__", "__func__", "func")  # where a function stands that another callable calls
BORN = ("__new__", "__init__", "__post_init__")
# Of all methods that syntax calls, those that a step hardly does, and that name every attribute.
UNREAD = frozenset({*BORN, "__eq__", "__hash__", "__repr__", "__str__", "__format__", "__del__", "__copy__", "__deepcopy__",
                    "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__replace__", "__sizeof__", "__dir__"})


class Walk:
    """A way through all that a function reads."""

    def __init__(self, recording: replay.Recording, inside: dict[str, Any]) -> None:
        self.recording, self.inside = recording, inside  # the globals of the step's file
        self.asked = {"forward"}  # attributes that the code takes, as far as it was read: `model(x)` is its forward
        self.reached: list[tuple[str, Any]] = []
        self.done: set[Any] = set()  # of which object which attributes are guarded
        self.seen: dict[int, Any] = {}  # what was met, which must live while its id is known

    def first(self, value: Any) -> bool:
        """Whether this object was not met before."""
        if id(value) in self.seen:
            return False
        self.seen[id(value)] = value
        return True

    def function(self, function: Any) -> None:
        """A callable: a function, a method, a partial, a property, or an object with `__call__`."""
        if not self.first(function):
            return
        if isinstance(function, types.FunctionType):
            self.code(function)
        elif isinstance(function, types.MethodType):
            self.value("self", function.__self__)
        elif isinstance(function, functools.partial):
            self.value("the arguments of partial", function.args)
            self.value("the arguments of partial", function.keywords)
        elif isinstance(function, property):
            for part in (function.fget, function.fset):
                self.function(part)
        else:
            self.reached.append((type(function).__name__, function))
        for name in INSIDE:
            self.function(getattr(function, name, None))

    def code(self, function: types.FunctionType) -> None:
        if foreign(function):
            return
        names, code = names_in(function.__code__), function.__code__
        self.asked |= names.attributes
        cells = dict(zip(code.co_freevars, function.__closure__ or ()))
        if cells:
            self.recording.rely(tuple(cells), functools.partial(contents, tuple(cells.values())))
        for name, value in zip(cells, contents(cells.values())):
            self.value(name, value, closure=True)
        held = function.__globals__
        found = tuple(sorted(name for name in names.globals if name in held or not hasattr(builtins, name)))
        if found:
            self.recording.rely(found, functools.partial(entries, held, found))
        for name in found:
            self.value(name, held.get(name), named=True)
        for name in names.modules:
            self.value(name, sys.modules.get(name))
        if function.__defaults__ or function.__kwdefaults__:
            self.recording.rely(f"the defaults of {function.__name__}", lambda: defaults(function))
            for value in defaults(function):
                self.value(f"a default of {function.__name__}", value)

    def value(self, name: str, value: Any, closure: bool = False, named: bool = False) -> None:
        """Something that was found: guard what it holds. What is `named` in the code may be called there."""
        if isinstance(value, types.FunctionType):
            if closure or value.__globals__ is self.inside:
                self.function(value)
                self.reached.append((name, value))
        elif isinstance(value, (types.MethodType, functools.partial)):
            self.function(value)
        elif isinstance(value, types.BuiltinMethodType) and not isinstance(value.__self__, types.ModuleType):
            self.value(name, value.__self__)  # push = seen.append
        elif isinstance(value, replay.CONTAINERS):
            if self.first(value):
                replay.watch_inside(self.recording, name, value)
                for i, part in value.items() if isinstance(value, replay.MAPPINGS) else enumerate(value):
                    if not isinstance(part, (bool, int, float, str, type(None))):
                        self.value(f"{name}[{i!r:.40}]", part, closure)
        elif (watched := asked_of(name, value)) is not None:
            self.recording.rely(*watched)
            if isinstance(value, ContextVar) or isinstance(value, numpy.ndarray) and value.dtype.hasobject:
                self.value(name, list(watched[1]()), closure)
        elif value is not None and type(value) not in backend._by_type and self.first(value):  # no array of the device
            self.reached.append((name, value))
            for kind in value.__mro__ if named and isinstance(value, type) and not foreign(value) else ():
                for key in BORN:
                    self.function(vars(kind).get(key))

    def attributes(self, name: str, value: Any) -> None:
        """Guard those attributes of an object that the code takes, and go on with what they are."""
        is_class, is_module = isinstance(value, type), isinstance(value, types.ModuleType)
        if foreign(value) and (is_class or is_module):
            return
        kind = value if is_class else type(value)
        fresh = getattr(kind, "fresh", ())
        classes = [one for one in kind.__mro__ if not foreign(one) and one.__module__ != "builtins"]
        own = () if is_class else [key for key in getattr(value, "__dict__", ()) if key in self.asked and key not in fresh]
        taken = {key for one in classes for key, part in vars(one).items() if key in self.asked or is_special(key, part)}
        wanted = tuple(sorted(key for key in taken.union(own) if (id(value), key) not in self.done))
        self.done.update((id(value), key) for key in wanted)
        if wanted and not is_class:
            slots = {key for one in classes for key, part in vars(one).items() if isinstance(part, types.MemberDescriptorType)}
            ask = functools.partial(held_by, reference(value), wanted, tuple(sorted(slots.intersection(wanted))))
            names = (*wanted, *sorted(slots.intersection(wanted)))
            self.recording.rely(tuple(f"{name}.{key}" for key in names), ask)
            for key, part in zip(names, ask()):
                self.value(f"{name}.{key}", part)
        shared = [key for key in wanted if key not in own]  # what an object has itself, no class takes from it
        for one in classes:
            held = tuple(key for key in shared if (id(one), key, "held") not in self.done)
            self.done.update((id(one), key, "held") for key in held)
            if held:
                names = tuple(f"{one.__name__}.{key}" for key in held)
                self.recording.rely(names, functools.partial(entries_of, one, held))
            for key in held:
                self.member(f"{one.__name__}.{key}", vars(one).get(key))
        if not is_class and hasattr(value, "named_modules"):  # layers tell what they read, but for what their own code does
            for path, part in value.named_modules():
                if not foreign(type(part)) and self.first(part):
                    self.reached.append((f"{name}.{path}", part))

    def member(self, name: str, part: Any) -> None:
        """What a class has under a name: of a method the code is read, wherever it was written."""
        if isinstance(part, (types.FunctionType, staticmethod, classmethod, property, functools.cached_property)):
            self.function(part)
        elif not isinstance(part, (types.MemberDescriptorType, types.GetSetDescriptorType)):
            self.value(name, part)

    def finish(self) -> None:
        """Ask all objects that were reached for what the code takes of them; they may lead to others, and to more code."""
        before = 0, 0
        while before != (before := (len(self.reached), len(self.asked))):
            for name, value in self.reached:  # which grows
                self.attributes(name, value)


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


def is_special(key: str, part: Any) -> bool:
    """Whether an entry of a class is a method that syntax calls: ``x[0]``, ``x * y``, ``with x``, ``for y in x``."""
    return key[:2] == key[-2:] == "__" and key not in UNREAD and isinstance(part, types.FunctionType)


def contents(cells: Iterable[Any]) -> tuple[Any, ...]:
    try:
        return tuple(map(CONTENTS, cells))
    except ValueError:  # nothing was assigned yet, or it was deleted
        return tuple([cell.cell_contents if cell != types.CellType() else MISSING for cell in cells])


def entries(held: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(map(held.get, names, repeat(MISSING)))


def entries_of(owner: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    return entries(vars(owner), names)


def held_by(owner: Callable[[], Any], names: tuple[str, ...], slots: tuple[str, ...]) -> tuple[Any, ...]:
    """What an object itself holds under these names, in its dict and in slots."""
    value = owner()
    return (*entries(getattr(value, "__dict__", {}), names), *[getattr(value, slot, MISSING) for slot in slots])


def reference(value: Any) -> Callable[[], Any]:
    """What gives an object, and does not keep it alive if it can be helped: its step may live longer."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


def defaults(function: types.FunctionType) -> tuple[Any, ...]:
    return (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())


def asked_of(name: str, value: Any) -> tuple[Any, ...] | None:
    """What must not change about a value whose numbers count, and not its attributes, as `rely` takes it; None of others."""
    if isinstance(value, Tensor):
        return f"the array of {name}", lambda: (value.data, isinstance(value, Parameter) and value.trainable)
    if isinstance(value, numpy.ndarray):
        few = value.size <= FEW
        return f"the numbers in {name}", lambda: (value.shape, *(value.flat if value.dtype.hasobject else [value.tobytes()])
                                                  ) if few else ()
    if isinstance(value, (array.array, bytearray, memoryview)):
        return f"the numbers in {name}", lambda: (value.tobytes() if hasattr(value, "tobytes") else bytes(value),)
    if isinstance(value, ContextVar):
        return name, lambda: (value.get(MISSING),)
    if hasattr(type(value), "__next__") and type(value).__module__ in ("builtins", "itertools"):
        return f"the place of the iterator {name}", lambda: (object(),), False  # nobody can tell whether it has moved
    state = drawing(value)
    return None if state is None else (f"the random numbers of {name}", state, False)


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
