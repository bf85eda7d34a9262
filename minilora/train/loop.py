"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import DivergedError
from ..nn.module import Module
from ..optim.optimizer import Optimizer
from .batch import Data
from .beside import Beside
from .checkpoints.keeper import Keeper
from .distributed.comm import Comm, Serial
from .evaluation import Evaluating
from .header import Header
from .metrics import Metrics
from .outcome import Outcome
from .progress import Progress
from .report import Report
from .result import Result
from .run import LossFunction, Run, loss_of_model
from .settings import Settings

__all__ = ["fit"]


def fit(model: Module, data: Data, settings: Settings | None = None, *, loss: LossFunction = loss_of_model,
        valid: Data | None = None, folder: Any = None, resume: bool = False, permit: Iterable[str] = (),
        comm: Comm | None = None, optimizer: Callable[[list[Any]], Optimizer] | None = None,
        beside: Sequence[Beside] = (), recorded: bool = False, quiet: bool = False) -> Result:
    """Train what is trainable in a model.

    Parameters
    ----------
    model : Module
    data : Data
    settings : Settings, optional
    loss : callable
        From the model and a batch's inputs to the mean loss over its targets. By default ``model(**inputs)``.
    valid : Data, optional
        To evaluate on. The model has the weights of the best evaluation at the end; without, those of the last step.
    folder : path, optional
        Where checkpoints, metrics, the report and what was trained go. None writes nothing.
    resume : bool
        Go on from the last checkpoint in `folder`, to the bit as if the run had not been interrupted; from the beginning, if
        there is none.
    permit : iterable of str
        Differences from the interrupted run that are wanted, by name, such as ``"steps"`` for a longer one: see
        `train.checkpoints.identity`.
    comm : Comm, optional
        The processes that train together. None: this one alone.
    optimizer : callable, optional
        From (name, parameter) pairs to an optimizer, in place of AdamW.
    beside : sequence of Beside
        Objects of your own that are told of every step.
    recorded : bool
        On a GPU: make CUDA graphs of the updates, one for each shape of batches, and repeat them (`minilora.record`). The
        bits are the same; what it costs is memory. What cannot be recorded is called, and a note says so. For one process.
    quiet : bool
        Print nothing. Else a header and the progress go to stderr.

    Returns
    -------
    Result

    Raises
    ------
    ConfigError
        If nothing is trained, or there is nothing to learn from or to evaluate on.
    DivergedError
        If the loss, a gradient or a weight is not finite any more: it names the first array that is not. The model has the
        weights from before that update, and no file has been changed by it.
    FileError
        If the folder cannot be written to, is in use, or holds a run already, or a model or an adapter of no run. In the end,
        if the last state cannot be saved.
    StateError, FormatError
        If the checkpoint to resume from belongs to another run, or is damaged. Nothing has changed.
    Interrupted
        A `KeyboardInterrupt`: Ctrl-C or SIGTERM ended the run after a whole step. The message says how it goes on.
    """
    began = time.perf_counter()
    with comm or Serial() as comm:  # an error that one process has alone ends all of them
        run = Run(model, data, settings or Settings(), loss, comm, optimizer, recorded)
        run.folder, run.valid = None if folder is None else Path(folder), valid
        objects = [*kept_beside(run, valid, quiet), *beside]
        with Keeper(run, resume, permit) as keeper:
            train(run, [*objects, keeper])
    return Result(run.step, run.losses, run.evaluations, run.best, time.perf_counter() - began, run.folder, tuple(run.notes),
                  0 if run.scaling is None else run.scaling.skipped)


def train(run: Run, objects: Sequence[Beside]) -> None:
    """Make the updates of a run, and tell what stands beside it of each."""
    begun = []
    try:
        for one in objects:
            begun.append(one)
            one.begin(run)
        run.model.train()
        while not run.over:
            made = run.update()
            for one in objects:
                one.after_step(run, made)
        run.status = "done" if run.complete else "stopped"
    except BaseException as error:
        run.status = f"{'diverged' if isinstance(error, DivergedError) else 'failed'}: {str(error) or type(error).__name__}"
        tell_end(run, begun, error)
        raise
    tell_end(run, begun)


def tell_end(run: Run, objects: Sequence[Beside], error: BaseException | None = None) -> None:
    """Tell every object of the end. An error of one keeps it from no other, and does not hide that which ended the run."""
    run.model.eval()
    first = error
    for one in objects:
        try:
            one.end(run)
        except Exception as failed:
            if first is None:
                first = failed
            else:
                first.__notes__ = [*getattr(first, "__notes__", []), f"and then {type(one).__name__}: {failed}"]
    if first is not None and first is not error:
        raise first


def kept_beside(run: Run, valid: Data | None, quiet: bool) -> Iterator[Beside]:
    """What stands beside a run, in the order in which it is told of a step; only rank 0 writes and prints."""
    if valid is not None:
        yield Evaluating(valid)
    if run.comm.rank or quiet and run.folder is None:
        return  # nothing is said or written: nothing is counted for it
    header = Header(run, valid)
    if run.folder is not None:
        yield Outcome(run.folder)
        yield Metrics(run.folder)
        yield Report(run.folder, header)
    if not quiet:
        yield Progress(header)
