"""The loss on data that is not trained on; and the weights that had the lowest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy

from .. import backend, ops, parallel
from ..engine import no_grad
from ..errors import ConfigError, DivergedError
from ..nn.mode import in_mode
from ..nn.module import Module
from ..tensor import Tensor
from .batch import Batch, Data
from .beside import Beside
from .distributed.agreement import first_told
from .distributed.comm import Comm, Serial
from .divergence import first_in_pass, listed, not_finite_input
from .result import Evaluation
from .run import LossFunction, Run, Update, loss_of_model

__all__ = ["Evaluating", "Scored", "evaluate"]

Array = Any
NONE = "Every operation's numbers are finite, and the sum of the losses is not"
IGNORED = -100  # a label that counts nothing


class Scored(NamedTuple):
    """The mean loss over a batch's targets and, where they are classes, how many the largest logit names."""

    loss: Tensor
    right: Any = None


def evaluate(model: Module, data: Data, *, loss: LossFunction = loss_of_model, batch_size: int = 8, batches: int | None = None,
             threads: int | None = None, comm: Comm | None = None, step: int = 0) -> Evaluation:
    """The mean loss over all targets of data, in evaluation mode.

    Parameters
    ----------
    model : Module
    data : Data
    loss : callable
        As of `fit`. Where it has a method ``scored(model, inputs)`` that gives a `Scored`, that is called, and the accuracy is
        known too; so it is for classifiers of `minilora.models`.
    batch_size : int
    batches : int, optional
        No more than these.
    threads : int, optional
        Batches that are computed at once. None: `parallel.advised_threads`.
    comm : Comm, optional
        The processes that share the batches out, each a part of the rows of every one.
    step : int
        Is written into the result.

    Returns
    -------
    Evaluation

    Raises
    ------
    ConfigError
        If there is no target.
    DivergedError
        If the loss is not finite.
    """
    comm = comm or Serial()
    numbers = data.in_order(batch_size)[:batches]
    shares = [rows[comm.rank::comm.size] for rows in numbers]
    found: list[tuple[float, float, float, float]] = [(0.0, 0.0, 0.0, 0.0)] * len(shares)

    def compute(number: int) -> None:
        batch = data.batch(shares[number])
        if batch.targets:
            with no_grad(), numpy.errstate(all="ignore"):
                mean, right = scored(loss, model, batch.inputs)
            found[number] = mean.item() * batch.targets, batch.targets, 0.0 if right is None else float(right), right is None

    with in_mode(model, training=False):
        parallel.spread_out(compute, range(len(shares)), threads or parallel.advised_threads(model.parameters()))
        sums = numpy.array([sum(each) for each in zip(*found)] or [0.0] * 4)
        comm.sum_(sums)
        total, targets, right, unknown = sums.tolist()
        if not targets:
            raise ConfigError(f"the evaluation data have no target in {len(numbers)} batches: nothing could be said of the "
                              "model. Are the rows left out, or the labels all ignored?")
        if not math.isfinite(total):
            where = first_told(comm, not_finite(model, loss, data, shares))
            raise DivergedError(f"the loss of the evaluation after step {step} is not finite. {where or NONE}")
    mean = total / targets
    return Evaluation(step, mean, int(targets), None if unknown else right / targets,
                      math.exp(min(mean, 700.0)) if predicts_tokens(model) else None)


def scored(loss: LossFunction, model: Module, inputs: Mapping[str, Any]) -> Scored:
    """The loss of a batch, and what is known of it besides."""
    if hasattr(loss, "scored"):
        return loss.scored(model, inputs)  # type: ignore[no-any-return]
    labels: Any = inputs.get("labels") if loss is loss_of_model else None
    kind: Any = getattr(model, "labels", None)
    if getattr(labels, "dtype", numpy.dtype(float)).kind not in "iu" or getattr(kind, "count", 1) < 2 \
            or kind.problem_type not in (None, "single_label_classification"):
        return Scored(loss(model, inputs))
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"})
    if isinstance(labels, numpy.ndarray):
        labels = backend.to_device(labels, logits.device)
    right = ((logits.data.argmax(axis=-1) == labels) & (labels != IGNORED)).sum()
    return Scored(ops.cross_entropy(logits, labels, IGNORED), right)


def predicts_tokens(model: Module) -> bool:
    """Whether a model is one whose loss is a mean over tokens, such that e to the loss means something."""
    return hasattr(type(model), "embedding")


def not_finite(model: Module, loss: LossFunction, data: Data, shares: list[Any]) -> str:
    """What is to be said of an evaluation whose loss is not finite; "" where it lies in another process's rows."""
    def computed(batch: Batch) -> Array:
        with no_grad():
            return scored(loss, model, batch.inputs).loss.data

    for rows in shares:
        batch = data.batch(rows)
        if batch.targets:
            found = not_finite_input(batch.inputs, rows) or first_in_pass(model, lambda: computed(batch), gradients=False)
            if found:
                return (f"The first array that is not finite: {found}. Rows {listed(rows)} of the evaluation data. The "
                        "weights are finite, and stay as they are")
    return ""


class Evaluating(Beside):
    """Evaluates every so many steps, keeps the best weights, and gives them back at the end.

    Parameters
    ----------
    data : Data
    """

    def __init__(self, data: Data) -> None:
        self.data = data

    def begin(self, run: Run) -> None:
        if not any(self.data.batch(rows).targets for rows in self.data.in_order(run.settings.batch_size)):
            raise ConfigError(f"the evaluation data have no target in {len(self.data)} rows: no evaluation could be made. Give "
                              "data with labels, or none")

    def after_step(self, run: Run, made: Update) -> None:
        settings = run.settings
        if not run.due(settings.steps_per_eval):
            return
        found = evaluate(run.model, self.data, loss=run.loss, batch_size=settings.batch_size, batches=settings.eval_batches,
                         threads=run.threads, comm=run.comm, step=run.step)
        run.evaluations.append(found)
        run.worse += 1
        if run.best is None or found.loss < run.best.loss:
            run.best, run.best_weights, run.worse = found, run.weights(), 0

    def end(self, run: Run) -> None:
        if run.finished and run.best_weights is not None:
            run.model.load_state_dict(run.best_weights, strict=False)
