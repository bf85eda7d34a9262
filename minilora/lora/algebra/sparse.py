"""TIES and DARE: methods that decide entry by entry, and therefore work on D and not on its factors.

Trimming, dropping and electing signs are no linear maps of D, and D's entries are sums over the ranks: to do the same to A
and to B separately is another method. Its result changes when an adapter is written in another gauge (B C, C^-1 A), which its
D does not notice, and multiplying the two mixtures brings cross terms B_i A_j of different adapters. The papers define both
on the difference of weights, which is D. D is made in row blocks; what is merged goes back to low rank by an SVD, whose error
is reported. Argument names (weights, density, majority_sign_method) are PEFT's.
"""

from __future__ import annotations

from numbers import Real
from typing import Any, Callable, Sequence

import numpy

from ...backend import to_device
from ...errors import ConfigError
from ..gradient import delta
from .combine import check_updates
from .compress import Compressed, check_sketch, check_target, compress_dense, row_blocks
from .factors import LowRank, wide

__all__ = ["dare", "ties"]

Array = Any
Rng = Any  # a numpy.random.Generator or a seed; naming the class here would import numpy.random with minilora
METHODS = ("total", "frequency")


def rows_of(update: LowRank, rows: slice) -> Array:
    """Rows of D in float64, shape (rows, in)."""
    return delta(wide(update.A), wide(update.B[rows]), update.s)


def threshold(update: LowRank, density: float) -> Array:
    """The k-th largest |D_ki|, 0-d, k = density out in rounded down. Sorts D: two arrays of 8 out in bytes for a moment."""
    xp, (out, n_in) = update.device.exact, update.shape
    k = int(round(density * out * n_in, 6))  # 0.29 * 100 is 28.999... in binary, and means 29
    if k == 0:
        raise ConfigError(f"density {density} of the {out * n_in} entries of an update {update.shape} keeps none of them")
    sizes = xp.concatenate([xp.abs(rows_of(update, rows)).reshape(-1) for rows in row_blocks(update.shape)])
    return xp.sort(sizes)[sizes.size - k]


def elected(parts: list[Array], weights: list[float], majority_sign_method: str, xp: Any) -> Array:
    """The weighted mean of the entries that have the elected sign; 0 where none is elected."""
    signs = [xp.sign(part) for part in parts]
    votes = signs if majority_sign_method == "frequency" else parts
    winner = xp.sign(sum(votes[1:], votes[0]))
    agree = [(sign * winner > 0) for sign in signs]
    total = sum(part * (chosen * weight) for part, chosen, weight in zip(parts, agree, weights))
    return total / xp.maximum(sum(chosen * 1.0 for chosen in agree), 1.0)


def merge_rows(updates: Sequence[LowRank], weights: list[float], keep: Callable[[int, Array], Array],
               majority_sign_method: str | None) -> Array:
    """The merged D (out, in) in float64, made in row blocks: beside it only one block of each update exists at a time."""
    xp = updates[0].device.exact
    merged = xp.empty(updates[0].shape, dtype="float64")
    for rows in row_blocks(updates[0].shape):
        parts = [keep(i, rows_of(update, rows)) for i, update in enumerate(updates)]
        if majority_sign_method is None:
            merged[rows] = sum(part * weight for part, weight in zip(parts, weights))
        else:
            merged[rows] = elected(parts, weights, majority_sign_method, xp)
    return merged


def check_sparse(density: float, majority_sign_method: str, r: int | None, exact: bool, rng: Rng) -> None:
    if isinstance(density, bool) or not isinstance(density, Real) or not 0 < density <= 1:
        raise ConfigError(f"density must be a number in (0, 1], the part of the entries that is kept, got {density!r}")
    check_target(r, None, None)
    check_sketch(exact, 1, rng)
    if majority_sign_method not in METHODS:
        raise ConfigError(f"majority_sign_method must be one of {', '.join(METHODS)}, got {majority_sign_method!r}")


