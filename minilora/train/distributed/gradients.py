"""The sums that one update needs of all processes: one small message, and one with every gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy

from ... import backend
from ...errors import StateError
from ...optim.optimizer import Optimizer
from .comm import Comm

__all__ = ["Sums", "mean_over_all", "sums"]

Array = Any

PRIME = 2 ** 20 - 3


class Sums(NamedTuple):
    """What one update is over, in all processes together.

    Attributes
    ----------
    loss : float or array ()
        The mean over the targets; not finite if that of any process is not.
    targets, tokens : int
    stop : bool
        Whether any process was asked to stop after this update: the same answer in all of them.
    """

    loss: Any
    targets: int
    tokens: int
    stop: bool


def sums(comm: Comm, *numbers: Any) -> tuple[Any, ...]:
    """The sums of a few numbers over all processes: one small message in float64, exact for whole numbers below 2^53.

    What a process by itself has is the sum already, and stays where it is: a loss on a GPU is not waited for.

    Examples
    --------
    >>> from minilora.train.distributed.comm import Serial
    >>> sums(Serial(), 2.5, 3)
    (2.5, 3)
    """
    if comm.size == 1:
        return numbers
    message = numpy.array([float(number) for number in numbers], dtype=numpy.float64)
    comm.sum_(message)
    return tuple(message.tolist())


def mean_over_all(optimizer: Optimizer, comm: Comm, loss: Any, count: int, tokens: int, stop: bool = False,
                  scale: float = 1.0) -> Sums:
    """Turn gradients of summed losses into that of the mean over the targets of all processes.

    With losses summed over the targets of each process, the gradient of the mean over all targets is

        g = (g_0 + g_1 + ... ) / (n_0 + n_1 + ...)

    whatever the shares n_i are, 0 included: a mean of means would weigh a target by the share that it happens to lie in. The
    division is done once, after the sum, so that the number of processes changes nothing but the rounding of that sum, and not
    a bit where the gradients are whole numbers.

    Parameters
    ----------
    optimizer : Optimizer
        Its parameters' gradients are changed in place. One that has none here counts as zero, if another process has one, and
        stays without if nobody has.
    comm : Comm
    loss : float or array ()
        The sum of this process's losses.
    count, tokens : int
        Its targets, and its tokens.
    stop : bool
        Whether this process was asked to stop.
    scale : float
        Loss and gradients were multiplied by it.

    Returns
    -------
    Sums

    Raises
    ------
    StateError
        If no process has a target, or the processes do not hold the same trained numbers any more; no gradient has changed.

    Notes
    -----
    Two messages: a small one in float64 (loss, targets, tokens, stop, a check of the trained numbers, and who has which
    gradient), and one with the gradients of all groups of one dtype, in float32 where they have less.
    """
    for group in optimizer.groups:
        group.check_arrays()
    parameters = [p for group in optimizer.groups for p in group.parameters]
    check = _check(optimizer) if comm.size > 1 else 0
    present = (p.gathered is not None for p in parameters)
    total, targets, read, asked, once, squared, *having = sums(comm, loss, count, tokens, stop, check, check ** 2, *present)
    if comm.size * int(squared) != int(once) ** 2:  # equal if, and only if, all checks are
        raise StateError("the processes do not hold the same trained numbers any more. Do they compute with different "
                         "processors, or does something draw random numbers in each? Go on from the last checkpoint, on "
                         "machines of one kind")
    if not targets:
        raise StateError("this update has no target: every label of its batches is masked or ignored, and its loss would be "
                         "0 / 0. Were the completions cut off by max_seq_length, or is a batch of nothing but prompts left in?")
    flats = [group.gather() for group in optimizer.groups]
    for parameter, processes in zip(parameters, having):
        if processes:
            parameter.gathered = parameter.room
    for message in _by_dtype(flats):
        _add_up(message, comm, 1.0 / (targets * scale))
    return Sums(total / (targets * scale), int(targets), int(read), asked > 0)


def _check(optimizer: Optimizer) -> int:
    """The sum of the trained numbers' bits modulo a prime, small enough for its squares' sum over 8,192 processes to be exact.

    One pass over what is trained, and a sync point on a GPU.
    """
    words = (group.data.view(f"uint{8 * group.data.dtype.itemsize}").sum(dtype="uint64") for group in optimizer.groups)
    return sum(int(word) for word in words) % PRIME


def _by_dtype(flats: list[Array]) -> list[list[Array]]:
    """The flat arrays that travel in one message: of one device, and of one dtype on the way."""
    found: dict[Any, list[Array]] = {}
    for flat in flats:
        found.setdefault((backend.device_of(flat), numpy.promote_types(flat.dtype, "float32")), []).append(flat)
    return list(found.values())


def _add_up(flats: list[Array], comm: Comm, factor: float) -> None:
    """Put ``factor`` times the sum over all processes in the place of these arrays."""
    wide = numpy.promote_types(flats[0].dtype, "float32")
    if comm.size == 1:
        for flat in flats:
            flat *= factor
    elif len(flats) == 1 and flats[0].dtype == wide:  # where it lies, without a copy
        comm.sum_(flats[0])
        flats[0] *= factor
    else:
        joined = backend.device_of(flats[0]).xp.concatenate([flat.astype(wide) for flat in flats])
        comm.sum_(joined)
        joined *= factor  # before it is narrowed: a sum may lie outside of float16 where the mean does not
        start = 0
        for flat in flats:
            flat[...] = joined[start:start + flat.size]
            start += flat.size
