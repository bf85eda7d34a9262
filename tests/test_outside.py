"""Whatever way a step takes to a number of Python, a change of that number is noticed: one by one, and ways made of ways."""
import array
import collections
import contextvars
import functools
import itertools
import sys
import threading
import types
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
from conftest import fetch, place
from hypothesis import given
from hypothesis import strategies as st
from plain_card import plain_card

import minilora
from minilora import nn
from minilora.errors import StateError

FACTOR = 1.0
THERE = types.ModuleType("test_outside_settings")  # a module that a step imports when it runs
sys.modules[THERE.__name__] = THERE


class Plain:
    def __init__(self, f):
        self.f = f

    @property
    def hidden(self):
        return self.f

    @functools.cached_property
    def once(self):
        return self.f

    def method(self):
        return self.f

    def items(self):
        yield self.f


class Derived(Plain):
    def method(self):
        return super().method()


class Slots:
    __slots__ = ("f",)

    def __init__(self, f):
        self.f = f


@dataclass(slots=True)
class Record:
    f: object


class Syntax:
    """All that an expression can ask of an object without naming an attribute."""

    def __init__(self, f):
        self.f = f

    def __getitem__(self, key):
        return self.f

    def __iter__(self):
        return iter([self.f])

    def __enter__(self):
        return self.f

    def __exit__(self, *error):
        pass

    def __matmul__(self, other):
        return self.f

    def __getattr__(self, name):
        if name != "made_up":
            raise AttributeError(name)
        return self.f

    def __call__(self):
        return self.f


class Descriptor:
    def __get__(self, owner, kind):
        return owner.f


class Described(Plain):
    described = Descriptor()


class Shared:
    """A class that holds the number; another one comes from it."""

    @classmethod
    def of_class(cls):
        return cls.f

    @staticmethod
    def fixed():
        return FACTOR


def unbound(f):
    """For a class: a function there would become a method of its objects."""
    return staticmethod(f) if isinstance(f, types.FunctionType) else f


def sub(f):
    """A class whose base has the attribute."""
    return type("Sub", (type("Base", (Shared,), {"f": unbound(f)}),), {})


class Local(threading.local):
    pass


def local(f):
    held = Local()
    held.f = f
    return held


def weak(f):
    key = Plain(0)
    held = weakref.WeakKeyDictionary()
    held[key] = f
    return held, key


def by_default(f):
    def read(f=f):
        return f
    return read


def by_keyword(f):
    def read(*, f=f):
        return f
    return read


def with_attribute(f):
    def read():
        return read.f
    read.f = f
    return read


def variable(f):
    held = contextvars.ContextVar("held")
    held.set(f)
    return held


def set_cell(function, value):
    function.__closure__[0].cell_contents = value


def in_a_closure(f):
    def read():
        return f
    return read


def alias(held):
    other = held
    return other.f


def loop(held):
    for one in held:
        y = one.f
    return y


def matched(held):
    match held:
        case Record(f=number):
            return number


def entered(held):
    with held as number:
        return number


def assign(name):
    return lambda held, value: setattr(held, name, value)


def entry(key):
    return lambda held, value: held.__setitem__(key, value)


def again(held, value):
    vars(held).pop("once", None)
    held.f = value