def ties(updates: Sequence[LowRank], weights: Sequence[float] | None = None, density: float = 0.2, r: int | None = None,
         majority_sign_method: str = "total", *, exact: bool = True, rng: Rng = None) -> Compressed:
    """TIES on D: trim each D_i, elect a sign for each entry, average what agrees with it; then an SVD to rank r.

    Parameters
    ----------
    updates : sequence of LowRank
    weights : sequence of float, optional
        They multiply what is averaged, after the election and without a say in it; all equal to lambda gives the paper's
        lambda tau. 1 by default.
    density : float in (0, 1]
        The part of each D_i's entries, the largest in size, that trimming keeps; entries equal to the smallest kept stay.
    r : int, optional
        At most this rank; the largest r_i by default.
    majority_sign_method : "total" or "frequency"
        The sign of the sum of the entries, the paper's, or of the sum of their signs. A tie elects neither and gives 0, so
        that ties(-D) = -ties(D); PEFT lets plus win.
    exact, rng
        As in `extract`.

    Returns
    -------
    Compressed
        `error` is measured against the dense merged D, whose rank is in general full: look at it.

    Raises
    ------
    ShapeError, ConfigError
        As `cat`; for a density outside (0, 1] or one that keeps nothing, and an unknown method.

    Notes
    -----
    Works in float64: 16 out in bytes for the trimming, later 8 out in for the merged D beside what `extract` needs for its
    SVD, whatever the number of updates; and a row block of 2 MiB for each.
    Source: Yadav et al. 2023, arXiv 2306.01708, section 4.

    Examples
    --------
    >>> import numpy
    >>> one = LowRank(A=numpy.array([[4.0, 1.0, -2.0]]), B=numpy.ones((1, 1)))
    >>> two = LowRank(A=numpy.array([[2.0, 1.0, 3.0]]), B=numpy.ones((1, 1)))
    >>> ties([one, two], density=0.7).update.dense().round(9)  # one keeps 4, -2; two keeps 2, 3
    array([[3., 0., 3.]])
    """
    check_sparse(density, majority_sign_method, r, exact, rng)
    found = check_updates(updates, weights)
    xp, limits = updates[0].device.exact, [threshold(update, density) for update in updates]
    merged = merge_rows(updates, found, lambda i, D: D * (xp.abs(D) >= limits[i]), majority_sign_method)
    return compress_dense(merged, updates[0].dtype, r or max(u.r for u in updates), None, None, exact, rng)


def dare(updates: Sequence[LowRank], weights: Sequence[float] | None = None, density: float = 0.5, r: int | None = None,
         rng: Rng = None, then: str = "linear", majority_sign_method: str = "total", *, exact: bool = True) -> Compressed:
    """DARE on D: keep each entry of D_i with probability density, divide by it; then a weighted sum or TIES' election.

    Parameters
    ----------
    updates, weights, r, majority_sign_method, exact
        As in `ties`.
    density : float in (0, 1]
        One minus the paper's drop rate p. The mean over draws is D_i.
    rng : numpy.random.Generator or int
        Draws the masks on the host, one stream for each update, row by row; the same on every device.
    then : "linear" or "ties"
        What follows: sum_i w_i D_i, or the election and the average of `ties` (PEFT's dare_linear_svd, dare_ties_svd).

    Returns
    -------
    Compressed
        As `ties`. Dropping entries makes the rank full, and an SVD to rank r undoes much of it: look at the error.

    Raises
    ------
    ShapeError, ConfigError
        As `ties`; and without rng.

    Notes
    -----
    Memory as `ties`, without the trimming. Source: Yu et al. 2023, arXiv 2311.03099, section 3.

    Examples
    --------
    >>> import numpy
    >>> D = LowRank(A=numpy.ones((1, 4)), B=numpy.ones((3, 1)))
    >>> dare([D], density=1.0, rng=0).update.dense().round(9).sum()
    np.float64(12.0)
    """
    check_sparse(density, majority_sign_method, r, exact, rng)
    if then not in ("linear", "ties"):
        raise ConfigError(f"then must be 'linear' or 'ties', got {then!r}")
    if rng is None:
        raise ConfigError("dare draws masks: pass rng, a numpy.random.Generator or a seed, so that the result can be had again")
    found = check_updates(updates, weights)
    rng = numpy.random.default_rng(rng)
    device = updates[0].device
    draws = [numpy.random.default_rng(seed) for seed in rng.integers(2 ** 63, size=len(updates))]

    def keep(i: int, D: Array) -> Array:
        return D * to_device((draws[i].random(D.shape) < density) / density, device)

    merged = merge_rows(updates, found, keep, majority_sign_method if then == "ties" else None)
    return compress_dense(merged, updates[0].dtype, r or max(u.r for u in updates), None, None, exact, rng)
