"""The device's part of an update, recorded once for every shape of batches and then repeated: see `minilora.record`.

An update is two steps for a GPU: the backward pass of one batch, as often as there are batches, and what follows the last one,
from the sums of gradients to the optimizer's step. Both are recorded by themselves, so that batches of several lengths give as
many graphs as there are lengths, however they meet in an update. The numbers that change, how many targets a batch has and by
what the sum is divided, lie in the device's memory. The bits are those of steps that are called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from .. import backend, graphs, outside, replay
from ..errors import ConfigError
from .batch import Batch
from .standing import Standing

__all__ = ["RecordedUpdate", "made_recorded"]

Array = Any

MOST = 32  # shapes of batches that are recorded: `data.Tokens` with ``few_lengths`` has 28 lengths up to 2,048 tokens


class RecordedUpdate:
    """How a run makes its updates on a GPU with ``fit(..., recorded=True)``.

    Parameters
    ----------
    run : Standing
        Of one process.

    Attributes
    ----------
    problem : str
        Why nothing is recorded any more; "" as long as it is.
    """

    def __init__(self, run: Standing) -> None:
        self.run = run
        self.problem = ""
        self.factor = self.whole = 1.0
        self.ranges: dict[str, Range] = {}
        # Of more shapes those that came first stay: who makes room for the others records most of the time, and replays little.
        self.backward = graphs.Recorded(self._backward, MOST, idle=max(graphs.IDLE, run.per_epoch))
        self.finish = graphs.record(self._finish)

    @property
    def graphs(self) -> int:
        """How many CUDA graphs there are now."""
        return self.backward.graphs + self.finish.graphs

    def __call__(self, batches: Sequence[Batch], scale: float, stepping: bool) -> tuple[Any, ...] | None:
        """Loss and norm; with `stepping`, after the optimizer's step, whether all is finite. None: it is to be called."""
        if self.problem or not self.checked(batches):
            return None
        run = self.run
        targets = sum(batch.targets for batch in batches)
        try:
            total: Any = 0.0
            for batch in batches:
                if batch.targets:
                    self.factor = float(batch.targets) * scale
                    total = total + self.backward(dict(batch.inputs))
            self.whole = targets * scale
            return tuple(self.finish(total, stepping))
        except Exception as error:  # whatever it is, the step that is called says it better, or does it
            self.problem = f"{type(error).__name__}: {error}"
            run.notes.append(f"recorded=True: from update {run.step + 1} on steps are called, for they could not be recorded: "
                             f"{self.problem}")
            self.backward.forget()
            self.finish.forget()
            run.last_good.give_back_state()
            run.optimizer.zero_grad()
            return None

    def checked(self, batches: Sequence[Batch]) -> bool:
        """Whether all whole numbers of these batches are such as were there before, in an update that was called.

        On the host an operation looks whether ids and labels are in their range; on the device nobody does.
        """
        known = True
        for batch in batches:
            for name, value in batch.inputs.items():
                if isinstance(value, numpy.ndarray) and value.dtype.kind in "iu" and value.size:
                    known &= self.ranges.setdefault(name, Range()).widened(value)
        return known

    def as_dict(self) -> dict[str, Any]:
        """What report.json says of it."""
        return {"graphs": self.graphs, "problem": self.problem or None}

    def _backward(self, inputs: Mapping[str, Any]) -> Array:
        """Add the gradient of a batch."""
        outside.watch(self.run.loss)
        with self.run.alike.drawing():
            loss = self.run.summed(inputs, lambda dtype: replay.changing(lambda: (self.factor,), dtype)[0])
            loss.backward()
        return loss.detach().data

    def _finish(self, total: Array, stepping: bool) -> tuple[Array, ...]:
        """`mean_over_all` for one process, the norm, and the step."""
        run = self.run
        for group in run.optimizer.groups:
            flat = group.gather()
            flat *= replay.changing(lambda: (1.0 / self.whole,), flat.dtype)[0]
        total = total / replay.changing(lambda: (self.whole,), total.dtype)[0]
        norm = run.clipped()
        if not stepping:
            return total, norm
        run.optimizer.step()
        return total, norm, run.last_good.finite()


def made_recorded(run: Standing) -> RecordedUpdate | None:
    """What records the updates of a run; None on the CPU. `ConfigError` for a run of several processes."""
    if run.comm.size > 1:
        raise ConfigError("fit: recorded=True is for one process: between several the host sends messages in every update, and "
                          "a recorded one would not send them again. Leave it out")
    return None if run.optimizer.groups[0].parameters[0].device is backend.cpu else RecordedUpdate(run)


class Range:
    """Which whole numbers were seen: from 0 to the largest, and some below 0."""

    def __init__(self) -> None:
        self.largest = -1
        self.negative: set[int] = set()

    def widened(self, values: numpy.ndarray) -> bool:
        """Whether all of these were seen before; afterwards they were."""
        largest, negative = int(values.max()), set(numpy.unique(values[values < 0]).tolist())
        known = largest <= self.largest and negative <= self.negative
        self.largest, self.negative = max(largest, self.largest), negative | self.negative
        return known
