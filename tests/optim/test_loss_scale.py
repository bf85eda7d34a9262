"""LossScale by itself: the schedule of the scale, what a skipped step touches, and what is refused."""
import functools

import numpy as np
import pytest
from conftest import fetch, place
from hypothesis import given
from hypothesis import strategies as st

import minilora
from minilora import Parameter, nn, ops, optim, replay
from minilora.errors import ConfigError, DivergedError, StateDictError, StateError
from minilora.half import mixed
from minilora.optim import LossScale


def test_halved_and_doubled():
    scaling = LossScale(8.0, growth_steps=3, max_skips=3)
    seen = []
    for overflow in (1, 0, 0, 0, 0, 1, 0, 0, 0):
        scaling.overflowed() if overflow else scaling.stepped()
        seen.append((scaling.value, scaling.good, scaling.in_a_row))
    assert seen == [(4, 0, 1), (4, 1, 0), (4, 2, 0), (8, 0, 0), (8, 1, 0), (4, 0, 1), (4, 1, 0), (4, 2, 0), (8, 0, 0)]
    assert scaling.skipped == 2 and repr(scaling) == "LossScale(8, 2 skipped)"


def test_never_below_one_and_never_above_the_most():
    scaling = LossScale(2.0, growth_steps=1)
    scaling.overflowed()
    before = scaling.state_dict()
    with pytest.raises(DivergedError, match="the loss scale is 1 already, and cannot be halved"):
        scaling.overflowed()
    assert scaling.state_dict() == before
    for _ in range(40):
        scaling.stepped()
    assert scaling.value == 2.0 ** 32


def test_too_many_in_a_row():
    scaling = LossScale(2.0 ** 20, max_skips=4)
    for _ in range(3):
        scaling.overflowed()
    with pytest.raises(DivergedError, match="4 steps in a row were to be skipped"):
        scaling.overflowed()
    scaling.stepped()
    scaling.overflowed()


@given(st.integers(0, 32), st.integers(0, 3))
def test_scaling_changes_no_bit_of_a_float32_gradient(power, seed):
    rng = np.random.default_rng(seed)
    x = minilora.tensor(rng.standard_normal((5, 4)).astype("float32"))
    found = []
    for scaling in (LossScale(2.0 ** power), None):
        layer = nn.Linear(4, 3, rng=seed)
        optimizer = optim.SGD(layer.parameters(), lr=0.1)
        loss = ops.mean(layer(x))
        (loss if scaling is None else scaling.scaled(loss)).backward()
        if scaling is not None:
            scaling.unscale(optimizer)
        found.append([p.grad.tobytes() for p in layer.parameters()])
    assert found[0] == found[1]


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("read", [False, True])
def test_a_skipped_step_touches_nothing(bad, read, device):
    p, q = Parameter(place([1.0, 2.0], "float32")), Parameter(place([3.0], "float16"))
    optimizer, scaling = optim.Adam([{"params": [p]}, {"params": [q]}], lr=0.1), LossScale(2.0)
    schedule = optim.Scheduler(optimizer, optim.linear(10))

    def step(factor):
        optimizer.zero_grad()
        with np.errstate(all="ignore"):
            scaling.scaled(ops.sum(p * place([1.0, 1.0], "float32"))).backward()
            scaling.scaled(ops.sum(q * float(factor))).backward()
            if read:
                assert p.grad is not None and q.grad is not None
            scaling.unscale(optimizer)
            if scaling.step(optimizer, optimizer.clip_grad_norm(1.0)):
                schedule.step()
                return True
        return False

    assert step(1.0)
    before = [fetch(x).tobytes() for x in (p, q)], str(optimizer.state_dict()), schedule.state_dict()
    assert not step(bad)
    assert ([fetch(x).tobytes() for x in (p, q)], str(optimizer.state_dict()), schedule.state_dict()) == before
    assert (scaling.value, scaling.skipped, scaling.in_a_row) == (1.0, 1, 1)
    assert step(1.0)


