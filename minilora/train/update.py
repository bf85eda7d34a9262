"""What one update came to."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Update"]


class Update(NamedTuple):
    """One update, in plain numbers.

    Attributes
    ----------
    loss : float
        The mean over the targets of all its batches, in all processes.
    targets : int
        How many targets these are.
    tokens : int
    norm : float
        Of the gradients, before they were clipped.
    rate : float
        The learning rate it was made with, of the first group.
    mean : float, optional
        Where a report is due: the mean loss over the targets of all updates since the last one.
    scale : float
        What the loss was multiplied by: 1 but in mixed precision.
    skipped : int
        How often the gradients were not finite with a larger scale, before this update was made.
    """

    loss: float
    targets: int
    tokens: int
    norm: float
    rate: float
    mean: float | None = None
    scale: float = 1.0
    skipped: int = 0
