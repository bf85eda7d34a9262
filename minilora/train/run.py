"""A run on its way: how one update is made."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy

from .. import backend
from ..nn.module import Module
from ..optim.optimizer import Optimizer
from ..tensor import Tensor
from .batch import Batch, Data
from .divergence import diverged
from .distributed.comm import Comm
from .distributed.gradients import mean_over_all
from .recorded import made_recorded
from .settings import Settings
from .standing import LossFunction, Standing
from .update import Update

__all__ = ["LossFunction", "Run", "Update", "loss_of_model"]


def loss_of_model(model: Module, inputs: Mapping[str, Any]) -> Tensor:
    """The loss that models with a head compute themselves when they are given labels."""
    return model(**inputs)  # type: ignore[no-any-return]


class Run(Standing):
    """A run that goes on. With `recorded`, on a GPU, its updates are recorded once for each shape of batches."""

    def __init__(self, model: Module, data: Data, settings: Settings, loss: LossFunction, comm: Comm,
                 optimizer: Callable[[list[Any]], Optimizer] | None = None, recorded: bool = False) -> None:
        super().__init__(model, data, settings, loss, comm, optimizer)
        self.recorded = made_recorded(self) if recorded else None

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

    def _mean(self, loss: float, targets: int) -> float | None:
        """Count the loss of an update; where a report is due, the mean since the last one."""
        self.since = {"loss": self.since["loss"] + loss * targets, "targets": self.since["targets"] + targets}
        if not (self.due(self.settings.steps_per_report) or self.due(self.settings.steps_per_eval)):
            return None
        mean = self.since["loss"] / self.since["targets"]
        self.losses.append((self.step, mean))
        self.since = {"loss": 0.0, "targets": 0}
        return mean


def on_host(xp: Any, *numbers: Any) -> list[float]:
    """Numbers, and arrays () of one device, as Python's floats: one copy, hence one sync point."""
    array = xp.stack([xp.asarray(number, dtype="float64") for number in numbers])
    return backend.to_host(array).tolist()  # type: ignore[no-any-return]
