"""A training step on several cores: the rows of a batch in parts, each with its own thread, and one sum of their gradients.

A product of a narrow model is too small to be shared by two threads: OpenBLAS's second one gains nothing at width 384, and
waits for work on the core that ours would need. Parts of the batch, whose products have one thread each, share nothing but
frozen weights that they only read; what they must add up, the gradients of adapters, is small.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import copy_context
from typing import Any

from . import backend, blas, parts
from .engine import is_recording, newest
from .errors import ConfigError, DTypeError, GraphError, ShapeError, StateError
from .gathered import Gathered
from .half import added
from .settings import number, whole
from .tensor import Parameter, Tensor
from .walk import collect, deliver, refuse_older

__all__ = ["WIDE", "advised_threads", "backward", "cores", "spread_out"]

Batch = Any  # an array, a list of rows, or tuples and dicts of such

WIDE = 512  # numbers: above, two threads of OpenBLAS share a product as well as two parts share the rows


def advised_threads(parameters: Iterable[Parameter]) -> int:
    """How many threads `backward` should have for a model with these parameters, trained or not.

    The cores that this process may use if the model is narrow, that is if the shorter side of each of its matrices has at most
    `WIDE` numbers. 1, the whole batch at once, if it is wider or lives on another device than the CPU.

    Examples
    --------
    >>> import minilora
    >>> advised_threads(minilora.nn.Linear(2000, 1000).parameters())
    1
    """
    given = list(parameters)
    narrow = all(min(p.shape) <= WIDE for p in given if p.ndim == 2)
    return cores() if narrow and all(p.device is backend.cpu for p in given) else 1


def cores() -> int:
    """The cores that this process may use.

    Examples
    --------
    >>> cores() >= 1
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread_out(compute: Callable[[Any], None], pieces: Iterable[Any], threads: int) -> None:
    """Call `compute` with every piece, so many at a time, each in the caller's context and with single-threaded BLAS.

    For work whose pieces share nothing that they write, and record no graph. With one thread, on a GPU, or with a BLAS whose
    threads cannot be set, it is a loop. After an error or an interrupt no further piece begins, and the first error is raised.

    Parameters
    ----------
    compute : callable
    pieces : iterable
        The longest first, so that no thread is left alone with it.
    threads : int
    """
    if whole("threads", threads) == 1 or backend.current_device() is not backend.cpu or not blas.can_hold():
        for piece in pieces:
            compute(piece)
        return
    from concurrent.futures import ThreadPoolExecutor  # here: 10 ms that `import minilora.parallel` need not cost

    with blas.one_thread(), ThreadPoolExecutor(threads, "minilora") as pool:
        running = [pool.submit(copy_context().run, compute, piece) for piece in pieces]
        try:
            for one in running:
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def backward(loss_of: Callable[[Batch], Tensor], batch: Batch, threads: int,
             weight: Callable[[Batch], float] | None = None) -> Tensor:
    """Compute the loss of a batch and add its gradients to the parameters': ``loss_of(batch).backward()``, a part a thread.

    With one thread, one row, on a GPU, or with a BLAS whose threads cannot be set, it is that very call.

    Parameters
    ----------
    loss_of : callable
        From a batch, or a part of it, to its loss: a mean over rows, or over whatever `weight` counts. It runs in several
        threads at once, and computes all that has a gradient itself.
    batch : array, Tensor or list of rows, or tuples and dicts of these
        They share the first axis. None, strings and numbers in it belong to every part.
    threads : int
        See `advised_threads`.
    weight : callable, optional
        How much a part counts, its rows by default; for a mean over tokens their number, such as
        ``lambda part: (part["labels"] != -100).sum()``. A part that counts 0 is left out.

    Returns
    -------
    Tensor
        The loss of the whole batch, outside the graph.

    Raises
    ------
    ShapeError, DTypeError, ConfigError
        If the batch cannot be cut, or a weight is no number >= 0.
    GraphError
        As `Tensor.backward`, and if a part's graph goes back to what was computed before.
    StateError
        Within another `backward` of this kind.

    Notes
    -----
    Loss and gradients are those of the whole batch up to rounding, and the same bits in every run with as many threads: the
    parts are added in their order. Masks of dropout differ from part to part, hence with the number of threads. The parts
    run in the contexts of the caller (``lora.disabled``, `contextvars`). An error of a part is raised here, with a note that
    names the part; then, and after an interrupt, no gradient has changed.

    Examples
    --------
    >>> import numpy, minilora
    >>> layer = minilora.nn.Linear(3, 1, rng=0)
    >>> x, y = numpy.ones((5, 3), "float32"), numpy.zeros((5, 1), "float32")
    >>> loss = backward(lambda part: minilora.ops.mse(layer(part[0]), part[1]), (x, y), threads=2)
    >>> loss.shape, layer.weight.grad.shape
    ((), (1, 3))
    """
    threads, rows = whole("threads", threads), _rows(batch)
    if parts.current() is not None:
        raise StateError("parallel.backward within parallel.backward: a part is computed by one thread. Let loss_of give the "
                         "loss, and call backward once, outside")
    count = min(threads, rows)
    if count > 1 and is_recording() and backend.current_device() is backend.cpu and blas.can_hold():
        jobs = list(_jobs(loss_of, batch, rows, count, weight))
        if len(jobs) > 1:
            return _together(jobs)
    loss = loss_of(batch)
    loss.backward()
    return loss.detach()


