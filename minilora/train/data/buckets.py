"""The order of an epoch: every row once, in batches of about one length, as a pure function of seed and epoch."""

from __future__ import annotations

from typing import Any

import numpy

from ...errors import ConfigError
from ...settings import whole

__all__ = ["in_batches", "shuffled"]

WINDOW = 64  # batches among which rows are sorted: neighbours in length, and yet others in every epoch

Array = Any


def shuffled(lengths: Array, seed: int, epoch: int, batch_size: int) -> list[list[int]]:
    """The rows in batches, drawn.

    Rows are drawn in an order; every `WINDOW` batches of that order are sorted by length, and cut into batches; and the
    batches are drawn in an order. So a batch has little padding, and its rows are others in every epoch.

    Parameters
    ----------
    lengths : array of int, shape (n,)
        The same number everywhere where lengths do not matter.
    seed, epoch, batch_size : int

    Returns
    -------
    list of list of int
        Each of the n rows once. The batch with what is left over, if there is one, is smaller.

    Raises
    ------
    ConfigError
        If the rows do not fill one batch.
    """
    n = len(lengths)
    if whole("batch_size", batch_size) > n:
        raise ConfigError(f"batch_size={batch_size} is more than there are rows, {n}: give batch_size={max(n, 1)} or less")
    rng = numpy.random.default_rng((whole("seed", seed, 0), whole("epoch", epoch, 0)))
    drawn = rng.permutation(n)
    window = WINDOW * batch_size
    parts = [drawn[low:low + window] for low in range(0, n, window)]
    rows = numpy.concatenate([part[numpy.argsort(lengths[part], kind="stable")] for part in parts])
    batches = in_batches(rows, batch_size)
    return [batches[i] for i in rng.permutation(len(batches))]


def in_batches(rows: Array, batch_size: int) -> list[list[int]]:
    """Rows, one batch after the other."""
    return [rows[low:low + batch_size].tolist() for low in range(0, len(rows), whole("batch_size", batch_size))]
