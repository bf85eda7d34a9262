"""Counters in parts of a batch: each part counts by itself, and no two get one number."""

from types import SimpleNamespace

import pytest

from minilora import parts
from minilora.errors import GraphError


class Counter(SimpleNamespace):
    __hash__ = object.__hash__


def test_outside_of_parts_the_counter_counts():
    counter = Counter(step=5)
    assert parts.current() is None
    assert [parts.next_step(counter) for _ in range(3)] == [6, 7, 8] and counter.step == 8


def test_in_a_part_the_counter_stays():
    one, other, drawn = Counter(step=5), Counter(step=0), []
    for number in range(3):
        part = parts.Part(number)
        with parts.computing(part):
            assert parts.current() is part
            drawn += [parts.next_step(one), parts.next_step(other), parts.next_step(one)]
        assert part.calls == {one: 2, other: 1}
    assert parts.current() is None and (one.step, other.step) == (5, 0)
    assert drawn[:3] == [6, 1, 7] and len(set(drawn)) == 9 and max(drawn) < 2 ** 64


def test_steps_are_remembered_and_repeated():
    one, other, steps = Counter(step=5), Counter(step=0), []
    with parts.remembering(steps):
        drawn = [parts.steps_of(one)(), parts.steps_of(other)(), parts.steps_of(one)()]
    assert drawn == [6, 1, 7] == steps and (one.step, other.step) == (7, 1)
    for _ in range(2):
        with parts.repeating(steps):
            assert [parts.steps_of(one)(), parts.steps_of(other)(), parts.steps_of(one)()] == drawn
    assert (one.step, other.step) == (7, 1) and parts.steps_of(one)() == 8


def test_what_is_repeated_can_hold_what_is_remembered():
    counter, outer, inner, again = Counter(step=0), [], [], []
    with parts.remembering(outer):
        parts.steps_of(counter)()
        with parts.remembering(inner):
            parts.steps_of(counter)()
    assert (outer, inner, counter.step) == ([1, 2], [2], 2)
    with parts.repeating(outer):
        parts.steps_of(counter)()
        with parts.remembering(again):
            parts.steps_of(counter)()
    assert again == inner and counter.step == 2


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_steps_is_refused(count):
    counter, steps = Counter(step=0), [1, 2]
    with pytest.raises(GraphError, match=f"asks for .*{count} masks of dropout, and drew 2"):
        with parts.repeating(steps):
            for _ in range(count):
                parts.steps_of(counter)()
    assert parts.steps_of(counter)() == 1


def test_processes_have_seeds_of_their_own_and_the_first_the_seed_itself():
    seeds = []
    for rank in range(1000):
        with parts.in_process(rank):
            seeds.append(parts.seed_here(2 ** 63 - 5))
    assert seeds[0] == parts.seed_here(2 ** 63 - 5) == 2 ** 63 - 5
    assert len(set(seeds)) == 1000 and all(0 <= seed < 2 ** 64 for seed in seeds)


def test_counters_that_fell_apart_are_level_again_and_ahead():
    counters = [SimpleNamespace(step=step) for step in (0, 1, 7, parts.ROUND - 1)]
    for counter in counters:
        parts.level(counter)
    assert {counter.step for counter in counters} == {parts.ROUND}
    for counter, drawn in zip(counters, (0, 3, 3, 2)):
        counter.step += drawn
        parts.level(counter)
    assert {counter.step for counter in counters} == {2 * parts.ROUND}
