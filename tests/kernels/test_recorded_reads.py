"""What a recorded step reads from outside is noticed by its code; what it changes there is refused in words."""
import collections
import contextvars
import copy
import functools
import gc
import pickle
import random
import types
from dataclasses import dataclass, field

import numpy as np
import pytest
from conftest import fetch, need_gpu, place
from plain_card import plain_card

import minilora
from minilora import backend, nn, optim
from minilora.errors import ConfigError, StateError

FACTOR = 1.0
Pair = collections.namedtuple("Pair", "first second")


@pytest.fixture(params=["plain", pytest.param("gpu", marks=pytest.mark.gpu)])
def card(request):
    if request.param == "plain":
        with plain_card():
            yield
    else:
        need_gpu()
        with backend.use("gpu"):
            yield


class Trainer:
    """A step as a method, whose settings are attributes."""

    slope = 2.0

    def __init__(self):
        self.factor, self.config, self.history = 1.0, types.SimpleNamespace(shift=0.0), []
        self.unread = 0

    def shifted(self, x):
        return x + self.config.shift

    @minilora.record
    def step(self, x):
        return self.shifted(minilora.Tensor(x) * self.factor) * self.slope


def scaled(x):
    return minilora.Tensor(x) * FACTOR


def values(step, x, change, given):
    """The first number of four calls each, with these values of what is read."""
    found = []
    for value in given:
        change(value)
        found += [float(fetch(step(x))[0]) for _ in range(4)]
    return found


def variable():
    factor = 1.0

    def change(value):
        nonlocal factor
        factor = value
    return minilora.record(lambda x: minilora.Tensor(x) * factor), change


def in_a_list():
    factors = [1.0]
    return minilora.record(lambda x: minilora.Tensor(x) * factors[0]), lambda value: factors.__setitem__(0, value)


def in_a_dict():
    settings = {"inner": {"factor": 1.0}}
    return (minilora.record(lambda x: minilora.Tensor(x) * settings["inner"]["factor"]),
            lambda value: settings["inner"].update(factor=value))


def in_a_kind_of_dict():
    settings = collections.defaultdict(float, factor=1.0)
    return minilora.record(lambda x: minilora.Tensor(x) * settings["factor"]), lambda value: settings.update(factor=value)


def of_an_array():
    factors = np.ones(3, "float32")
    return minilora.record(lambda x: minilora.Tensor(x) * float(factors[0])), lambda value: factors.__setitem__(0, value)


def a_global():
    return minilora.record(scaled), lambda value: globals().update(FACTOR=value)


def through_a_function():
    return minilora.record(lambda x: scaled(x)), lambda value: globals().update(FACTOR=value)


def through_a_partial():
    factors = [1.0]
    return (minilora.record(functools.partial(lambda factors, x: minilora.Tensor(x) * factors[0], factors)),
            lambda value: factors.__setitem__(0, value))


def of_an_object():
    trainer = Trainer()
    return trainer.step, lambda value: setattr(trainer, "factor", value / 2.0)


def of_its_class():
    trainer = Trainer()
    return trainer.step, lambda value: setattr(Trainer, "slope", value)


def of_a_part():
    trainer = Trainer()
    return trainer.step, lambda value: setattr(trainer.config, "shift", value / 2.0 - 1.0)


def of_a_tensor():
    factor = minilora.tensor(np.ones(3, "float32"))
    return (minilora.record(lambda x: minilora.Tensor(x) * factor),
            lambda value: setattr(factor, "data", place(np.full(3, value, "float32"))))


READ = [variable, in_a_list, in_a_dict, in_a_kind_of_dict, of_an_array, a_global, through_a_function, through_a_partial,
        of_an_object, of_its_class, of_a_part, of_a_tensor]


@pytest.mark.parametrize("make", READ, ids=[make.__name__ for make in READ])
def test_what_is_read_is_noticed(make, card):
    step, change = make()
    x = place(np.ones(3, "float32"))
    try:
        assert values(step, x, change, [3.0, -1.0, 3.0, 0.5]) == [3.0] * 4 + [-1.0] * 4 + [3.0] * 4 + [0.5] * 4
    finally:
        globals().update(FACTOR=1.0)
        Trainer.slope = 2.0


