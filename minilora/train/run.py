"""A run on its way: what it trains, how far it is, and how one update is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .. import optim, parallel
from ..lora.adapters.learning_rates import lora_plus_groups
from ..nn.module import Module
from ..optim.optimizer import Optimizer
from ..tensor import Tensor
from .batch import Data
from .distributed.comm import Comm
from .distributed.gradients import mean_over_all
from .distributed.masks import Masks
from .result import Evaluation
from .settings import Settings

__all__ = ["Run", "Update", "loss_of_model"]

LossFunction = Callable[[Module, Mapping[str, Any]], Tensor]


class Update(NamedTuple):
    """One update, in plain numbers.

    Attributes
    ----------
    loss : float
        The mean over the targets of all its batches, in all processes.
    targets : int
        How many targets these are.
    tokens : int
    norm : float
        Of the gradients, before they were clipped.
    rate : float
        The learning rate it was made with, of the first group.
    """

    loss: float
    targets: int
    tokens: int
    norm: float
    rate: float


def loss_of_model(model: Module, inputs: Mapping[str, Any]) -> Tensor:
    """The loss that models with a head compute themselves when they are given labels."""
    return model(**inputs)  # type: ignore[no-any-return]


class Run:
    """All that a run is.

    Attributes
    ----------
    model, data, settings, loss, comm
        As given to `fit`.
    optimizer, scheduler
    step : int
        Updates made so far.
    total : int
        Updates of the whole run.
    losses : list of (int, float)
    evaluations : list of Evaluation
    best : Evaluation, optional
    """

    def __init__(self, model: Module, data: Data, settings: Settings, loss: LossFunction, comm: Comm,
                 optimizer: Callable[[list[Any]], Optimizer] | None = None) -> None:
        self.model, self.data, self.settings, self.loss, self.comm = model, data, settings, loss, comm
        self.optimizer = made_optimizer(model, settings) if optimizer is None else optimizer(list(model.named_parameters()))
        self.threads = settings.threads or min(comm.cores, parallel.advised_threads(model.parameters()))
        self.masks = Masks(model, comm)
        self._epoch: tuple[int, Sequence[Sequence[int]]] = 0, data.order(settings.seed, 0, settings.batch_size)
        self.total = settings.steps or max(1, round((settings.epochs or 1) * len(self._epoch[1]) / settings.accumulation))
        self.scheduler = optim.Scheduler(self.optimizer, made_schedule(settings, self.total))
        self.step = 0
        self.losses: list[tuple[int, float]] = []
        self.evaluations: list[Evaluation] = []
        self.best: Evaluation | None = None

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch."""
        return len(self._epoch[1])

    def rows(self, number: int) -> Sequence[int]:
        """The rows of a batch, counted from the beginning of the run: a pure function of the seed and the number."""
        epoch, place = divmod(number, self.per_epoch)
        if epoch != self._epoch[0]:
            self._epoch = epoch, self.data.order(self.settings.seed, epoch, self.settings.batch_size)
        return self._epoch[1][place]

    def update(self) -> Update:
        """Make one update: the gradient of the mean loss over all targets of its batches, and a step of the optimizer."""
        settings, first = self.settings, self.step * self.settings.accumulation
        self.optimizer.zero_grad()
        total, count, tokens = 0.0, 0, 0
        for number in range(first, first + settings.accumulation):
            batch = self.data.batch(self.rows(number)[self.comm.rank::self.comm.size])
            if batch.targets:
                total += self._backward(batch.inputs, batch.targets)
            count, tokens = count + batch.targets, tokens + batch.tokens
        loss, count, tokens, _ = mean_over_all(self.optimizer, self.comm, total, count, tokens)
        self.masks.level()
        norm = float(self.optimizer.clip_grad_norm(settings.max_grad_norm or float("1e30")))
        rate = float(self.optimizer.groups[0].settings["lr"])
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        return Update(loss, count, tokens, norm, rate)

    def _backward(self, inputs: Mapping[str, Any], count: int) -> float:
        """Add the gradient of the loss summed over a batch's targets; give that sum."""
        def summed(part: Mapping[str, Any]) -> Tensor:
            return self.loss(self.model, part) * float(count)

        with self.masks.drawing():
            return float(parallel.backward(summed, inputs, self.threads, self.data.targets).item())


def made_optimizer(model: Module, settings: Settings) -> Optimizer:
    """AdamW over what is trained, with LoRA+'s two rates if they are asked for."""
    params: Any = list(model.named_parameters())
    if settings.loraplus_ratio is not None:
        params = lora_plus_groups(model, settings.learning_rate, settings.loraplus_ratio)
    return optim.AdamW(params, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def made_schedule(settings: Settings, total: int) -> Callable[[int], float]:
    """The factor of the learning rate at each step."""
    warmup = int(settings.warmup) if settings.warmup >= 1 else round(settings.warmup * total)
    if settings.schedule == "constant":
        return optim.constant(warmup)
    return (optim.cosine if settings.schedule == "cosine" else optim.linear)(max(total, warmup + 1), warmup)