# name: (what holds a value, how the step reads it, how it is changed)
WAYS = {
    "list": (lambda f: [f], lambda held: held[0], entry(0)),
    "dict": (lambda f: {"f": f}, lambda held: held["f"], entry("f")),
    "tuple": (lambda f: ([f],), lambda held: held[0][0], lambda held, value: held[0].__setitem__(0, value)),
    "deque": (lambda f: collections.deque([f]), lambda held: held[0], entry(0)),
    "Counter": (lambda f: collections.Counter(f=f), lambda held: held["f"], entry("f")),
    "UserDict": (lambda f: collections.UserDict(f=f), lambda held: held["f"], entry("f")),
    "UserList": (lambda f: collections.UserList([f]), lambda held: held[0], entry(0)),
    "ChainMap": (lambda f: collections.ChainMap({}, {"f": f}), lambda held: held["f"], entry("f")),
    "proxy": (lambda f: (types.MappingProxyType(own := {"f": f}), own), lambda held: held[0]["f"],
              lambda held, value: held[1].update(f=value)),
    "bound method of a dict": (lambda f: {"f": f}.get, lambda held: held("f"),
                               lambda held, value: held.__self__.update(f=value)),
    "weak dict": (weak, lambda held: held[0][held[1]], lambda held, value: held[0].__setitem__(held[1], value)),
    "namespace": (lambda f: types.SimpleNamespace(f=f), lambda held: held.f, assign("f")),
    "alias": (Plain, alias, assign("f")),
    "loop": (lambda f: [Plain(f)], loop, lambda held, value: setattr(held[0], "f", value)),
    "values": (lambda f: {"a": Plain(f)}, lambda held: next(one.f for key, one in held.items()),
               lambda held, value: setattr(held["a"], "f", value)),
    "property": (Plain, lambda held: held.hidden, assign("f")),
    "cached property": (Plain, lambda held: held.once, again),
    "method": (Plain, lambda held: held.method(), assign("f")),
    "method of a base": (Derived, lambda held: held.method(), assign("f")),
    "bound method": (lambda f: Plain(f).method, lambda held: held(), lambda held, value: setattr(held.__self__, "f", value)),
    "generator method": (Plain, lambda held: next(held.items()), assign("f")),
    "slot": (Slots, lambda held: held.f, assign("f")),
    "dataclass with slots": (Record, lambda held: held.f, assign("f")),
    "match": (Record, matched, assign("f")),
    "descriptor": (Described, lambda held: held.described, assign("f")),
    "item": (Syntax, lambda held: held[0], assign("f")),
    "items": (Syntax, lambda held: next(iter(held)), assign("f")),
    "unpacked": (Syntax, lambda held: [*held][0], assign("f")),
    "context": (Syntax, entered, assign("f")),
    "operator": (Syntax, lambda held: held @ 1, assign("f")),
    "made up": (Syntax, lambda held: held.made_up, assign("f")),
    "called": (Syntax, lambda held: held(), assign("f")),
    "class": (lambda f: type("Own", (), {"f": f}), lambda held: held.f, assign("f")),
    "base class": (sub, lambda held: held.f, lambda held, value: setattr(held.__mro__[1], "f", unbound(value))),
    "class of a base": (sub, lambda held: held.of_class(), lambda held, value: setattr(held.__mro__[1], "f", value)),
    "hidden by a class": (sub, lambda held: held.f, assign("f")),
    "class of an object": (lambda f: sub(f)(), lambda held: held.f,
                           lambda held, value: setattr(type(held), "f", unbound(value))),
    "hidden by an object": (lambda f: sub(f)(), lambda held: held.f, assign("f")),
    "thread's own": (local, lambda held: held.f, assign("f")),
    "default": (by_default, lambda held: held(), lambda held, value: setattr(held, "__defaults__", (value,))),
    "default by keyword": (by_keyword, lambda held: held(), lambda held, value: held.__kwdefaults__.update(f=value)),
    "attribute of a function": (with_attribute, lambda held: held(), assign("f")),
    "closure": (in_a_closure, lambda held: held(), set_cell),
    "partial": (lambda f: functools.partial(lambda own: own[0], [f]), lambda held: held(),
                lambda held, value: held.args[0].__setitem__(0, value)),
    "partial by keyword": (lambda f: functools.partial(lambda *, own: own.f, own=Plain(f)), lambda held: held(),
                           lambda held, value: setattr(held.keywords["own"], "f", value)),
    "context variable": (variable, lambda held: held.get(), lambda held, value: held.set(value)),
    "array of objects": (lambda f: np.array([f, None], dtype=object), lambda held: held[0], entry(0)),
}
# These hold numbers only.
NUMBERS = {
    "set": (lambda f: {f}, lambda held: max(held), lambda held, value: (held.clear(), held.add(value))),
    "array": (lambda f: np.full(100, f), lambda held: float(held[0]), entry(0)),
    "array ()": (lambda f: np.array(f), float, entry(())),
    "NumPy's number": (lambda f: [np.float32(f)], lambda held: float(held[0]),
                       lambda held, value: entry(0)(held, np.float32(value))),
    "array.array": (lambda f: array.array("d", [f]), lambda held: held[0], entry(0)),
    "memory": (lambda f: memoryview(array.array("d", [f])), lambda held: held[0], entry(0)),
    "bytes": (lambda f: bytearray([int(f)]), lambda held: float(held[0]), lambda held, value: entry(0)(held, int(value))),
}


def through(get, read):
    return lambda: read(get())


def lived(ways, level, numbers):
    """What a recorded step gives, four calls with each of the numbers: at the end of these ways, changed at one of them."""
    def build(number, ways):
        held = number
        for make, _, _ in reversed(ways):
            held = make(held)
        return held

    held = build(1.0, ways)
    get = in_a_closure(held)
    for _, read, _ in ways:
        get = through(get, read)
    step, x = minilora.record(lambda x: minilora.Tensor(x) * get()), place(np.ones(2, "float32"))
    holder = held
    for _, read, _ in ways[:level]:
        holder = read(holder)
    found = [float(fetch(step(x))[0])]
    for number in numbers:
        ways[level][2](holder, build(number, ways[level + 1:]))
        found += [float(fetch(step(x))[0]) for _ in range(4)]
    return found, step


