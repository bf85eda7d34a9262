"""Recorded steps among all that a program may do between two calls, held to the step itself, to the bit.

A program is drawn: calls of a step, and between them events that change what the step reads from Python. Two worlds live it,
one with `minilora.record`, and after each event both must hold the same bits; or the recorded step said in words that it cannot
be recorded, and nothing has changed.
"""
import threading
import types

import numpy as np
import pytest
from conftest import fetch, need_gpu
from hypothesis import given
from hypothesis import strategies as st
from plain_card import plain_card

import minilora
from minilora import backend, half, lora, nn, optim
from minilora.errors import MiniloraError, StateError


class World:
    """A model, an optimizer and a step; `calls` are those that Python made of the step's code."""

    def __init__(self, record, kind):
        rng = np.random.default_rng(0)
        first = lora.adapt(nn.Linear(5, 6, rng=rng), r=2, lora_alpha=3, rng=rng, lora_dropout=0.3)
        self.model = nn.Sequential(first, nn.Dropout(0.2, rng=rng), nn.GELU(), nn.Linear(6, 4, rng=rng))
        first.lora_B.data[...] = backend.to_device(rng.standard_normal((6, 2)).astype("float32"))
        self.named = [(name, p) for name, p in self.model.named_parameters() if p.trainable]
        half_of = len(self.named) // 2
        groups = [{"params": self.named[:half_of]}, {"params": self.named[half_of:]}]
        self.optimizer = {"adam": lambda: optim.AdamW(groups, lr=0.05, weight_decay=0.1),
                          "sgd": lambda: optim.SGD(groups, lr=0.05, momentum=0.5)}[kind]()
        self.scheduler = optim.Scheduler(self.optimizer, optim.cosine(total=50, warmup=3))
        self.scaling = optim.LossScale(2.0 ** 8)
        self.rng = np.random.default_rng(5)
        self.as_given = (lambda a: a) if record is minilora.record else backend.to_device
        self.settings = types.SimpleNamespace(clip=None, scheduled=False, scaled=False, fail=False)
        self.factors, self.accumulation, self.calls = [1.0], 1, 0
        self.kept = {}
        tell, settings, scale = self.tell, self.settings, self.factors

        @record
        def step(x, y, last=True):
            tell()
            error = self.model(x) - y  # products of vectors, as in ops.mse without its kernel, cannot be recorded
            loss = (error * error).mean() * scale[0]
            if settings.fail:
                raise KeyError("the step's own")
            (self.scaling.scaled(loss) if settings.scaled else loss).backward()
            if not last:
                return {"loss": loss, "norm": None}
            if settings.scaled:
                self.scaling.unscale(self.optimizer)
                return {"loss": loss, "norm": self.optimizer.clip_grad_norm(1.0)}
            norm = None if settings.clip is None else self.optimizer.clip_grad_norm(settings.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if settings.scheduled:
                self.scheduler.step()
            return {"loss": loss, "norm": norm}

        self.step = step

    @property
    def tell(self):
        return types.MethodType(count_call, self)

    def batch(self, rows):
        return [self.rng.standard_normal((rows, n)).astype("float32") for n in (5, 4)]

    def state(self):
        groups = self.optimizer.state_dict()["groups"]
        return {
            "parameters": [fetch(p).tobytes() for p in self.model.parameters()],
            "trainable": [p.trainable for p in self.model.parameters()],
            "gradients": [None if p.gathered is None else fetch(p.gathered).tobytes() for p in self.model.parameters()],
            "moments": [{name: a.tobytes() for name, a in group["state"].items()} for group in groups],
            "steps": [group["steps"] for group in groups], "settings": [group["settings"] for group in groups],
            "module": [(path, value) for path, value in self.model.named_state() if not hasattr(value, "shape")],
            "schedule": self.scheduler.state_dict(), "scale": self.scaling.state_dict(),
        }


def count_call(world):
    vars(world)["calls"] += 1  # by a name that nobody sees: a step must not change what it reads


# -- events: each takes the world and a drawn number -------------------------------------------------------------------

def call(world, number, last=True, rows=4, make=backend.to_device):
    x, y = (make(a) for a in world.batch(rows))
    found = world.step(x, y, last) if number % 2 else world.step(x, y=y, last=last)
    if world.settings.scaled and last:
        world.scaling.step(world.optimizer, found["norm"])
        world.optimizer.zero_grad()
    return told(found)


def told(result):
    return {name: None if value is None else fetch(value).tobytes() for name, value in result.items()}


def with_lists(world, number):
    x, y = (backend.to_device(a) for a in world.batch(4))
    for a in (x, y):
        a *= 0.5  # the same array with other numbers counts as others
    return told(world.step(x, y, last=world.settings.scaled is False))


def accumulated(world, number):
    for i in range(3):
        found = call(world, number, last=i == 2)
    return found


def in_context(context):
    def event(world, number):
        with context(world):
            return call(world, number)
    return event


def in_a_thread(world, number):
    found = []
    device = backend.current_device()

    def work():
        try:
            found.append(call(world, number))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert device is backend.current_device()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def on_a_stream(world, number):
    xp = backend.current_device().xp
    with world.kept.setdefault("stream", xp.cuda.Stream(non_blocking=True)):
        return call(world, number)


def freeze(world, number):
    p = world.named[number % len(world.named)][1]
    p.trainable = not p.trainable
    if not p.trainable:
        p.grad = None


def adapters(world, number):
    names = list(world.model[0].adapters)
    if len(names) == 1:
        world.model[0].attach("other", lora.adapt(nn.Linear(5, 6, rng=0), r=1, rng=1).adapters["default"])
    lora.activate(world.model, [["default"], ["other"], ["default", "other"]][number % 3])


def merge(world, number):
    layer = world.model[0]
    if layer.merged:
        lora.unmerge(world.model)
    else:
        lora.merge(world.model)


def load_model(world, number):
    if world.model[0].merged:
        return
    state = world.kept.setdefault("model", world.model.state_dict())
    own = world.model.state_dict()
    world.model.load_state_dict({name: state.get(name, value) for name, value in own.items()})


def load_optimizer(world, number):
    world.optimizer.load_state_dict(world.kept.setdefault("optimizer", world.optimizer.state_dict()))


def setting(name, values):
    def event(world, number):
        group = world.optimizer.groups[number % len(world.optimizer.groups)]
        if name in group.settings:
            group.settings[name] = values[number // 2 % len(values)]
    return event


def replaced_settings(world, number):
    world.optimizer.groups[0].settings = dict(world.optimizer.groups[0].settings)


def own_setting(name, values):
    def event(world, number):
        setattr(world.settings, name, values[number % len(values)])
    return event


def dropout(world, number):
    world.model[1].p = (0.2, 0.0, 0.6)[number % 3]


def seed(world, number):
    world.model[1].seed = number


def exchange(world, number):
    layer = nn.Dropout(0.4, rng=number)
    layer.training = world.model.training
    setattr(world.model, "1", layer)


def replaced_array(world, number):
    p = world.model[0].weight
    p.data = p.data.copy()


def read_gradient(world, number):
    for _, p in world.named:
        if p.grad is not None and number % 2:
            p.grad = p.grad * 2.0


def forgotten(world, number):
    world.optimizer.zero_grad()


def scale(world, number):
    world.factors[0] = (1.0, -1.0, 0.5)[number % 3]


def loss_scale(world, number):
    if number % 2:
        world.scaling.overflowed()
    else:
        world.scaling.value = 2.0 ** 8


def let_go(world, number):
    getattr(world.step, "forget", bool)()


EVENTS = {
    "call": call, "call again": call, "host arrays": lambda w, n: call(w, n, make=w.as_given),
    "tensors": lambda w, n: call(w, n, make=minilora.tensor), "three rows": lambda w, n: call(w, n, rows=3),
    "changed in place": with_lists, "accumulated": accumulated, "part": lambda w, n: call(w, n, last=False),
    "no_grad": in_context(lambda w: minilora.no_grad()), "mixed": in_context(lambda w: half.mixed()),
    "disabled": in_context(lambda w: lora.disabled(w.model)), "thread": in_a_thread, "stream": on_a_stream,
    "train": lambda w, n: w.model.train(n % 2 == 0), "eval": lambda w, n: w.model.eval(),
    "one part trains": lambda w, n: w.model[n % 2].train(n % 4 < 2),
    "freeze": freeze, "freeze all": lambda w, n: [setattr(p, "trainable", n % 2 == 0) for _, p in w.named],
    "adapters": adapters, "merge": merge, "load model": load_model, "load optimizer": load_optimizer,
    "lr": setting("lr", [0.1, 0.05, 0.0]), "decay": setting("weight_decay", [0.0, 0.1]),
    "betas": setting("betas", [(0.9, 0.999), (0.5, 0.9)]), "momentum": setting("momentum", [0.5, 0.0]),
    "eps": setting("eps", [1e-8, 1e-3]), "settings": replaced_settings,
    "clip": own_setting("clip", [None, 0.1, 1.0]), "scheduled": own_setting("scheduled", [True, False]),
    "scaled": own_setting("scaled", [True, False]), "fail": own_setting("fail", [True, False, False]),
    "dropout": dropout, "seed": seed, "exchange": exchange, "array": replaced_array, "read": read_gradient,
    "forgotten": forgotten, "scale": scale, "loss scale": loss_scale, "schedule": lambda w, n: w.scheduler.step(),
    "forget": let_go, "checkpointing": lambda w, n: setattr(w.model, "grad_checkpoint", n % 2 == 0),
}
CALLS = [name for name in EVENTS if name in ("call", "call again", "host arrays", "tensors", "three rows", "accumulated")]


def happens(world, event, number):
    """What came of an event: what it gave, or the error's type."""
    try:
        return EVENTS[event](world, number), None
    except (MiniloraError, KeyError) as error:
        return type(error), error


def live(program, kind, card=plain_card):
    with card():
        worlds = World(minilora.record, kind), World(lambda step: step, kind)
        for event, number in program:
            before = worlds[0].state()
            found, error = happens(worlds[0], event, number)
            if isinstance(error, StateError) and str(error).startswith("record: "):
                assert worlds[0].settings.fail and worlds[0].state() == before, (event, number, str(error))
                worlds[1].rng.bit_generator.state = worlds[0].rng.bit_generator.state
                continue
            expected, plain = happens(worlds[1], event, number)
            if isinstance(error, KeyError) and worlds[0].state() == before:
                continue  # the step's own error while it was recorded: all of it is taken back
            if event in CALLS or plain is not None:
                assert found == expected, (event, number, error, plain)
            states = [world.state() for world in worlds]
            for name in states[0]:
                assert states[0][name] == states[1][name], (event, number, name)
        return worlds


events = st.tuples(st.one_of(st.sampled_from(CALLS), st.sampled_from(sorted(EVENTS))), st.integers(0, 11))


@given(st.lists(events, max_size=16), st.sampled_from(["adam", "sgd"]))
def test_a_recorded_step_is_the_step(program, kind):
    live(program, kind)


@pytest.mark.slow
@pytest.mark.parametrize("event", sorted(EVENTS))
def test_each_event_between_recorded_calls(event):
    calls = [("call", 1)] * 3
    for number in range(6):
        live([*calls, (event, number), *calls, (event, number + 1), *calls], "adam" if number % 2 else "sgd")


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(4))
def test_the_events_on_a_card(part):
    need_gpu()
    program = [("call", 1)] * 3
    for event in sorted(EVENTS)[part::4]:
        program += [(event, 1), ("call", 1), ("call", 0), (event, 2), ("call", 1), ("three rows", 1)]
    live(program, "adam" if part % 2 else "sgd", lambda: backend.use("gpu"))


def test_replays_are_replays():
    recorded, plain = live([("call", 1)] * 6, "adam")
    assert (recorded.calls, plain.calls) == (2, 6)
    recorded, _ = live([("train", 1), ("call", 1), ("train", 0), ("call", 1)] * 6, "adam")
    assert recorded.calls == 4  # two graphs, each called and recorded
    recorded, _ = live([("accumulated", 1)] * 6, "sgd")
    assert recorded.calls <= 8
