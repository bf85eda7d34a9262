"""How a run stands: what it trains, how far it is, and the gradient of a batch. How one update is made is in `run`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy

from .. import ops, parallel
from ..errors import ConfigError, StateError
from ..half import mixed
from ..nn.module import Module
from ..nn.state import as_host
from ..optim.optimizer import Optimizer
from ..tensor import Tensor
from .batch import Batch, Data
from .distributed.comm import Comm
from .distributed.modules import KeptAlike
from .last_good import LastGood
from .made import made_optimizer, made_scaling, made_scheduler
from .result import Evaluation
from .settings import Settings
from .update import Update

__all__ = ["LossFunction", "Standing"]

LossFunction = Callable[[Module, Mapping[str, Any]], Tensor]
Array = Any

NO_CLIPPING = 1e30  # a norm that no gradients have: they are multiplied by 1, and not changed


class Standing:
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
                 optimizer: Callable[[list[Any]], Optimizer] | None = None) -> None:
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


def wide(dtype: Any) -> Any:
    """float32 for float16, in which a sum over a thousand targets overflows."""
    return numpy.promote_types(dtype, "float32")