def test_an_item_that_moves_to_the_next_list_is_noticed(card):
    first, second = [2.0], [3.0, 5.0]
    step = minilora.record(lambda x: minilora.Tensor(x) * first[0] * second[0])
    x = place(np.ones(3, "float32"))
    assert [float(fetch(step(x))[0]) for _ in range(4)] == [6.0] * 4
    first.append(second.pop(0))
    assert [float(fetch(step(x))[0]) for _ in range(4)] == [10.0] * 4


def test_what_is_not_read_records_nothing_anew(card):
    trainer, x = Trainer(), place(np.ones(3, "float32"))
    for i in range(6):
        trainer.unread, trainer.history = i, [*trainer.history, i]
        trainer.step(x)
    (play,) = trainer.step._plays.values()
    assert len([take for takes in play.takes.values() for take in takes]) == 1
    assert Trainer().step._plays is not trainer.step._plays


def changing_steps():
    count, seen, rng, own, box = 0, [], np.random.default_rng(0), random.Random(0), types.SimpleNamespace(n=0)

    def counting(x):
        nonlocal count
        count += 1
        return minilora.Tensor(x) * 1.0

    def appending(x):
        seen.append(1)
        return minilora.Tensor(x) * 1.0

    def assigning(x):
        box.n += 1
        return minilora.Tensor(x) * 1.0

    return {"count": counting, "seen": appending, "box.n": assigning,
            "random numbers of rng": lambda x: minilora.Tensor(x) * float(rng.random()),
            "random numbers of own": lambda x: minilora.Tensor(x) * own.random(),
            "numpy.random": lambda x: minilora.Tensor(x) * float(np.random.random()),  # noqa: NPY002
            "random": lambda x: minilora.Tensor(x) * random.random()}


@pytest.mark.parametrize("name", sorted(changing_steps()))
def test_what_the_step_itself_changes_is_refused(name, card):
    step, x = minilora.record(changing_steps()[name]), place(np.ones(3, "float32"))
    step(x)
    with pytest.raises(StateError, match=f"the step itself changes .*{name}.*Do that outside"):
        step(x)


@pytest.mark.parametrize("result", [0.5, np.float32(1.0), np.ones(2)], ids=["float", "number", "array"])
def test_numbers_of_python_are_no_results(result, card):
    x = place(np.ones(3))
    step = minilora.record(lambda x: {"y": minilora.Tensor(x) * 1.0, "rate": [result, None, "name", 3]})
    step(x)
    with pytest.raises(StateError, match=r"gives back result\['rate'\]\[0\], a .*outside of the step"):
        step(x)


def test_arguments_of_all_kinds(card):
    def compute(pair, more=None, *, factor=1.0):
        return Pair(pair.first * factor + more["x"][0], minilora.Tensor(more["x"][1]) * 2.0)

    step = minilora.record(compute)
    for i in range(5):
        host = np.full(3, i, "float32")
        pair = Pair(minilora.tensor(host), None)
        for factor in (1.0, -2.0):
            given = {"x": [place(host + 1), host + 2]}
            found = step(pair, more=given, factor=factor)
            assert type(found) is Pair
            assert fetch(found.first).tolist() == (host * factor + host + 1).tolist()
            assert fetch(found.second).tolist() == (2 * (host + 2)).tolist()
    (play,) = step._plays.values()
    assert len(play.takes) == 2 and all(take.graph for takes in play.takes.values() for take in takes)


def test_gradients_leave_through_arguments(card):
    """A tensor with a graph behind it, and a parameter, are no copies."""
    w = minilora.Parameter(place(np.full(3, 2.0, "float32")))
    step = minilora.record(lambda y: (y * y).sum().backward())
    for i in range(4):
        w.grad = None
        step(w * 3.0)
        assert fetch(w.grad).tolist() == [36.0] * 3
        w.grad = None
        step(w)
        assert fetch(w.grad).tolist() == [4.0] * 3


def test_gradients_without_an_optimizer_are_the_readers_own(card):
    w = minilora.Parameter(place(np.ones(3, "float32")))

    @minilora.record
    def step(x):
        w.grad = None
        (w * x).sum().backward()
        (w * x).sum().backward()

    kept = []
    for i in range(5):
        step(place(np.full(3, i, "float32")))
        kept.append(w.grad)
    assert [fetch(g).tolist() for g in kept] == [[2.0 * i] * 3 for i in range(5)]


