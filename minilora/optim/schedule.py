"""Learning-rate schedules: a factor as a function of the step, and what writes it into an optimizer.

>>> from minilora import optim
>>> [optim.constant(warmup=4)(step) for step in (0, 1, 3, 9)], [optim.linear(total=10)(step) for step in (0, 5, 10)]
([0.25, 0.5, 1.0, 1.0], [1.0, 0.5, 0.0])
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .. import replay
from ..errors import ConfigError, StateDictError
from .optimizer import Optimizer, check_range

__all__ = ["Scheduler", "constant", "cosine", "linear", "step_decay"]

Schedule = Callable[[int], float]


def _ramp(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _check(name: str, total: int, warmup: int, final: float) -> None:
    if not 0 <= warmup < total:
        raise ConfigError(f"{name}: warmup must be in [0, total), got warmup={warmup}, total={total}")
    check_range(f"{name}: final", final, 0.0)


def constant(warmup: int = 0) -> Schedule:
    """Factor 1, after a linear ramp over the first `warmup` steps."""
    if warmup < 0:
        raise ConfigError(f"constant: warmup must be >= 0, got {warmup}")
    return lambda step: _ramp(step, warmup)


def linear(total: int, warmup: int = 0, final: float = 0.0) -> Schedule:
    """From 1 down to `final` in a straight line over `total` steps, after a linear ramp over the first `warmup`."""
    _check("linear", total, warmup, final)

    def factor(step: int) -> float:
        done = min(max(step - warmup, 0) / (total - warmup), 1.0)
        return _ramp(step, warmup) if step < warmup else 1.0 + (final - 1.0) * done
    return factor


def cosine(total: int, warmup: int = 0, final: float = 0.0) -> Schedule:
    """From 1 down to `final` along half a cosine over `total` steps, after a linear ramp over the first `warmup`.

    Examples
    --------
    >>> factor = cosine(total=100)
    >>> [round(factor(step), 2) for step in (0, 50, 100)]
    [1.0, 0.5, 0.0]
    """
    _check("cosine", total, warmup, final)

    def factor(step: int) -> float:
        done = min(max(step - warmup, 0) / (total - warmup), 1.0)
        return _ramp(step, warmup) if step < warmup else final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))
    return factor


def step_decay(every: int, factor: float = 0.1) -> Schedule:
    """Multiplied by `factor` after every `every` steps."""
    if every < 1:
        raise ConfigError(f"step_decay: every must be >= 1, got {every}")
    check_range("step_decay: factor", factor, 0.0)
    return lambda step: factor ** (step // every)


class Scheduler:
    """Writes ``lr = base lr x schedule(step)`` into every group of an optimizer.

    Parameters
    ----------
    optimizer : Optimizer
        The learning rates it has now are the base rates.
    schedule : callable
        Step number (from 0) to factor, such as ``cosine(total=1000, warmup=100)``.

    Examples
    --------
    >>> import minilora
    >>> w = minilora.Parameter(minilora.backend.asarray([4.0]))
    >>> optimizer = minilora.optim.SGD([w], lr=1.0)
    >>> scheduler = minilora.optim.Scheduler(optimizer, minilora.optim.step_decay(every=2, factor=0.5))
    >>> for _ in range(4):
    ...     print(optimizer.groups[0].settings["lr"])
    ...     scheduler.step()
    1.0
    1.0
    0.5
    0.5
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule) -> None:
        self.optimizer = optimizer
        self.schedule = schedule
        self.base = [group.settings["lr"] for group in optimizer.groups]
        self.count = 0
        self._write(0)

    def step(self) -> None:
        """Move on to the next step's rate: call it after each `Optimizer.step`."""
        self._write(self.count + 1)
        replay.repeat(lambda: self._write(self.count + 1), self._picture)

    def _picture(self) -> Callable[[], None]:
        """What puts back the count and the rates of now."""
        count, rates = self.count, [group.settings["lr"] for group in self.optimizer.groups]

        def put() -> None:
            self.count = count
            for group, rate in zip(self.optimizer.groups, rates):
                group.settings["lr"] = rate
        return put

    def _write(self, count: int) -> None:
        factor = check_range(f"schedule({count})", self.schedule(count), 0.0)
        self.count = count
        for group, base in zip(self.optimizer.groups, self.base):
            group.settings["lr"] = base * factor

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "base": list(self.base)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        fits = isinstance(state, dict) and set(state) == {"count", "base"} and type(state["count"]) is int
        if not fits or not isinstance(state["base"], list) or len(state["base"]) != len(self.base) or state["count"] < 0:
            raise StateDictError(f"Scheduler: expected {{'count': int, 'base': list of {len(self.base)} rates}}, got {state}")
        base = [check_range("base", rate, 0.0) for rate in state["base"]]
        self.base = base
        self._write(state["count"])
