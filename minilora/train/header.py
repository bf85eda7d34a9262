"""What is said of a run before it does any work."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import ConfigError
from ..flags import option
from ..lora.planning.human import human
from ..nn.summary import summary
from .batch import Batch, Data
from .memory import Needed, needed
from .recorded import MOST
from .run import Run

__all__ = ["Header", "clock"]


class Header:
    """The numbers of a run that are known before it begins.

    Parameters
    ----------
    run : Run
    valid : Data, optional

    Attributes
    ----------
    targets : int
        Of the training data, in one epoch.
    shapes : int
        In which the batches of the first epoch come.
    trained, total : int
        Numbers of the model.
    bytes : Needed
    """

    def __init__(self, run: Run, valid: Data | None = None) -> None:
        self.run, self.valid = run, valid
        self.targets, widest, self.shapes = looked_through(run)
        counted = summary(run.model)
        self.line, self.trained, self.total = counted.trainable_line, counted.trained, counted.trained + counted.frozen
        self.bytes: Needed = needed(run, widest, valid is not None)

    def lines(self) -> Iterator[str]:
        """The header, line by line; the first is PEFT's."""
        run, settings = self.run, self.run.settings
        yield self.line
        valid = "none to evaluate on" if self.valid is None else f"{len(self.valid):,} to evaluate on"
        yield (f"data      {len(run.data):,} rows, {valid}; {self.targets:,} targets an epoch, "
               f"{self.trained / self.targets:,.2f} trained numbers for each")
        shared = f", shared by {run.comm.size} processes" if run.comm.size > 1 else ""
        yield (f"steps     {run.total:,}, of {settings.accumulation} x {settings.batch_size} rows{shared}: "
               f"{run.total * settings.accumulation / run.per_epoch:.3g} epochs of {run.per_epoch:,} batches")
        clipped = "no clipping" if settings.max_grad_norm is None else f"gradients clipped at {settings.max_grad_norm:g}"
        yield (f"rate      {settings.learning_rate:g}, {settings.schedule}, warm-up {settings.warmup:g}; "
               f"{type(run.optimizer).__name__}, {clipped}; seed {settings.seed}")
        if run.scaling is not None:
            yield (f"precision mixed: activations in float16, what is trained in float32; loss scale {run.scaling.value:,.0f}, "
                   f"doubled after {settings.scale_growth:,} good steps")
        if run.recorded is not None:
            few = option("few_lengths=True", "--few-lengths")
            more = "" if self.shapes <= MOST else (f", of which {MOST} are recorded, and the others called: read with {few} "
                                                   "texts come in few")
            yield f"recorded  updates are repeated as CUDA graphs; {self.shapes:,} shapes of batches in the first epoch{more}"
        yield (f"memory    {human(self.bytes.total)} at least: weights {human(self.bytes.weights)}, training "
               f"{human(self.bytes.training)}, kept for the backward pass of the largest batch {human(self.bytes.kept)}")
        if run.step:
            yield f"resumed   after step {run.step:,}"


def looked_through(run: Run) -> tuple[int, Batch, int]:
    """The targets of an epoch, this process's largest batch of it, which has targets, and how many shapes they come in.

    Raises
    ------
    ConfigError
        If there is no target.
    """
    targets, widest, shapes = 0, None, set()
    for number in range(run.per_epoch):
        batch = run.batch(number)
        targets += run.data.batch(run.rows(number)).targets if run.comm.size > 1 else batch.targets
        shapes.add(tuple(getattr(value, "shape", ()) for value in batch.inputs.values()))
        if batch.targets and (widest is None or size(batch) > size(widest)):
            widest = batch
    if widest is None:
        raise ConfigError(f"the training data have no target in {len(run.data):,} rows: nothing could be learned from them. "
                          "Are all labels ignored, or all completions cut off?")
    return targets, widest, len(shapes)


def size(batch: Batch) -> int:
    """The numbers of a batch, padding counted."""
    return sum(getattr(value, "size", 0) for value in batch.inputs.values())


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``.

    Examples
    --------
    >>> clock(61.2), clock(3600)
    ('1:01', '1:00:00')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
