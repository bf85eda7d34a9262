"""Schedules: their shapes, their warm-up, and what writes them into an optimizer."""
import json
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

import minilora
from minilora import optim
from minilora.errors import ConfigError, MiniloraError


def parameter():
    return minilora.Parameter(minilora.backend.asarray(np.zeros(2)))


def rates(optimizer):
    return [group.settings["lr"] for group in optimizer.groups]


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-14, atol=1e-16)


def test_constant():
    assert [optim.constant()(t) for t in range(3)] == [1.0, 1.0, 1.0]
    assert [optim.constant(warmup=4)(t) for t in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear():
    close([optim.linear(total=4)(t) for t in range(7)], [1, 0.75, 0.5, 0.25, 0, 0, 0])
    close([optim.linear(total=4, final=0.2)(t) for t in range(6)], [1, 0.8, 0.6, 0.4, 0.2, 0.2])
    close([optim.linear(total=6, warmup=2)(t) for t in range(8)], [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0])


def test_cosine():
    close([optim.cosine(total=4)(t) for t in range(6)], [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0, 0])
    close([optim.cosine(total=2, final=0.5)(t) for t in range(4)], [1, 0.75, 0.5, 0.5])
    close([optim.cosine(total=4, warmup=2)(t) for t in range(6)], [0.5, 1, 1, 0.5, 0, 0])


def test_step_decay():
    close([optim.step_decay(every=2)(t) for t in range(6)], [1, 1, 0.1, 0.1, 0.01, 0.01])
    close([optim.step_decay(every=1, factor=0.5)(t) for t in range(4)], [1, 0.5, 0.25, 0.125])


@given(st.sampled_from([optim.linear, optim.cosine]), st.integers(1, 50), st.data(), st.floats(0, 1))
def test_shape_of_every_schedule(schedule, total, data, final):
    warmup = data.draw(st.integers(0, total - 1))
    values = [schedule(total, warmup, final)(t) for t in range(total + 10)]
    assert all(0 < a < b for a, b in zip(values[:warmup], values[1:warmup]))
    assert values[max(warmup - 1, 0)] == 1.0  # the ramp ends at the full rate
    assert values[warmup] == 1.0  # and the decay begins there
    decay = values[warmup:]
    assert all(a >= b - 1e-15 for a, b in zip(decay, decay[1:]))
    assert all(abs(value - final) < 1e-15 for value in values[total:])


@pytest.mark.parametrize("schedule", [optim.linear, optim.cosine])
@pytest.mark.parametrize("options", [
    dict(total=0), dict(total=-1), dict(total=3, warmup=3), dict(total=3, warmup=-1), dict(total=math.nan)])
def test_lengths_out_of_range(schedule, options):
    with pytest.raises(ConfigError, match=r"warmup must be in \[0, total\)"):
        schedule(**options)


@pytest.mark.parametrize("every", [0, -1])
def test_step_decay_out_of_range(every):
    with pytest.raises(ConfigError, match=f"every must be >= 1, got {every}"):
        optim.step_decay(every)


@pytest.mark.parametrize("make", [lambda: optim.constant(-1), lambda: optim.linear(10, final=math.nan),
                                  lambda: optim.cosine(10, final=math.inf), lambda: optim.step_decay(2, math.nan)],
                         ids=["warmup -1", "final NaN", "final inf", "factor NaN"])
def test_settings_that_give_no_rate(make):
    with pytest.raises(ConfigError):
        make()


# -- Scheduler ----------------------------------------------------------------------------------------------


def test_scheduler_scales_every_groups_own_rate(device):
    optimizer = optim.SGD([{"params": [parameter()], "lr": 0.5}, {"params": [parameter()]}], lr=0.1)
    scheduler = optim.Scheduler(optimizer, optim.linear(total=4, warmup=2))
    seen = [rates(optimizer)]
    for _ in range(4):
        scheduler.step()
        seen.append(rates(optimizer))
    close(seen, [[0.5 * f, 0.1 * f] for f in (0.5, 1, 1, 0.5, 0)])


def test_scheduler_rate_is_the_one_the_step_uses(device):
    p = parameter()
    optimizer = optim.SGD([p], lr=1.0)
    scheduler = optim.Scheduler(optimizer, optim.step_decay(every=1, factor=0.5))
    for _ in range(3):
        optimizer.zero_grad()
        p.sum().backward()
        optimizer.step()
        scheduler.step()
    assert minilora.to_host(p.data)[0] == -(1 + 0.5 + 0.25)


def test_scheduler_takes_a_function():
    optimizer = optim.SGD([parameter()], lr=2.0)
    scheduler = optim.Scheduler(optimizer, lambda step: 1.0 / (step + 1))
    scheduler.step()
    assert rates(optimizer) == [1.0]


def test_schedule_that_gives_no_rate_changes_nothing():
    optimizer = optim.SGD([parameter()], lr=2.0)
    scheduler = optim.Scheduler(optimizer, lambda step: [1.0, 0.5, math.nan][step])
    scheduler.step()
    with pytest.raises(ConfigError, match=r"schedule\(2\) must be a number in \[0, inf\), got nan"):
        scheduler.step()
    assert scheduler.state_dict() == {"count": 1, "base": [2.0]} and rates(optimizer) == [1.0]
    with pytest.raises(ConfigError):
        optim.Scheduler(optimizer, lambda step: -1.0)
    assert rates(optimizer) == [1.0]


def test_scheduler_resumes():
    def make():
        optimizer = optim.SGD([{"params": [parameter()], "lr": 0.3}, {"params": [parameter()]}], lr=0.1)
        return optimizer, optim.Scheduler(optimizer, optim.cosine(total=10, warmup=3))

    whole_optimizer, whole = make()
    optimizer, scheduler = make()
    for _ in range(4):
        whole.step()
        scheduler.step()
    saved = json.loads(json.dumps(scheduler.state_dict()))
    scheduler.step()
    optimizer, resumed = make()
    optimizer.load_state_dict(whole_optimizer.state_dict())
    resumed.load_state_dict(saved)
    for _ in range(8):
        assert rates(optimizer) == rates(whole_optimizer)
        whole.step()
        resumed.step()


def test_scheduler_state_is_a_copy():
    scheduler = optim.Scheduler(optim.SGD([parameter()], lr=0.3), optim.constant())
    state = scheduler.state_dict()
    assert state == {"count": 0, "base": [0.3]}
    state["base"][0] = 9.0
    scheduler.step()
    assert rates(scheduler.optimizer) == [0.3]


@pytest.mark.parametrize("state", [{}, {"count": 1, "base": [0.1, 0.2]}, {"count": 1}, {"base": [0.1]}, None,
                                   {"count": "x", "base": [0.1]}, {"count": 1, "base": [math.nan]}],
                         ids=lambda state: str(state))
def test_scheduler_rejected_load_changes_nothing(state):
    optimizer = optim.SGD([parameter()], lr=0.3)
    scheduler = optim.Scheduler(optimizer, optim.step_decay(every=1, factor=0.5))
    scheduler.step()
    with pytest.raises(MiniloraError):
        scheduler.load_state_dict(state)
    assert scheduler.state_dict() == {"count": 1, "base": [0.3]} and rates(optimizer) == [0.15]
