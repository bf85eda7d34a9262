"""The sums that one update needs of all processes."""

from __future__ import annotations

from ...optim.optimizer import Optimizer
from .comm import Comm

__all__ = ["mean_over_all"]


def mean_over_all(optimizer: Optimizer, comm: Comm, loss: float, count: int, tokens: int) -> tuple[float, int, int]:
    """Turn gradients of summed losses into that of the mean over the targets of all processes.

    Parameters
    ----------
    optimizer : Optimizer
        Its parameters' gradients are changed in place.
    comm : Comm
    loss : float
        The sum of this process's losses.
    count, tokens : int
        Its targets, and its tokens.

    Returns
    -------
    tuple
        The mean loss, the targets and the tokens of all.
    """
    for group in optimizer.groups:
        for parameter in group.parameters:
            if parameter.gathered is not None:
                parameter.gathered *= 1.0 / count
    return loss / count, count, tokens
