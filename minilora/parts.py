"""Which part of a batch this thread computes, for the few things that count calls: the masks of dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

__all__ = ["Part", "computing", "current", "next_step"]


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


_part: ContextVar[Part | None] = ContextVar("minilora.part", default=None)


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