@pytest.mark.parametrize("way", [*WAYS, *NUMBERS])
def test_each_way(way):
    with plain_card():
        found, step = lived([{**WAYS, **NUMBERS}[way]], 0, [3.0, 1.0, 5.0])
        assert found == [1.0] + [3.0] * 4 + [1.0] * 4 + [5.0] * 4
        (play,) = step._plays.values()
        assert any(take.graph for takes in play.takes.values() for take in takes)


@given(ways=st.lists(st.sampled_from(sorted(WAYS)), max_size=3), last=st.sampled_from(sorted({**WAYS, **NUMBERS})),
       data=st.data())
def test_ways_made_of_ways(ways, last, data):
    ways = [{**WAYS, **NUMBERS}[way] for way in [*ways, last]]
    with plain_card():
        found, _ = lived(ways, data.draw(st.integers(0, len(ways) - 1)), [3.0, 2.0])
    assert found == [1.0] + [3.0] * 4 + [2.0] * 4


def test_functions_written_where_the_step_is(monkeypatch):
    def imported(x):
        import test_outside_settings
        return x * test_outside_settings.rate

    def from_there(x):
        from test_outside_settings import rate
        return x * rate

    def in_case(x):
        try:
            return x * NOT_YET  # noqa: F821
        except NameError:
            return x * 2.0

    def built(x):
        return x * Scale().number

    cases = [(imported, lambda value: setattr(THERE, "rate", value)), (from_there, lambda value: setattr(THERE, "rate", value)),
             (in_case, lambda value: monkeypatch.setitem(globals(), "NOT_YET", value)),
             (built, lambda value: monkeypatch.setitem(globals(), "FACTOR", value)),
             (lambda x: x * Shared.fixed(), lambda value: monkeypatch.setitem(globals(), "FACTOR", value)),
             (lambda x: x * Shared().fixed(), lambda value: monkeypatch.setitem(globals(), "FACTOR", value))]
    with plain_card():
        x = minilora.tensor(np.ones(2, "float32"))
        for compute, change in cases:
            step, found = minilora.record(compute), []
            for value in (2.0, 3.0, 1.0):
                if compute is not in_case or value != 2.0:  # a global that is not there yet
                    change(value)
                found += [float(fetch(step(x))[0]) for _ in range(3)]
            assert found == [2.0] * 3 + [3.0] * 3 + [1.0] * 3, compute


class Scale:
    def __init__(self):
        self.number = FACTOR


class Layer(nn.Module):
    """A user's layer, which reads what no layer of the library knows of."""

    def __init__(self):
        self.more = types.SimpleNamespace(f=1.0)

    def forward(self, x):
        return x * self.more.f * FACTOR


@pytest.mark.parametrize("wrapped", [lambda layer: layer, lambda layer: nn.Sequential(layer),
                                     lambda layer: nn.Sequential(nn.Sequential(nn.GELU(), layer))],
                         ids=["by itself", "in one", "in two"])
def test_the_code_of_layers(wrapped, monkeypatch):
    layer = Layer()
    model = wrapped(layer)
    with plain_card():
        step, x = minilora.record(lambda x: model(x)), minilora.tensor(np.full(2, 9.0, "float32"))
        for factor in (1.0, 3.0):
            monkeypatch.setitem(globals(), "FACTOR", factor)
            for number in (2.0, 5.0):
                layer.more.f = number
                assert [round(float(fetch(step(x))[0]), 4) for _ in range(3)] == [9.0 * factor * number] * 3


@pytest.mark.parametrize("make", [lambda: iter([1.0, 2.0, 3.0]), lambda: iter({1.0: 1, 2.0: 2, 3.0: 3}),
                                  lambda: itertools.count(1.0),
                                  lambda: (float(i) for i in range(9)), lambda: zip([1.0, 2.0], [1.0, 2.0]),
                                  lambda: enumerate([1.0, 2.0, 3.0]), lambda: map(float, range(5))],
                         ids=["list", "dict", "count", "generator", "zip", "enumerate", "map"])
def test_an_iterator_cannot_move_in_a_replay(make):
    items = make()

    def compute(x):
        item = next(items)
        return x * (item[0] if isinstance(item, tuple) else item)

    with plain_card():
        step, x = minilora.record(compute), minilora.tensor(np.ones(2, "float32"))
        step(x)
        with pytest.raises(StateError, match="the step itself changes the place of the iterator items"):
            step(x)
