"""A few rows, learned by heart: what a model that can learn at all must be able to do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from ...errors import ConfigError, DivergedError
from ...flags import option
from ...nn.layers import Dropout
from ...nn.module import Module
from ...optim.optimizer import Optimizer
from ...settings import number, whole
from ...shown import shown
from ..batch import Data
from ..distributed.comm import Serial
from ..evaluation import evaluate
from ..made import made_optimizer
from ..run import LossFunction, Run, loss_of_model
from ..settings import Settings
from .finding import FAILED, LOOK, OK, Finding
from .floor import Floor, floor_of
from .passes import watched
from .picked import Picked, pick
from .rehearsal import again, rehearsed

__all__ = ["Overfit", "overfit", "run_of"]

STILL = 1e-6  # a loss that has changed by less, beside its size, stands still
MOST = 20_000_000  # numbers of a model that is tried with all of them trained

Made = Callable[[list[Any]], Optimizer]


@shown
@dataclasses.dataclass(frozen=True)
class Overfit(Finding):
    """What `overfit` found.

    Attributes
    ----------
    losses : tuple of float
        The loss before each step, and the last one: the curve.
    goal : float
        What it had to come below.
    floor : float
        What no model can come below: equal inputs with different answers.
    rate : float
        The factor of the learning rate with which it was reached; of no meaning if it was not.
    """

    losses: tuple[float, ...] = ()
    goal: float = 0.0
    floor: float = 0.0
    rate: float = 1.0

    def lines(self) -> list[str]:
        n = len(self.losses)
        shown = sorted({*range(0, n, max(1, -(-n // 7))), n - 1}) if n else []
        return ["step  " + "  ".join(f"{i:>7,}" for i in shown),
                "loss  " + "  ".join(f"{self.losses[i]:>7.3g}" for i in shown)] if shown else []


def overfit(model: Module, data: Data, settings: Settings | None = None, *, loss: LossFunction = loss_of_model,
            optimizer: Any = None, rows: int = 8, steps: int = 100, share: float = 0.1, below: float | None = None) -> Overfit:
    """Train on a few rows until their loss is nearly 0, and then forget it.

    Where the loss does not come down, other learning rates are tried, and then all weights together, to tell what is the
    matter. Of the loss that rows can lose only a part counts: of equal inputs with different answers a rest stays, the floor.

    Parameters
    ----------
    model : Module
    data : Data
    settings : Settings, optional
        Those of the training that is to come; without decay, schedule and warm-up.
    loss : callable
    optimizer : callable or Optimizer, optional
        As of `fit`; or one that is there already, of which a copy makes the steps.
    rows : int
        Of the first batch.
    steps : int
        No more than these for each learning rate.
    share : float
        Of the loss at the start, that may be left above the floor.
    below : float, optional
        Or so much, where that is more.

    Returns
    -------
    Overfit
        Model, optimizer, counters and generators are as they were before, to the bit; so they are after Ctrl-C.

    Raises
    ------
    ConfigError
        If nothing is trained, there is no target, or an argument is out of range.

    Examples
    --------
    >>> import numpy, minilora
    >>> from minilora.train.data import Arrays
    >>> data = Arrays(x=numpy.eye(8, dtype="float32"), y=numpy.arange(8) % 2)
    >>> model = minilora.nn.Linear(8, 2, rng=0)
    >>> found = overfit(model, data, minilora.train.Settings(learning_rate=0.1), loss=lambda model, inputs:
    ...     minilora.ops.cross_entropy(model(minilora.tensor(inputs["x"])), inputs["y"]))
    >>> bool(found), found.losses[-1] < 0.1 * found.losses[0]
    (True, True)
    """
    rows, steps = whole("rows", rows), whole("steps", steps)
    share, below = number("share", share, 0.0, 1.0), None if below is None else number("below", below, 0.0)
    settings = settings or Settings()
    few = pick(data, settings, 1).few(rows)
    trial = Trial(model, few, settings, loss, optimizer, steps, share, below)
    tried: list[tuple[float, tuple[float, ...]]] = []
    factor: float | None = 1.0
    while factor is not None:
        losses = rehearsed(lambda factor=factor: trial.run(factor), model, loss, optimizer)  # type: ignore[misc]
        tried.append((factor, losses))
        factor = None if trial.reached(losses) else next_factor(tried)
    return said(trial, tried)


class Trial:
    """A training on a few rows, to be made several times from the same start."""

    def __init__(self, model: Module, few: Picked, settings: Settings, loss: LossFunction, optimizer: Any, steps: int,
                 share: float, below: float | None) -> None:
        self.model, self.few, self.settings, self.loss, self.optimizer = model, few, settings, loss, optimizer
        self.steps, self.share, self.below = steps, share, below
        self.floor = Floor()
        self.goal = -math.inf
        self.trained = self.total = 0
        self.dropped_out = False  # whether the goal is reached without dropout only

    @property
    def rows(self) -> int:
        return self.few.counts[0]

    def run(self, factor: float, everything: bool = False) -> tuple[float, ...]:
        """The losses of one training."""
        if everything:
            self.model.requires_grad()
        run = run_of(self.model, self.few, self.settings, self.loss, self.optimizer if not everything else None, self.steps,
                     factor)
        self.model.train()
        self.trained = sum(group.data.size for group in run.optimizer.groups)
        self.total = sum(p.size for p in self.model.parameters())
        losses: list[float] = []
        try:
            for step in range(self.steps):
                if step == 0:
                    with watched() as look:
                        losses.append(run.update().loss)
                    decoder = hasattr(type(self.model), "lm_head") and self.loss is loss_of_model
                    self.floor = floor_of(self.few.batches[0].inputs, look, decoder)
                    self.goal = max(self.floor.loss + self.share * max(losses[0] - self.floor.loss, 0.0), self.below or 0.0)
                else:
                    losses.append(run.update().loss)
                if losses[-1] <= self.goal:
                    return tuple(losses)
            losses.append(self.now())
        except DivergedError:
            losses.append(math.inf)
        return tuple(losses)

    def now(self) -> float:
        """The loss of the rows, without dropout."""
        return evaluate(self.model, self.few, loss=self.loss, threads=1).loss

    def reached(self, losses: tuple[float, ...]) -> bool:
        return losses[-1] <= self.goal


def run_of(model: Module, picked: Picked, settings: Settings, loss: LossFunction, optimizer: Any, steps: int,
           factor: float = 1.0) -> Run:
    """A run over some batches with a constant rate; within a rehearsal.

    Parameters
    ----------
    optimizer : callable or Optimizer, optional
    factor : float
        Of the learning rate.
    """
    settings = dataclasses.replace(settings, steps=steps, epochs=None, accumulation=1, schedule="constant", warmup=0.0,
                                   threads=1, steps_per_report=steps, steps_per_eval=steps, weight_decay=0.0)
    made_by: Made | None = None if optimizer is None else lambda named: (
        again(optimizer) if isinstance(optimizer, Optimizer) else optimizer(named))

    def made(named: list[Any]) -> Optimizer:
        one = made_optimizer(model, settings, made_by)
        for group in one.groups:
            group.settings["lr"] *= factor
        return one

    if made_by is not None and settings.loraplus_ratio is not None:
        raise ConfigError("loraplus_ratio is a setting of AdamW, and an optimizer of your own was given: leave it out")
    return Run(model, picked, dataclasses.replace(settings, loraplus_ratio=None), loss, Serial(), made)


def next_factor(tried: list[tuple[float, tuple[float, ...]]]) -> float | None:
    """The next factor of the learning rate to try: larger while that helps, once smaller where even the given one does harm."""
    factor, losses = tried[-1]
    if stands_still(losses) or factor < 1.0:
        return None
    if len(tried) > 1 and not losses[-1] < tried[-2][1][-1] or factor >= 100.0:
        return 0.1 if tried[0][1][-1] > tried[0][1][0] else None
    return 0.1 if math.isinf(losses[-1]) else 10.0 * factor


def stands_still(losses: tuple[float, ...]) -> bool:
    """Whether a training has changed nothing at all."""
    return max(losses) - min(losses) <= STILL * abs(losses[0])


def still_falling(losses: tuple[float, ...], floor: float) -> bool:
    """Whether a training is more than halfway down, and its last quarter was still worth something."""
    late = losses[len(losses) * 3 // 4]
    return losses[-1] - floor < 0.5 * (losses[0] - floor) and losses[-1] - floor < 0.9 * (late - floor)


def said(trial: Trial, tried: list[tuple[float, tuple[float, ...]]]) -> Overfit:
    """The outcome of all trainings, in words."""
    (factor, losses), settings = tried[-1], trial.settings
    words: list[str] = []
    outcome = OK
    floor = trial.floor
    if floor.rows and not floor.tokens:
        one, other = floor.rows[0]
        outcome = LOOK
        words.append(f"Rows {one} and {other} of the batch are equal and have different answers"
                     + (f", as have {len(floor.rows) - 1} more pairs" if len(floor.rows) > 1 else "")
                     + f": no model can come below {floor.loss:.3g}. Look at the labels.")
    if not trial.reached(losses):
        factor, losses = min(tried, key=lambda each: each[1][-1])
        falling = still_falling(losses, floor.loss)
        outcome = LOOK if falling else FAILED
        words += [f"Still falling after {trial.steps} steps{'' if factor == 1.0 else f', at {factor:g} times the given rate'}: "
                  f"give it more, steps={4 * trial.steps}"] if falling else why_not(trial, tried)
    elif factor != 1.0:
        outcome = LOOK
        rate = settings.learning_rate * factor
        words.append(f"Not within {trial.steps} steps at the learning rate that was given, but at {factor:g} times it"
                     + ("" if trial.optimizer is not None else ": "
                        + option(f"learning_rate={rate:g}", f"--learning-rate {rate:g}"))
                     + (". A longer run may do without." if factor > 1 else ": it was too high."))
    came = f"{losses[-1]:.3g} in {len(losses) - 1} steps"
    name = "1 row overfitted" if trial.rows == 1 else f"{trial.rows} rows overfitted"
    return Overfit(name, outcome, f"below {trial.goal:.3g}", came, tuple(words), losses, trial.goal, floor.loss, factor)


def why_not(trial: Trial, tried: list[tuple[float, tuple[float, ...]]]) -> list[str]:
    """Likely causes of rows that could not be learned."""
    first, best = tried[0][1], min(min(losses) for _, losses in tried)
    if stands_still(first):
        return ["The loss does not change at all: nothing trains. See what moves: train.sanity.movement(model, data)."]
    words = []
    if all(math.isinf(losses[-1]) for _, losses in tried):
        words.append("It diverges at every rate that was tried: train.fit names the first array that is not finite.")
    dropping = [module.p for _, module in trial.model.named_modules() if isinstance(module, Dropout) and module.p]
    if dropping:
        words.append(f"Dropout is on (p = {max(dropping):g}): try with 0.")
    if trial.trained < trial.total <= MOST:
        trained, total = trial.trained, trial.total
        factor = min(tried, key=lambda each: each[1][-1])[0]
        everything = rehearsed(lambda: trial.run(factor, True), trial.model, trial.loss, trial.optimizer)
        if trial.reached(everything):
            words.append(f"{trained:,} of {total:,} numbers are trained. With all of them the rows are learned: too few are, "
                         'or the wrong ones. Raise the rank, adapt more layers (target_modules="all-linear"), or train the '
                         "head too (modules_to_save). Is the base pre-trained? Beside weights drawn at random an adapter "
                         "learns little.")
        else:
            words.append("With all weights trained they are not learned either: look at the data, the loss and the rate.")
    if not words or best > 0.5 * first[0]:
        words.append("Do the inputs tell the rows apart, and does the loss depend on the labels of this batch?")
    return words
