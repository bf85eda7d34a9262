"""Optimizers: they read gradients and write parameters, and never see the graph."""

from typing import TYPE_CHECKING

from ..later import later
from ..unsupported import OF_LOSS_SCALES, OF_OPTIMIZERS, OF_SCHEDULERS, explain_absent
from .adam import Adam, AdamW
from .group import Group, Run
from .loss_scale import LossScale
from .optimizer import Optimizer
from .schedule import Scheduler, constant, cosine, linear, step_decay
from .sgd import SGD

__all__ = [
    "SGD", "Adam", "AdamW", "Group", "LossScale", "Optimizer", "Run", "Scheduler", "constant", "cosine", "linear", "step_decay",
]

explain_absent(Optimizer, OF_OPTIMIZERS)
explain_absent(Scheduler, OF_SCHEDULERS)
explain_absent(LossScale, OF_LOSS_SCALES)

if not TYPE_CHECKING:  # a name that is not here is an error to type checkers too
    __getattr__, __dir__ = later(globals(), {})
