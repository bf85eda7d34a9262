"""How much memory a run has needed, and how much it will."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy

from ..engine import ledger
from ..nn.mode import in_mode
from ..nn.module import Module
from .batch import Batch
from .run import Run

__all__ = ["Needed", "needed", "peak_bytes"]


def peak_bytes(model: Module) -> int | None:
    """The most memory so far: of the process, or what the pool of a GPU's memory holds. None where nobody counts it."""
    xp: Any = next(model.parameters()).device.xp
    if hasattr(xp, "get_default_memory_pool"):
        return int(xp.get_default_memory_pool().total_bytes())
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Needed(NamedTuple):
    """Bytes that a run needs at least: what passes through an operation and is kept by none comes on top.

    Attributes
    ----------
    weights : int
        Of the whole model.
    training : int
        Gradients, the optimizer's state, and the copies of what is trained: that of the last step, that of the best.
    kept : int
        For the backward pass of the batch that was looked at.
    """

    weights: int
    training: int
    kept: int

    @property
    def total(self) -> int:
        return sum(self)


def needed(run: Run, batch: Batch, evaluates: bool) -> Needed:
    """What a run with batches like this one needs. Runs a forward pass, and leaves all state as it was."""
    run.last_good.keep()
    try:
        with in_mode(run.model, training=True), numpy.errstate(all="ignore"), run.precision():
            kept = ledger(run.loss(run.model, batch.inputs)).nbytes
    finally:
        run.last_good.give_back_state()
    weights = sum(p.data.nbytes for p in run.model.parameters())
    training = sum(array.size * array.dtype.itemsize for group in run.optimizer.groups
                   for array in (group.grad, group.data, *group.state.values(), *[group.data] * evaluates))
    return Needed(weights, training, kept)
