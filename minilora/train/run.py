"""A run on its way: what it trains, how far it is, and how one update is made."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy

from .. import backend, ops, parallel
from ..errors import ConfigError, StateError
from ..half import mixed
from ..nn.module import Module
from ..nn.state import as_host
from ..optim.optimizer import Optimizer
from ..tensor import Tensor
from .batch import Batch, Data
from .divergence import diverged
from .distributed.comm import Comm
from .distributed.gradients import mean_over_all
from .distributed.modules import KeptAlike
from .last_good import LastGood
from .made import made_optimizer, made_scaling, made_scheduler
from .recorded import made_recorded
from .result import Evaluation
from .settings import Settings
from .update import Update

__all__ = ["LossFunction", "Run", "Update", "loss_of_model"]

LossFunction = Callable[[Module, Mapping[str, Any]], Tensor]
Array = Any

NO_CLIPPING = 1e30  # a norm that no gradients have: they are multiplied by 1, and not changed


def loss_of_model(model: Module, inputs: Mapping[str, Any]) -> Tensor:
    """The loss that models with a head compute themselves when they are given labels."""
    return model(**inputs)  # type: ignore[no-any-return]


class Run:
    """All that a run is. What changes in it, and no seed gives, is here as plain values: a checkpoint holds these.

    Attributes
    ----------
    model, data, settings, loss, comm
        As given to `fit`.
    optimizer, scheduler
    scaling : LossScale, optional
        In mixed precision.
    total : int
        Updates of the whole run.
    per_epoch : int
        Batches of an epoch.
    step : int
        Updates made so far.
    tokens : int
        Read so far.
    since : dict of str to float
        The summed loss, and the targets, since the last report: "loss", "targets".
    losses : list of (int, float)
        Step and loss of each report.
    evaluations : list of Evaluation
    best : Evaluation, optional
        The one with the lowest loss.
    recorded : RecordedUpdate, optional
        What repeats updates without Python, where that was asked for on a GPU.
    best_weights : dict of str to numpy.ndarray, optional
        What is trained, as it was then, on the host.
    worse : int
        Evaluations since the best one.
    asked : bool
        Somebody asked this process to end after this update.
    stop : bool
        So did somebody ask one of them, and all know.
    last : Update, optional
        The one before, of this process's life.
    seconds : float
        Spent in updates, of this process's life.
    status : str
        "running"; in the end "done", "stopped", or "diverged: ..." or "failed: ..." with the reason.
    notes : list of str
        What deserves a look.
    folder : Path, optional
        Where it is written.
    valid : Data, optional
        What it is evaluated on.

    Raises
    ------
    ConfigError
        If nothing is trained, or there is nothing to learn from.
    """

    def __init__(self, model: Module, data: Data, settings: Settings, loss: LossFunction, comm: Comm,
                 optimizer: Callable[[list[Any]], Optimizer] | None = None, recorded: bool = False) -> None:
        self.model, self.data, self.settings, self.loss, self.comm = model, data, settings, loss, comm
        self.optimizer = made_optimizer(model, settings, optimizer)
        self.threads = settings.threads or min(comm.cores, parallel.advised_threads(model.parameters()))
        self.alike = KeptAlike(model, comm)
        self._epoch: tuple[int, Sequence[Sequence[int]]] = 0, data.order(settings.seed, 0, settings.batch_size)
        self.per_epoch = len(self._epoch[1])
        if not self.per_epoch:
            raise ConfigError(f"the training data make no batch: {len(data)} rows in batches of {settings.batch_size}. Is the "
                              "file empty, or every row left out?")
        self.total = settings.steps or max(1, round((settings.epochs or 1) * self.per_epoch / settings.accumulation))
        self.scheduler = made_scheduler(self.optimizer, settings, self.total)
        self.scaling = made_scaling(self.optimizer, settings)
        self.last_good = LastGood(model, self.optimizer)
        self.recorded = made_recorded(self) if recorded else None
        self.step, self.tokens, self.worse, self.asked, self.stop = 0, 0, 0, False, False
        self.since: dict[str, float] = {"loss": 0.0, "targets": 0}
        self.losses: list[tuple[int, float]] = []
        self.evaluations: list[Evaluation] = []
        self.best: Evaluation | None = None
        self.best_weights: dict[str, numpy.ndarray] | None = None
        self.last: Update | None = None
        self.seconds = 0.0
        self.status = "running"
        self.notes: list[str] = []
        self.folder: Path | None = None
        self.valid: Data | None = None

    @property
    def over(self) -> bool:
        """Whether no update is to follow: all are made, the patience is at its end, or somebody asked."""
        asked = self.stop or (self.asked and self.comm.size == 1)  # of several none leaves before the others know
        return self.complete or asked

    @property
    def complete(self) -> bool:
        """Whether all updates are made, or the patience is at its end."""
        patience = self.settings.patience
        return self.step >= self.total or (patience is not None and self.worse >= patience)

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return self.status == "done"

    def weights(self) -> dict[str, numpy.ndarray]:
        """Copies on the host of what is trained, and of the arrays that modules keep beside: running means, say."""
        kept = {path: p.data for path, p in self.model.named_parameters() if p.trainable}
        kept.update({path: value for path, value in self.model.named_state() if getattr(value, "shape", ())})
        return {path: as_host(value) for path, value in kept.items()}

    def due(self, every: int | None) -> bool:
        """Whether what is done every so many steps is to be done after this one: without a number, at the end of an epoch.

        After the last step all is due.
        """
        if self.step >= self.total:
            return True
        if every is not None:
            return self.step % every == 0
        now = self.step * self.settings.accumulation
        return now // self.per_epoch > (now - self.settings.accumulation) // self.per_epoch

    def rows(self, number: int) -> Sequence[int]:
        """The rows of a batch, counted from the beginning of the run: a pure function of the seed and the number."""
        epoch, place = divmod(number, self.per_epoch)
        if epoch != self._epoch[0]:
            self._epoch = epoch, self.data.order(self.settings.seed, epoch, self.settings.batch_size)
            if len(self._epoch[1]) != self.per_epoch:
                raise StateError(f"data.order gave {self.per_epoch} batches for epoch 0 and {len(self._epoch[1])} for epoch "
                                 f"{epoch}: every epoch must have as many")
        return self._epoch[1][place]

    def batch(self, number: int) -> Batch:
        """This process's share of a batch."""
        return self.data.batch(self.rows(number)[self.comm.rank::self.comm.size])

    @property
    def window(self) -> range:
        """The numbers of the batches of the next update."""
        first = self.step * self.settings.accumulation
        return range(first, first + self.settings.accumulation)

    def update(self) -> Update:
        """Make one update: the gradient of the mean loss over all targets of its batches, and a step of the optimizer.

        Raises
        ------
        DivergedError
            If the loss, a gradient or a weight is not finite; the model is as it was before.
        """
        began = time.perf_counter()
        batches = [self.batch(number) for number in self.window]
        self.last_good.keep()
        rate = float(self.optimizer.groups[0].settings["lr"])
        skipped = 0
        with numpy.errstate(all="ignore"):  # what is not finite is said by the error, once
            while (found := self._attempt(batches, rate)) is None:
                skipped += 1
        total, targets, tokens, stop, norm, scale = found
        self.alike.level()
        self.scheduler.step()
        self.seconds += time.perf_counter() - began
        self.step, self.tokens, self.stop = self.step + 1, self.tokens + tokens, self.stop or stop
        self.last = Update(total, targets, tokens, norm, rate, self._mean(total, targets), scale, skipped)
        return self.last

    def _attempt(self, batches: Sequence[Batch], rate: float) -> tuple[float, int, int, bool, float, float] | None:
        """Compute gradients and make a step. None: they have overflowed, no step was made, and the scale is halved.

        The same batches are computed again then, with the same masks: an overflow costs time, and no rows.
        """
        scaling, xp = self.scaling, self.last_good.xp
        scale = 1.0 if scaling is None else scaling.value
        targets, tokens = (sum(each) for each in zip(*((batch.targets, batch.tokens) for batch in batches)))
        stop = self.asked
        self.optimizer.zero_grad()
        found = self.recorded(batches, scale, scaling is None) if self.recorded and targets else None
        if found is None:
            total = sum((self.backward(batch) for batch in batches if batch.targets), 0.0)
            total, targets, tokens, stop = mean_over_all(self.optimizer, self.comm, total, targets, tokens, stop, scale)
            found = total, self.clipped()
        total, norm, *finite = found
        if scaling is not None:  # a sync point more: whether there is a step has to be known before it
            total, norm = on_host(xp, total, norm)
            if math.isfinite(total) and not math.isfinite(norm) and not scaling.exhausted:
                scaling.overflowed()
                self.last_good.give_back_state()
                return None
            if not math.isfinite(norm):
                raise diverged(self, total, norm, rate)
        if not finite:
            self.optimizer.step()
            finite = [self.last_good.finite()]
        loss, norm, all_finite = on_host(xp, total, norm, *finite)  # otherwise the one sync point of a step
        if not (all_finite and math.isfinite(loss) and math.isfinite(norm)):
            raise diverged(self, loss, norm, rate)
        if scaling is not None:
            scaling.stepped()
        return loss, targets, tokens, stop, norm, scale

    def backward(self, batch: Batch) -> Array:
        """Add the gradient of scale times the loss summed over a batch's targets; give that product, still on the device."""
        factor = float(batch.targets) * (1.0 if self.scaling is None else self.scaling.value)
        with self.alike.drawing():
            return parallel.backward(lambda part: self.summed(part, lambda dtype: factor), dict(batch.inputs), self.threads,
                                     self.data.targets).data

    def summed(self, part: Mapping[str, Any], factor: Callable[[Any], Any]) -> Tensor:
        """The loss of a batch's inputs times a number of the dtype that it has then."""
        with self.precision():
            loss = self.loss(self.model, part)
        loss = ops.cast(loss, wide(loss.dtype))
        scaled: Tensor = loss * factor(loss.dtype)
        return scaled

    def clipped(self) -> Array:
        """Scale the gradients down; their norm before."""
        return self.optimizer.clip_grad_norm(self.settings.max_grad_norm or NO_CLIPPING)

    def precision(self) -> AbstractContextManager[None]:
        """The context in which losses are computed."""
        return nullcontext() if self.scaling is None else mixed()

    def _mean(self, loss: float, targets: int) -> float | None:
        """Count the loss of an update; where a report is due, the mean since the last one."""
        self.since = {"loss": self.since["loss"] + loss * targets, "targets": self.since["targets"] + targets}
        if not (self.due(self.settings.steps_per_report) or self.due(self.settings.steps_per_eval)):
            return None
        mean = self.since["loss"] / self.since["targets"]
        self.losses.append((self.step, mean))
        self.since = {"loss": 0.0, "targets": 0}
        return mean


def wide(dtype: Any) -> Any:
    """float32 for float16, in which a sum over a thousand targets overflows."""
    return numpy.promote_types(dtype, "float32")


def on_host(xp: Any, *numbers: Any) -> list[float]:
    """Numbers, and arrays () of one device, as Python's floats: one copy, hence one sync point."""
    array = xp.stack([xp.asarray(number, dtype="float64") for number in numbers])
    return backend.to_host(array).tolist()  # type: ignore[no-any-return]
