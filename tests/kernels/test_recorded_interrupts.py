"""Ctrl-C wherever it comes in a call of a recorded step: all of the step is done or nothing, and the next call does it."""
import pytest
from interrupts import Interrupt
from plain_card import plain_card
from test_recorded_programs import World, call

import minilora


def interrupted(every, forget):
    """Interrupt each `every`-th line of a call: how often nothing was done, and how often all.

    With `forget` it is the call that records, else one that replays.
    """
    counts = {"nothing": 0, "all": 0}
    with plain_card():
        recorded, plain = World(minilora.record, "adam"), World(lambda step: step, "adam")

        def both():
            call(recorded, 1), call(plain, 1)
            assert recorded.state() == plain.state(), line

        line = 1
        for world in (recorded, plain):
            world.settings.scheduled, world.settings.clip = True, 1.0
        for _ in range(3):
            both()
        while True:
            if forget:
                recorded.step.forget()
                both()
            drawn, before = recorded.rng.bit_generator.state, recorded.state()
            if not Interrupt(line, every=True).during(call, recorded, 1):
                return counts
            done = recorded.state() != before
            counts["all" if done else "nothing"] += 1
            if done:
                call(plain, 1)
            else:
                recorded.rng.bit_generator.state = drawn
            both()
            line += every


@pytest.mark.parametrize("every", [pytest.param(n, marks=pytest.mark.slow) for n in (13, 1)])
def test_before_a_replay(every):
    counts = interrupted(every, forget=False)
    assert counts["nothing"] > counts["all"] > 0


@pytest.mark.parametrize("every", [pytest.param(n, marks=pytest.mark.slow) for n in (1511, 23)])
def test_while_a_step_is_recorded(every):
    assert interrupted(every, forget=True)["nothing"] > 5