def test_a_step_within_a_step(card):
    factors = [1.0]
    inner = minilora.record(lambda x: x * factors[0])
    outer = minilora.record(lambda x: inner(minilora.Tensor(x)) + 1.0)
    x = place(np.ones(3, "float32"))
    for factor in (1.0, 5.0):
        factors[0] = factor
        assert [float(fetch(outer(x))[0]) for _ in range(4)] == [factor + 1.0] * 4
        assert float(fetch(inner(minilora.Tensor(x)))[0]) == factor


def test_copies_have_recorded_nothing():
    for step in (copy.copy(Trainer.step), copy.deepcopy(Trainer.step), minilora.record(scaled, most=3)):
        assert not step._plays and step.__name__ in ("step", "scaled")
    assert pickle.loads(pickle.dumps(minilora.graphs.Recorded(places, 3))).most == 3
    trainer = Trainer()
    other = copy.deepcopy(trainer.step)
    assert other._plays is not trainer.step._plays and type(other.owner) is Trainer and other.owner is not trainer
    for wrong in (0, 1.5, "8"):
        with pytest.raises(ConfigError, match="most"):
            minilora.record(scaled, most=wrong)


def places(x):
    return x


def test_graphs_are_bounded(card):
    step = minilora.record(lambda x: minilora.Tensor(x) * 2.0, most=3)
    for i in range(400):
        n = i % 5 + 1 if i < 150 else 9
        assert fetch(step(place(np.full(n, i, "float32")))).tolist() == [2.0 * i] * n
        (play,) = step._plays.values()
        assert sum(map(len, play.takes.values())) <= 3
    assert any(take.graph and take.inputs[0].shape == (9,) for takes in play.takes.values() for take in takes)
    assert step.idle == minilora.graphs.IDLE < 150 and step.graphs <= 3


class Stop(KeyboardInterrupt):
    """Ctrl-C."""


def test_an_interrupt_while_recording_or_before_a_replay_changes_nothing(card):
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(3, 3, rng=rng), nn.Dropout(0.5, rng=rng))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    scheduler = optim.Scheduler(optimizer, optim.linear(total=100))

    def state():
        return optimizer.groups[0].steps[:], model[1].step, scheduler.count, fetch(model[0].weight).tobytes()

    stop = types.SimpleNamespace(now=False)

    @minilora.record
    def step(x):
        optimizer.zero_grad()
        y = model(x)
        (y * y).sum().backward()
        optimizer.step()
        scheduler.step()
        if vars(stop)["now"]:
            raise Stop

    x = place(np.ones((2, 3), "float32"))
    step(x)
    before, stop.now = state(), True
    with pytest.raises(Stop):
        step(x)  # recorded
    assert state() == before
    stop.now = False
    step(x), step(x)
    (take,) = next(iter(next(iter(step._plays.values())).takes.values()))
    before, actions = state(), list(take.recording.actions)
    for place_of_error in range(len(actions)):
        def interrupted():
            raise Stop

        take.recording.actions[place_of_error] = interrupted, actions[place_of_error][1]
        with pytest.raises(Stop):
            step(x)
        take.recording.actions[:] = actions
        assert state() == before
    step(x)
    assert state()[:3] == ([4] * 2, 4, 4)


@dataclass
class Equal:
    """Equal objects, which cannot be keys of a dict."""

    factor: float = 1.0
    box: list = field(default_factory=list, compare=False)

    @minilora.record
    def step(self, x):
        return minilora.Tensor(x) * self.factor * self.box[0]

    quick = minilora.record(step.step)


@dataclass(unsafe_hash=True)
class EqualKeys(Equal):
    """Equal objects, which can."""


@pytest.mark.parametrize("kind", [Equal, EqualKeys])
def test_equal_objects_have_recordings_of_their_own(kind, card):
    one, other, x = kind(2.0, [1.0]), kind(2.0, [5.0]), place(np.ones(3, "float32"))
    assert one == other
    for _ in range(4):
        assert [float(fetch(each.step(x))[0]) for each in (one, other)] == [2.0, 10.0]
    known = kind.step._bound
    assert {id(one), id(other)} <= set(known)
    gone = id(one)
    del one
    gc.collect()
    assert gone not in known and id(other) in known
    kind.step.forget()