class _Job:
    """One part: what is to be computed, and then what came out."""

    loss: Any = None
    gathered: Gathered | None = None
    error: BaseException | None = None

    def __init__(self, part: parts.Part, name: str, loss_of: Callable[[Batch], Tensor], batch: Batch, count: float) -> None:
        self.part, self.name, self.loss_of, self.batch, self.count = part, name, loss_of, batch, count
        self.context = copy_context()

    def run(self, share: float, before: int) -> None:
        try:
            self.context.run(self._compute, share, before)
        except BaseException as error:
            self.error = error

    def _compute(self, share: float, before: int) -> None:
        with parts.computing(self.part):
            loss = self.loss_of(self.batch) * share
            refuse_older(loss, before, "parallel.backward: the loss", "compute in loss_of whatever has a gradient")
            self.gathered = collect(loss, rooms=False)
            self.loss = loss.data


def _jobs(loss_of: Callable[[Batch], Tensor], batch: Batch, rows: int, count: int,
          weight: Callable[[Batch], float] | None) -> Iterator[_Job]:
    """The parts that count, in their order."""
    for k in range(count):
        low, high = rows * k // count, rows * (k + 1) // count
        piece = _cut(batch, low, high)
        name = f"in part {k + 1} of {count} of the batch, rows {low} to {high - 1}"
        counted = high - low if weight is None else number(f"weight {name}", _plain(weight(piece)), 0.0)
        if counted:
            yield _Job(parts.Part(k), name, loss_of, piece, counted)


def _together(jobs: list[_Job]) -> Tensor:
    total, before = sum(job.count for job in jobs), newest()
    threads = [threading.Thread(target=job.run, args=(job.count / total, before), name=f"minilora {job.name}")
               for job in jobs[1:]]
    with blas.one_thread():
        try:
            for thread in threads:
                thread.start()
            jobs[0].run(jobs[0].count / total, before)
        finally:
            _join([thread for thread in threads if thread.ident is not None])
    for job in jobs:
        if job.error is not None:
            job.error.__notes__ = [*getattr(job.error, "__notes__", []), job.name]
            raise job.error
    deliver(_added([job.gathered for job in jobs if job.gathered is not None]))
    _count_on(jobs)
    loss = sum(job.loss for job in jobs)
    return Tensor(backend.cpu.xp.asarray(loss, dtype=jobs[0].loss.dtype))  # NumPy's 0-d arithmetic gives scalars


def _join(threads: list[threading.Thread]) -> None:
    try:
        for thread in threads:
            thread.join()
    except BaseException:  # an interrupt: the parts still compute, with the one thread of BLAS; a second one leaves at once
        for thread in threads:
            thread.join()
        raise


def _added(walks: list[Gathered]) -> Gathered:
    """The sums of the parts' gradients, part after part: the order, hence every bit, is that of the rows."""
    total = Gathered({}, set(), [])
    for leaves, _, retained in walks:
        total.retained.extend(retained)
        for parameter, dx in leaves.items():
            if parameter in total.leaves:
                total.leaves[parameter] = added(total.leaves[parameter], dx)
                total.owned.add(parameter)
            else:
                total.leaves[parameter] = dx
    return total


def _count_on(jobs: list[_Job]) -> None:
    """Move the counters that the parts asked: as far as the part that asked most often."""
    for counter in {counter: None for job in jobs for counter in job.part.calls}:
        counter.step += max(job.part.calls.get(counter, 0) for job in jobs)


# -- cutting a batch --------------------------------------------------------------------------------------------------


def _leaves(batch: Batch, name: str) -> Iterator[tuple[str, Any]]:
    """(name, value) of all that is no tuple and no dict."""
    if isinstance(batch, (tuple, dict)):
        for key, value in batch.items() if isinstance(batch, dict) else enumerate(batch):
            yield from _leaves(value, f"{name}[{key!r}]")
    else:
        yield name, batch


def _has_rows(value: Any) -> bool:
    return isinstance(value, list) or bool(getattr(value, "shape", ()))


def _rows(batch: Batch) -> int:
    """The length of the axis that all arrays of a batch share."""
    lengths = {}
    for name, value in _leaves(batch, "batch"):
        if isinstance(value, Tensor) and value.node is not None:
            raise GraphError(f"parallel.backward: {name} has a graph, which the parts would share: pass {name}.detach(), or "
                             "compute it in loss_of")
        if _has_rows(value):
            lengths[name] = len(value)
        elif not (value is None or isinstance(value, (str, bool, int, float)) or hasattr(value, "shape")):
            raise DTypeError(f"parallel.backward: {name} is of type {type(value).__name__}: expected arrays, tensors or lists "
                             "with a row for each sample, in tuples and dicts")
    if not lengths:
        raise ConfigError("parallel.backward: the batch holds no array and no list whose rows could be shared out")
    if len(set(lengths.values())) > 1:
        raise ShapeError("parallel.backward: the arrays of a batch share their first axis, got "
                         + ", ".join(f"{name} with {n} rows" for name, n in lengths.items())
                         + ": what is the same for all rows belongs into loss_of")
    return next(iter(lengths.values()))


def _cut(batch: Batch, low: int, high: int) -> Batch:
    """Rows low to high - 1 of everything in a batch: views."""
    if isinstance(batch, dict):
        return {key: _cut(value, low, high) for key, value in batch.items()}
    if isinstance(batch, tuple):
        values = [_cut(value, low, high) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else tuple(values)
    if not _has_rows(batch):
        return batch
    return Tensor(batch.data[low:high]) if isinstance(batch, Tensor) else batch[low:high]


def _plain(value: Any) -> Any:
    """A Tensor's or a 0-d array's number."""
    return value.item() if hasattr(value, "item") else value
