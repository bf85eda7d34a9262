"""Counters in parts of a batch: each part counts by itself, and no two get one number."""

from types import SimpleNamespace

from minilora import parts


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
