"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..nn.module import Module
from ..optim.optimizer import Optimizer
from .batch import Data
from .distributed.comm import Comm, Serial
from .result import Result
from .run import LossFunction, Run, loss_of_model
from .settings import Settings

__all__ = ["fit"]


def fit(model: Module, data: Data, settings: Settings | None = None, *, loss: LossFunction = loss_of_model,
        valid: Data | None = None, folder: Any = None, resume: bool = False, comm: Comm | None = None,
        optimizer: Callable[[list[Any]], Optimizer] | None = None) -> Result:
    """Train what is trainable in a model.

    Parameters
    ----------
    model : Module
    data : Data
    settings : Settings, optional
    loss : callable
        From the model and a batch's inputs to the mean loss over its targets. By default ``model(**inputs)``.
    valid : Data, optional
        To evaluate on.
    folder : path, optional
        Where checkpoints, metrics and the report go. None writes nothing.
    resume : bool
        Go on from the last checkpoint in `folder`.
    comm : Comm, optional
        The processes that train together. None: this one alone.
    optimizer : callable, optional
        From (name, parameter) pairs to an optimizer, in place of AdamW.

    Returns
    -------
    Result
    """
    began = time.perf_counter()
    run = Run(model, data, settings or Settings(), loss, comm or Serial(), optimizer)
    model.train()
    while run.step < run.total:
        made = run.update()
        if run.step % run.settings.steps_per_report == 0 or run.step == run.total:
            run.losses.append((run.step, made.loss))
    model.eval()
    return Result(run.step, run.losses, run.evaluations, run.best, time.perf_counter() - began,
                  None if folder is None else Path(folder))
