"""What a pass through a model reads and makes: for checks that say why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy

from ... import backend
from ...recording import is_recording, watcher
from ...tensor import Parameter, Tensor

__all__ = ["Goal", "Seen", "plain", "watched"]

Array = Any


class Goal:
    """An operation that compares outputs with what is wanted.

    Attributes
    ----------
    kind : {"classes", "numbers"}
    classes : int
    wanted : array
        The labels, or the numbers that are wanted; on their device.
    value : array, shape ()
        What it gave.
    largest : array, shape (), or None
        The largest logit or prediction, without its sign.
    """

    def __init__(self, kind: str, classes: int, wanted: Array, value: Array, made: Array | None) -> None:
        self.kind, self.classes, self.wanted, self.value = kind, classes, wanted, value
        self.largest = None if made is None or not made.size else abs(made).max()


class Seen:
    """What a watched pass came by.

    Attributes
    ----------
    read, recorded : set of int
        The identities of the parameters that an operation read, and read while it was remembered for backward.
    goals : list of Goal
    softmax : int
        Over how many numbers the last softmax was; 0 if there was none.
    dead : list of tuple of int
        The shapes of ReLUs' outputs that are 0 everywhere.
    """

    def __init__(self) -> None:
        self.read: set[int] = set()
        self.recorded: set[int] = set()
        self.goals: list[Goal] = []
        self.softmax = 0
        self.dead: list[tuple[int, ...]] = []

    def look(self, op: Any, inputs: tuple[Any, ...], y: Array) -> None:
        found = {id(x) for x in inputs if isinstance(x, Parameter)} | {id(p) for p, _, _ in op.leaves}
        self.read |= found
        if is_recording():
            self.recorded |= found
        name = (type(op).reference or type(op)).__name__
        if name == "CrossEntropy":
            self.goals.append(Goal("classes", inputs[0].shape[-1], op.labels, y, array_of(inputs[0])))
        elif name == "LinearCrossEntropy":
            self.goals.append(Goal("classes", inputs[1].shape[0], op.labels, y, None))
        elif name == "MSE":
            self.goals.append(Goal("numbers", 0, array_of(inputs[1]), y, array_of(inputs[0])))
        elif name in ("LogSoftmax", "Softmax"):
            self.softmax = inputs[0].shape[op.axis]
        elif name == "ReLU" and y.size and not plain(y.max()):
            self.dead.append(tuple(y.shape))


def plain(value: Any) -> float:
    """An array () of any device as a number: a sync point. NumPy gives a number of its own where no axis is left."""
    return float(value if isinstance(value, numpy.generic) else backend.to_host(value))


def array_of(x: Any) -> Array:
    return x.data if isinstance(x, Tensor) else x


@contextmanager
def watched() -> Iterator[Seen]:
    """Within this context all operations are looked at."""
    seen = Seen()
    token = watcher.set(seen.look)
    try:
        yield seen
    finally:
        watcher.reset(token)
