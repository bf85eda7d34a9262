"""How large a step is beside the weights: about a thousandth, as a rule of thumb.

The ratio |dW| / |W| of a step does not depend on the scale of a layer. Far above 1e-3 a step throws away what is there, far
below it nothing happens in the steps of a usual run. Of an adapter what counts is the update D = s B A beside the frozen
weight W; B starts at 0, so that a ratio for B alone means nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy

from ...lora.adapters.inventory import pattern_of
from ...lora.algebra.factors import LowRank
from ...lora.layers.base import AdaptedLayer
from ...lora.gradient import delta
from ...lora.merging.arithmetic import Update
from ...tables import table
from ...nn.module import Module
from ...stored import dense
from ... import backend
from ...shown import shown
from ..batch import Data
from ..run import LossFunction, loss_of_model
from ..settings import Settings
from .course import Course, norm_of
from .finding import LOOK, OK, SKIPPED, Finding, spread
from .picked import pick
from .rehearsal import rehearsed

__all__ = ["Ratio", "Ratios", "ratios_of", "update_ratios"]

RULE = 1e-3
OFF = 100.0
STEPS = 3
SHOWN = 24


class Ratio(NamedTuple):
    """One weight.

    Attributes
    ----------
    path : str
    what : str
        "W" for a weight that is trained itself, "A", "B" or another name for a part of an adapter, "D" for the update of a
        layer beside its frozen weight.
    weight : float
        The norm of the weight.
    step : float
        That of what a step adds, a mean over the steps in which it moved.
    """

    path: str
    what: str
    weight: float
    step: float

    @property
    def ratio(self) -> float | None:
        """None for what starts at 0."""
        return self.step / self.weight if self.weight else None

    @property
    def off(self) -> str:
        """Whether it is a hundred times off the rule; of A and B, which no rule is for, never."""
        if self.ratio is None or self.what not in ("W", "D") or RULE / OFF <= self.ratio <= RULE * OFF:
            return ""
        return "large" if self.ratio > RULE else "small"


@shown
@dataclasses.dataclass(frozen=True)
class Ratios(Finding):
    """What `update_ratios` found.

    Attributes
    ----------
    rows : tuple of Ratio
    """

    rows: tuple[Ratio, ...] = ()

    def lines(self) -> list[str]:
        groups: dict[tuple[str, str, str], list[Ratio]] = {}
        for row in self.rows:
            groups.setdefault((pattern_of(row.path), row.what, row.off), []).append(row)
        cells = [("weight", "of", "n", "|W|", "step / |W|", "")]
        for (path, what, off), rows in sorted(groups.items(), key=lambda each: not each[0][-1])[:SHOWN]:
            found = [row.ratio for row in rows if row.ratio is not None]
            path = rows[0].path if len(rows) == 1 else path
            cells.append((path if len(path) <= 32 else f"...{path[-29:]}", what, str(len(rows)),
                          spread(row.weight for row in rows), spread(found) if found else "starts at 0", off))
        return table(cells, left=(0, 1, 5)) if self.rows else []


def update_ratios(model: Module, data: Data, settings: Settings | None = None, *, loss: LossFunction = loss_of_model,
                  optimizer: Any = None, steps: int = STEPS) -> Ratios:
    """Make a few steps at the learning rate of the settings, measure them beside the weights, and forget them.

    Parameters
    ----------
    model, data, settings, loss
        As of `fit`. The rate is that behind the warm-up.
    optimizer : callable or Optimizer, optional
        As of `fit`; or one that is there already, of which a copy makes the steps.
    steps : int

    Returns
    -------
    Ratios
        "look" where a weight, or the update of an adapted layer, is a hundred times off 1e-3. Vectors are left out: the rule is
        one for matrices. The model is as it was before, to the bit.

    Raises
    ------
    ConfigError
        If there is no target in the data.

    Examples
    --------
    >>> import numpy, minilora
    >>> from minilora.train.data import Arrays
    >>> data = Arrays(x=numpy.eye(8, dtype="float32"), y=numpy.arange(8) % 2)
    >>> model = minilora.nn.Sequential(minilora.nn.Linear(8, 2, rng=0))
    >>> report = minilora.lora.inject(model, minilora.lora.Config(r=2, target_modules=["0"]), rng=0)
    >>> found = update_ratios(model, data, loss=lambda model, inputs:
    ...     minilora.ops.cross_entropy(model(minilora.tensor(inputs["x"])), inputs["y"]))
    >>> [(row.path, row.what) for row in found.rows]
    [('0.lora_A', 'A'), ('0.lora_B', 'B'), ('0', 'D')]
    """
    settings = settings or Settings()
    picked = pick(data, settings, 1)
    return ratios_of(rehearsed(lambda: measured(model, picked, settings, loss, optimizer, steps), model, loss, optimizer))


def measured(model: Module, picked: Any, settings: Settings, loss: LossFunction, optimizer: Any, steps: int) -> Course:
    return Course(model).make(picked, settings, loss, optimizer, steps)


def ratios_of(course: Course) -> Ratios:
    """The finding, from steps that were made."""
    own = {id(p): (path, part, layer) for path, layer in course.layers_now.items()
           for adapter in layer.adapters.values() for part, p in adapter.own_parameters()}
    rows: list[Ratio] = []
    for path, p in course.trained:
        went = [step for step in course.moves[path] if step]
        if p.ndim < 2 or not went:
            continue
        layer, part, _ = own.get(id(p), ("", "", None))
        what = part.removeprefix("lora_") if part else "W"
        rows.append(Ratio(f"{layer}.{part}" if part else path, what, course.sizes[path], sum(went) / len(went)))
    if course.steps:
        rows += [Ratio(path, "D", norm_of(layer.weight.data), distance(layer, before, after) / course.steps)
                 for path, (layer, before, after) in course.layers.items()]
    counted = [row for row in rows if row.what in ("W", "D") and row.ratio is not None]
    off = [row for row in counted if row.off]
    words = []
    for size, line in (("large", "a smaller learning_rate, or more warm-up: such steps undo what was learned before"),
                       ("small", "a larger learning_rate: in a usual run nothing will happen")):
        found = [row for row in off if row.off == size]
        if found:
            names = list(dict.fromkeys(pattern_of(row.path) for row in found))
            words.append(f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''}: {OFF:g} times or more too {size}: "
                         f"{line}")
    outcome = LOOK if words else OK if counted else SKIPPED
    came = spread(row.ratio for row in counted if row.ratio is not None)
    return Ratios("update / weight", outcome, f"about {RULE:g} a step", came, tuple(words), tuple(rows))


def distance(layer: AdaptedLayer, before: Update, after: Update) -> float:
    """The norm of what the steps have added to D; of plain updates from their factors, without forming D."""
    if before.kappa is None and after.kappa is None:
        return LowRank(numpy.concatenate([after.A, before.A]),
                       numpy.concatenate([after.B * after.s, before.B * -before.s], axis=1)).norm()
    W = layer.matrix(backend.to_host(dense(layer.weight.data))).astype("float64")
    formed = [delta(one.A, one.B, one.s) + (0.0 if one.kappa is None else (one.kappa - 1.0) * W) for one in (before, after)]
    return norm_of(formed[1] - formed[0])
