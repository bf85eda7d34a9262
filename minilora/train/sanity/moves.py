"""What should move and stands still, and what should stand still and moves."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from ...lora.adapters.inventory import pattern_of
from ...tables import table
from ...nn.module import Module
from ...shown import shown
from ..batch import Data
from ..run import LossFunction, loss_of_model
from ..settings import Settings
from .blame import Blame
from .course import Course
from .finding import FAILED, LOOK, OK, Finding
from .picked import pick
from .rehearsal import rehearsed

__all__ = ["Movement", "Moving", "movement", "moved"]

STEPS = 3  # with B = 0, A has no gradient in the first one and moves in the second
SHOWN = 24


class Moving(NamedTuple):
    """One parameter.

    Attributes
    ----------
    path : str
    trained, held : bool
        Whether it is trainable, and whether the optimizer holds it.
    gradient : float or None
        The largest norm of its gradient; None if none arrived.
    zero : bool
        Whether it is all zero at the start.
    moved : bool
    fault : str
        What is the matter, and the line to type; "" if all is as it should be.
    """

    path: str
    trained: bool
    held: bool
    gradient: float | None
    zero: bool
    moved: bool
    fault: str


@shown
@dataclasses.dataclass(frozen=True)
class Movement(Finding):
    """What `movement` found.

    Attributes
    ----------
    rows : tuple of Moving
        A parameter each.
    """

    rows: tuple[Moving, ...] = ()

    def lines(self) -> list[str]:
        groups: dict[tuple[Any, ...], list[Moving]] = {}
        for row in self.rows:
            key = pattern_of(row.path), row.trained, row.held, row.gradient is None, row.gradient == 0, row.moved, row.fault
            groups.setdefault(key, []).append(row)
        cells = [("parameter", "n", "trained", "held", "gradient", "moved")]
        for (path, *_), rows in sorted(groups.items(), key=lambda each: not each[0][-1])[:SHOWN]:
            row = rows[0]
            path = row.path if len(rows) == 1 else path
            sizes = [each.gradient for each in rows if each.gradient]
            gradient = f"{max(sizes):.2g}" if sizes else "-" if not row.trained else "none" if row.gradient is None else "0"
            cells.append((path if len(path) <= 40 else f"...{path[-37:]}", str(len(rows)), yes(row.trained), yes(row.held),
                          gradient, yes(row.moved)))
        more = len(groups) - SHOWN
        return [*table(cells, left=(0,)), *([f"and {more} more kinds"] if more > 0 else [])]


def yes(answer: bool) -> str:
    return "yes" if answer else "no"


def movement(model: Module, data: Data, settings: Settings | None = None, *, loss: LossFunction = loss_of_model,
             optimizer: Any = None, steps: int = STEPS) -> Movement:
    """Make a few steps, see which parameters move, say why others do not, and forget the steps.

    Parameters
    ----------
    model, data, settings, loss
        As of `fit`.
    optimizer : callable or Optimizer, optional
        As of `fit`; or one that is there already, of which a copy makes the steps.
    steps : int
        At least 2 for adapters: where B = 0, A gets its first gradient in the second.

    Returns
    -------
    Movement
        Printed as a table: what is trainable, held by the optimizer, has a gradient, and has moved. The model is as it was
        before, to the bit.

    Raises
    ------
    ConfigError
        If there is no target in the data.

    Examples
    --------
    >>> import numpy, minilora
    >>> from minilora.train.data import Arrays
    >>> data = Arrays(x=numpy.eye(4, dtype="float32"), y=numpy.arange(4) % 2)
    >>> model = minilora.nn.Sequential(minilora.nn.Linear(4, 3, rng=0), minilora.nn.Linear(3, 2, rng=0))
    >>> loss = lambda model, inputs: minilora.ops.cross_entropy(model[1](model[0](minilora.tensor(inputs["x"])).detach()),
    ...                                                         inputs["y"])
    >>> found = movement(model, data, minilora.train.Settings(batch_size=4), loss=loss)
    >>> bool(found), [row.path for row in found.rows if row.fault]
    (False, ['0.weight', '0.bias'])
    """
    settings = settings or Settings()
    picked = pick(data, settings, 1)
    return moved(rehearsed(lambda: Course(model).make(picked, settings, loss, optimizer, steps), model, loss, optimizer))


def moved(course: Course) -> Movement:
    """The finding, from steps that were made."""
    blame, frozen = Blame(course), set(course.frozen)
    rows = []
    for path, p in course.parameters:
        went = sum(course.moves[path]) > 0 if p.trainable else path in frozen
        gradient = course.gradients.get(path) if p.trainable else None
        rows.append(Moving(path, p.trainable, id(p) in course.rates, gradient, course.sizes.get(path) == 0, went,
                           blame.of(path, p, gradient, went)))
    words = grouped([(row.path, row.fault) for row in rows if row.fault])
    if course.error and not words:  # else it is what comes of these faults
        words = [blame.error()]
    outcome = FAILED if words else OK
    notes = list(blame.notes())
    if notes and outcome == OK:
        outcome = LOOK
    trained, still = sum(row.trained for row in rows), sum(not row.trained for row in rows)
    right = sum(row.moved for row in rows if row.trained), sum(not row.moved for row in rows if not row.trained)
    return Movement("what moves", outcome, f"{trained:,} move, {still:,} stay", f"{right[0]:,} move, {right[1]:,} stay",
                    tuple([*words, *notes]), tuple(rows))


def grouped(faults: list[tuple[str, str]]) -> list[str]:
    """A sentence for each fault, with the parameters that have it; the first few of them."""
    kinds: dict[str, list[str]] = {}
    for path, fault in faults:
        kinds.setdefault(fault, []).append(path)
    return [f"{named(paths)}: {fault}" for fault, paths in kinds.items()]


def named(paths: list[str]) -> str:
    """Up to three paths; of more, those that differ by numbers as one."""
    kinds = paths if len(paths) <= 3 else list(dict.fromkeys(map(pattern_of, paths)))
    more = " and others" if len(kinds) > 3 else ""
    return ", ".join(kinds[:3]) + more + (f" ({len(paths)} parameters)" if len(paths) > 3 else "")