def test_float16_parameters_get_what_float32_has(device):
    """Gradients of 2^-20: unscaled in float16 they would be 0 at 2^-25, and clipped too."""
    p = Parameter(place([1.0], "float16"))
    optimizer, scaling = optim.SGD([p], lr=2.0 ** 10), LossScale(2.0 ** 16)
    scaling.scaled(ops.mul(ops.cast(p, "float32"), 2.0 ** -28).sum()).backward()
    scaling.unscale(optimizer)
    assert float(fetch(optimizer.groups[0].grad)[0]) == 2.0 ** -28


def test_unscaling_twice_is_refused():
    layer = nn.Linear(2, 1, rng=0)
    optimizer, scaling = optim.SGD(layer.parameters(), lr=0.1), LossScale()
    scaling.scaled(ops.mean(layer(minilora.tensor([[1.0, 2.0]])))).backward()
    scaling.unscale(optimizer)
    before = [p.grad.tobytes() for p in layer.parameters()]
    with pytest.raises(StateError, match="divided by the scale already"):
        scaling.unscale(optimizer)
    assert [p.grad.tobytes() for p in layer.parameters()] == before
    assert scaling.step(optimizer, 1.0)
    scaling.unscale(optimizer)


def test_recorded_steps():
    """The scale is that of every call, in memory that is filled before a replay. `step` has to be outside."""
    memory = []

    def allocate(count, dtype):
        memory.append(np.zeros(count, dtype))
        return memory[-1], functools.partial(memory[-1].__setitem__, slice(None))

    layer = nn.Linear(2, 1, rng=0)
    optimizer, scaling = optim.SGD(layer.parameters(), lr=0.1), LossScale()
    with replay.Recording(allocate) as recording:
        optimizer.zero_grad()
        scaling.scaled(ops.mean(layer(minilora.tensor([[1.0, 2.0]])))).backward()
        scaling.unscale(optimizer)
        with pytest.raises(StateError, match="record: the step calls LossScale.step"):
            scaling.step(optimizer, 1.0)
        with pytest.raises(StateError, match="record: the step calls LossScale.step"):
            scaling.step(optimizer, float("inf"))
    assert [numbers.tolist() for numbers in memory] == [[2.0 ** 16], [2.0 ** -16]]
    with pytest.raises(StateError, match="divided by the scale already"):
        recording.repeat()
    scaling.overflowed()
    scaling._unscaled = None
    pictures = recording.pictures()
    recording.repeat()
    assert [numbers.tolist() for numbers in memory] == [[2.0 ** 15], [2.0 ** -15]] and scaling._unscaled is optimizer
    for put in pictures:
        put()
    assert scaling._unscaled is None


def test_settings_and_states():
    for wrong in (0, 0.5, 3, 2.0 ** 33, float("nan"), "2", True, None):
        with pytest.raises(ConfigError, match="start must be"):
            LossScale(wrong)
    for name in ("growth_steps", "max_skips"):
        for wrong in (0, 1.5, True, None):
            with pytest.raises(ConfigError, match=name):
                LossScale(**{name: wrong})
    scaling = LossScale(64.0)
    scaling.overflowed()
    scaling.stepped()
    again = LossScale()
    again.load_state_dict(scaling.state_dict())
    assert again.state_dict() == scaling.state_dict() == {"value": 32.0, "good": 1, "skipped": 1, "in_a_row": 0}
    good = scaling.state_dict()
    for wrong in ({}, None, [], {**good, "value": 3.0}, {**good, "good": -1}, {**good, "more": 1}, {**good, "skipped": 1.0}):
        with pytest.raises(StateDictError, match="LossScale: expected"):
            again.load_state_dict(wrong)
        assert again.state_dict() == good


def test_a_loop_of_ones_own_learns():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((64, 4)).astype("float32"), rng.standard_normal((4, 1)).astype("float32")
    layer, losses = nn.Linear(4, 1, rng=0), []
    optimizer, scaling = optim.Adam(layer.parameters(), lr=0.05), LossScale()
    for _ in range(150):
        optimizer.zero_grad()
        with mixed():
            loss = ops.mse(layer(minilora.tensor(x)), minilora.tensor(x @ w))
            scaling.scaled(loss).backward()
            scaling.unscale(optimizer)
            norm = optimizer.clip_grad_norm(1.0)
        scaling.step(optimizer, norm)
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0]
