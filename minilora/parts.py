"""Which part of a batch this thread computes, and whether for the second time: for what counts calls, the masks of dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

from .errors import GraphError

__all__ = ["Part", "computing", "current", "in_process", "level", "next_step", "remembering", "repeating", "seed_here",
           "steps_of"]

STRIDE = 0x9E3779B97F4A7C15  # of the seeds of processes: odd, so that no two of 2^64 have the same
ROUND = 1 << 20  # more than the passes that an update makes through one module


class Part:
    """A part of a batch.

    Attributes
    ----------
    number : int
        From 0.
    calls : dict
        How often each counter was asked for a step in this part.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.calls: dict[Any, int] = {}


Draw = Callable[[], int]

_part: ContextVar[Part | None] = ContextVar("minilora.part", default=None)
_source: ContextVar[Callable[[Any], Draw] | None] = ContextVar("minilora.steps", default=None)


def current() -> Part | None:
    """The part that this thread computes; None outside of all."""
    return _part.get()


@contextmanager
def computing(part: Part) -> Iterator[None]:
    """Within this context, this thread computes that part."""
    token = _part.set(part)
    try:
        yield
    finally:
        _part.reset(token)


def next_step(counter: Any) -> int:
    """The next step of a counter (whatever has an int `step`), which counts on.

    In a part of a batch the counter itself stays, for the other parts read it meanwhile: the part counts its own calls, and has
    its number in the upper bits, so that no two parts draw one mask. Whoever runs the parts moves the counter afterwards.
    """
    part = _part.get()
    if part is None:
        counter.step += 1
        return int(counter.step)
    part.calls[counter] = calls = part.calls.get(counter, 0) + 1
    return int(counter.step) + calls + (part.number << 48)


def steps_of(counter: Any) -> Draw:
    """What gives the next step of a counter: `next_step`, or where a computation is repeated, the step that it had then."""
    source = _source.get()
    return (lambda: next_step(counter)) if source is None else source(counter)


@contextmanager
def remembering(steps: list[int]) -> Iterator[None]:
    """Within this context, write down every step that is drawn: for `repeating`."""
    outer = _source.get()

    def source(counter: Any) -> Draw:
        draw: Draw = (lambda: next_step(counter)) if outer is None else outer(counter)
        place = len(steps)
        steps.append(0)

        def drawn() -> int:
            steps[place] = draw()
            return steps[place]
        return drawn

    token = _source.set(source)
    try:
        yield
    finally:
        _source.reset(token)


@contextmanager
def repeating(steps: list[int]) -> Iterator[None]:
    """Within this context, nothing counts on: steps are those that were written down, in their order.

    Raises
    ------
    GraphError
        If more or fewer are asked for.
    """
    asked = 0

    def source(counter: Any) -> Draw:
        nonlocal asked
        place, asked = asked, asked + 1
        if asked > len(steps):
            _refuse(f"at least {asked}", len(steps))
        return lambda: steps[place]

    token = _source.set(source)
    try:
        yield
    finally:
        _source.reset(token)
    if asked < len(steps):
        _refuse(str(asked), len(steps))


def _refuse(asked: str, drawn: int) -> NoReturn:
    raise GraphError(f"a part of a network that backward computes again asks for {asked} masks of dropout, and drew {drawn} in "
                     "the forward pass: call backward() before train() or eval() switches it")


_process: ContextVar[int] = ContextVar("minilora.process", default=0)


@contextmanager
def in_process(rank: int) -> Iterator[None]:
    """Within this context, what is computed is the share of that one of several processes."""
    token = _process.set(rank)
    try:
        yield
    finally:
        _process.reset(token)


def seed_here(seed: int) -> int:
    """The seed of this process's masks, of one that all processes hold: that of the first process is the seed itself.

    The seed is the key of the generator, and another key gives an independent stream. So processes draw different masks, each
    the same ones in every run, and what a checkpoint holds of a module is the same in all of them.
    """
    return (seed + _process.get() * STRIDE) % (1 << 64)


def level(counter: Any) -> None:
    """Move a counter on to the next round number, between two updates.

    A process without rows in a batch makes no pass through the model, and its counters stay behind. Afterwards all have the
    same again, without a message about it.
    """
    counter.step = (counter.step // ROUND + 1) * ROUND