def test_a_method_under_another_name_is_copied_under_it():
    own = Equal(2.0, [3.0])
    other = copy.deepcopy(own.quick)
    assert type(other.owner) is Equal and other.owner is not own and other.recorded is not own.quick.recorded


def test_objects_that_nobody_can_watch_are_refused_with_the_line_to_add():
    class Closed:
        __slots__ = ("factor",)

        @minilora.record
        def step(self, x):
            return x

    with pytest.raises(ConfigError, match="a Closed does not.*Add that to them, or weakref_slot=True"):
        Closed().step(1)

    class Open:
        __slots__ = ("__weakref__", "factor")
        step = Closed.__dict__["step"]

    assert Open().step(1) == 1


RESULTS = {"an object": lambda y: types.SimpleNamespace(y=y), "a set": lambda y: {y}, "a generator": lambda y: (z for z in [y]),
           "a function": lambda y: lambda: y, "in a tuple": lambda y: (y, types.SimpleNamespace(y=y))}


@pytest.mark.parametrize("name", RESULTS)
def test_objects_that_hold_results_are_no_results(name, card):
    """The next replay would write into them; and it would give the same object again."""
    make = RESULTS[name]
    step = minilora.record(lambda x: make(minilora.Tensor(x) * 2.0))
    step(place(np.ones(3)))
    with pytest.raises(StateError, match="the step gives back result.*in tuples, lists and dicts"):
        step(place(np.ones(3)))


def test_an_object_that_was_there_before_is_a_result(card):
    model, x = Trainer(), place(np.ones(3, "float32"))
    step = minilora.record(lambda x: (minilora.Tensor(x) * 2.0, model, b"name", True, None))
    for _ in range(4):
        assert step(x)[1:] == (model, b"name", True, None)


@pytest.mark.parametrize("numbers", [[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]])  # from 0 on: the first call writes what is there
def test_a_step_that_writes_into_an_argument_is_refused(numbers, card):
    def compute(x, target):
        target[...] = (minilora.Tensor(x) * 2.0).data

    step, refused = minilora.record(compute), 0
    for number in numbers:
        target = place(np.zeros(3, "float32"))
        try:
            step(place(np.full(3, number, "float32")), target)
            assert fetch(target).tolist() == [2.0 * number] * 3
        except StateError as error:
            refused += 1
            assert "writes into 1 of the arrays that it gets" in str(error) and not fetch(target).any()
    assert refused == 1


def test_parameters_among_the_arguments_are_not_put_back(card):
    """The step changes the array that it was given, and not by that argument."""
    found = []
    for record in (minilora.record, lambda step: step):
        w = minilora.Parameter(place(np.array([1.0, np.nan, -0.0], "float32")))
        optimizer = optim.SGD([w], lr=0.1)

        @record
        def step(array, twice):
            optimizer.zero_grad()
            (w * w).sum().backward()
            optimizer.step()
            return minilora.Tensor(array) * 1.0

        found.append([(fetch(step(w.data, w.data)).tobytes(), fetch(w).tobytes())[1] for _ in range(5)])
    assert found[0] == found[1]


class Named(dict):
    """A dict that knows more."""

    extra = 1.0


def test_arguments_keep_their_kinds(card):
    class Rows(list):
        pass

    def compute(words, counts, named, rows):
        assert type(rows) is Rows and type(named) is Named
        return minilora.Tensor(rows[0]) * (counts["missing"] + 2.0) * named.extra + len(words)

    step = minilora.record(compute)
    for i in range(4):
        named, rows = Named(a=1), Rows([place(np.full(3, i, "float32"))])
        named.extra = 3.0
        words, counts = np.array(["a", "b"]), collections.defaultdict(float, a=1.0)
        assert fetch(step(words, counts, named, rows)).tolist() == [6.0 * i + 2.0] * 3


def test_context_variables_of_others_are_not_asked_what_they_are_worth(card):
    """An array has no truth value."""
    other = contextvars.ContextVar("other")
    token = other.set(np.ones(3))
    try:
        step = minilora.record(lambda x: minilora.Tensor(x) * 2.0)
        assert [float(fetch(step(place(np.ones(3))))[0]) for _ in range(3)] == [2.0] * 3
    finally:
        other.reset(token)
