"""All sanity checks, as one table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ...errors import ConfigError
from ...tables import table
from ...nn.module import Module
from ...shown import shown
from ..batch import Data
from ..run import LossFunction, loss_of_model
from ..settings import Settings
from .chance import loss_at_chance
from .course import Course
from .few_rows import overfit
from .finding import FAILED, Finding
from .moves import STEPS, moved
from .picked import pick
from .ratios import ratios_of
from .rehearsal import rehearsed

__all__ = ["Report", "check"]

NARROW = 26  # characters of a cell


@shown
@dataclasses.dataclass(frozen=True)
class Report:
    """What all checks found. True if none failed; printed as a table, with what is to be said below it.

    Attributes
    ----------
    findings : tuple of Finding
        A row each.
    """

    findings: tuple[Finding, ...]

    def __bool__(self) -> bool:
        return all(self.findings)

    def __getitem__(self, check: str) -> Finding:
        """The finding of the check of this name, or the first whose name holds it.

        Raises
        ------
        KeyError
            If there is none.
        """
        for one in self.findings:
            if check in one.check:
                return one
        raise KeyError(f"no check {check!r}: there are {', '.join(one.check for one in self.findings)}")

    def __str__(self) -> str:
        cells = [("check", "expected", "came", "")]
        cells += [(one.check, short(one.expected), short(one.came), one.outcome) for one in self.findings]
        lines = table(cells, left=range(4))
        for one in self.findings:
            if one.words:
                lines += ["", f"{one.check}:", *one.told()]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"passed": bool(self), "findings": [one.as_dict() for one in self.findings]}


def short(text: str) -> str:
    return text if len(text) <= NARROW else f"{text[:NARROW - 3]}..."


def check(model: Module, data: Data, settings: Settings | None = None, *, loss: LossFunction = loss_of_model,
          optimizer: Any = None, fresh: bool | None = None, rows: int = 8, steps: int = 100) -> Report:
    """Is this training able to learn? All sanity checks, before it begins.

    Parameters
    ----------
    model, data, settings, loss
        As of `fit`: what is about to be trained, and how.
    optimizer : callable or Optimizer, optional
        As of `fit`; or one that is there already.
    fresh : bool, optional
        True: nothing in the model was trained before; see `loss_at_chance`.
    rows, steps : int
        Of `overfit`.

    Returns
    -------
    Report
        One that fails does not keep the others from being made. The model, the optimizer, all counters and all generators are
        as they were before, to the bit; so they are after Ctrl-C.

    Examples
    --------
    >>> import numpy, minilora
    >>> from minilora.train.data import Arrays
    >>> x = numpy.random.default_rng(0).standard_normal((64, 5)).astype("float32")
    >>> data = Arrays(x=x, y=(x @ numpy.arange(-2.0, 3.0, dtype="float32"))[:, None])
    >>> model = minilora.nn.Sequential(minilora.nn.Linear(5, 16, rng=0), minilora.nn.GELU(), minilora.nn.Linear(16, 1, rng=1))
    >>> report = check(model, data, minilora.train.Settings(learning_rate=0.01), fresh=True, loss=lambda model, inputs:
    ...     minilora.ops.mse(model(minilora.tensor(inputs["x"])), inputs["y"]))
    >>> bool(report), [one.check for one in report.findings]
    (True, ['loss at chance', '8 rows overfitted', 'update / weight', 'what moves'])
    """
    settings = settings or Settings()
    try:
        picked = pick(data, settings, 4)
    except ConfigError as error:
        return Report((Finding("data", FAILED, "rows with targets", "none", (str(error),)),))
    course: list[Course] = []

    def steps_made() -> Course:
        if not course:
            course.append(rehearsed(lambda: Course(model).make(picked, settings, loss, optimizer, STEPS), model, loss,
                                    optimizer))
        return course[0]

    made: dict[str, Callable[[], Finding]] = {
        "loss at chance": lambda: loss_at_chance(model, picked, settings, loss=loss, fresh=fresh),
        "rows overfitted": lambda: overfit(model, picked, settings, loss=loss, optimizer=optimizer, rows=rows, steps=steps),
        "update / weight": lambda: ratios_of(steps_made()),
        "what moves": lambda: moved(steps_made()),
    }
    return Report(tuple(attempted(name, one) for name, one in made.items()))


def attempted(name: str, made: Callable[[], Finding]) -> Finding:
    """A finding; where there is an error in its place, one that says so."""
    try:
        return made()
    except Exception as error:
        return Finding(name, FAILED, "", "an error", (f"{type(error).__name__}: {error}",))
