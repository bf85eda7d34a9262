"""Fewer ranks for an update, and a low-rank update for a dense difference; each with the error that it costs.

By Eckart, Young and Mirsky the nearest matrix of rank k, in the Frobenius norm, is the SVD cut after k values, and its
distance is sqrt(sigma_{k+1}^2 + sigma_{k+2}^2 + ...). `recompress` has all singular values from the factors' small core and
forms no (out, in) array. `extract` starts from one, and measures its error on it, entry by entry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Iterator

import numpy

from ...backend import device_of, to_device, to_host
from ...errors import ConfigError, DeviceError, DTypeError, ShapeError, StateError
from ...nn.linear import check_size
from ...shown import shown
from ..gradient import delta
from .factors import FLOATS, LowRank, core_of, from_svd, tall_svd, wide

__all__ = ["Compressed", "extract", "recompress"]

Array = Any
EPS = 2.0 ** -52
BLOCK = 1 << 18  # elements of a row block: 2 MiB of float64
OVERSAMPLE, POWER_STEPS = 8, 2


@shown
@dataclass(frozen=True, eq=False)
class Compressed:
    """An update of lower rank, and how far it is from what it stands for.

    Attributes
    ----------
    update : LowRank
        Balanced, s = 1, in the source's dtype.
    error : float
        ||D - D'||_F.
    rounding : float
        `error` is exact up to this: rounding in float64, and of D' to its dtype, which `recompress` leaves out of `error`.
    norm : float
        ||D||_F of the source.
    singular_values : numpy.ndarray of float64
        Of the source, largest first; with ``exact=False`` those that were looked for.
    """

    update: LowRank
    error: float
    rounding: float
    norm: float
    singular_values: numpy.ndarray

    @property
    def relative_error(self) -> float:
        """error / norm; 0 for a zero source."""
        return self.error / self.norm if self.norm else 0.0

    @property
    def energy(self) -> float:
        """The kept part of ||D||_F^2, in [0, 1]; 1 for a zero source."""
        return max(0.0, 1.0 - self.relative_error ** 2)

    def __str__(self) -> str:
        return (f"rank {self.update.r}: error {self.error:.4g} of norm {self.norm:.4g} ({self.relative_error:.3%}), "
                f"energy kept {self.energy:.6f}")


def check_target(r: int | None, energy: float | None, tolerance: float | None) -> None:
    if r is not None:
        check_size("r", r)
    for name, value, span in (("energy", energy, "(0, 1]"), ("tolerance", tolerance, "[0, 1)")):
        if value is None:
            continue
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1 or value == (0 if name == "energy" else 1):
            raise ConfigError(f"{name} must be a number in {span}, got {value!r}")


def check_sketch(exact: bool, r: int | None, rng: Any) -> None:
    if not exact and (r is None or rng is None):
        raise ConfigError(f"exact=False needs r, the largest rank wanted, and rng, a generator or seed: got r={r}, rng={rng}")


def choose_rank(sigma: numpy.ndarray, rest: float, noise: float, r: int | None, energy: float | None,
                tolerance: float | None) -> int:
    """The fewest values that meet `energy` and `tolerance`, at most r, at least 1, and none that is rounding (<= noise).

    `rest` is the squared norm that is not in `sigma`. Tails are summed from the small end, so that they keep their digits.
    """
    tails = numpy.append(numpy.cumsum(sigma[::-1] ** 2)[::-1], 0.0) + rest  # tails[k]: the squared error of keeping k
    allowed = min(1.0 if energy is None else 1.0 - energy, 1.0 if tolerance is None else tolerance ** 2) * tails[0]
    wanted = len(sigma)
    if energy is not None or tolerance is not None:
        wanted = int(numpy.argmax(tails <= allowed)) if tails[-1] <= allowed else len(sigma)
    return max(1, min(wanted, int((sigma > noise).sum()), len(sigma) if r is None else r))


def noise_level(shape: tuple[int, int], size: float) -> float:
    """Singular values up to this are rounding; `size` as in `factors`. Seen: 3 eps size for a norm, so this has room."""
    return EPS * (10 + max(shape)) * size


def storage_rounding(sigma: numpy.ndarray, dtype: Any) -> float:
    """Bound on the change of U S V^T when U sqrt(S) and sqrt(S) V^T are rounded: (2 v + v^2) sqrt(sigma_1 sum sigma).

    |dB| <= v |B| entry by entry, and ||B||_F^2 = sum sigma, ||A||_2^2 = sigma_1; likewise for A. v is the unit roundoff.
    """
    v = {"float16": 2.0 ** -11, "bfloat16": 2.0 ** -8, "float32": 2.0 ** -24, "float64": 2.0 ** -53}[dtype.name]
    return (2 * v + v * v) * math.sqrt(float(sigma[0]) * float(sigma.sum()))


def recompress(update: LowRank, *, r: int | None = None, energy: float | None = None,
               tolerance: float | None = None) -> Compressed:
    """The nearest update of lower rank, from the factors alone, with its error.

    Parameters
    ----------
    update : LowRank
    r : int, optional
        At most this rank. It wins over the other two; `Compressed` says what was reached.
    energy : float in (0, 1], optional
        Keep at least this part of ||D||_F^2.
    tolerance : float in [0, 1), optional
        Lose at most this part of ||D||_F.

    Returns
    -------
    Compressed
        With error = sqrt(sum of the squares of the dropped singular values): no update of that rank is nearer. Without any
        target only what is rounding is dropped; the rank is never above the numerical rank, nor below 1.

    Raises
    ------
    ConfigError
        For a target outside its range.
    StateError
        If the update holds NaN or inf.

    Notes
    -----
    O((out + in) r^2) time, O((out + in) r) memory. The singular values are moved to the host, r numbers, to choose the rank.

    Examples
    --------
    >>> import numpy
    >>> D = LowRank(A=numpy.diag([4.0, 3.0, 0.0]), B=numpy.eye(3))
    >>> small = recompress(D, r=1)
    >>> small.update.r, small.error, small.norm
    (1, 3.0, 5.0)
    >>> recompress(D).update.r
    2
    """
    check_target(r, energy, tolerance)
    xp = update.device.exact
    core, size, Q_B, Q_A = core_of(update)
    u, S, vt = xp.linalg.svd(core, full_matrices=False)
    sigma = to_host(S)  # sync point: r numbers
    noise = noise_level(update.shape, float(size))
    k = choose_rank(sigma, 0.0, noise, r, energy, tolerance)
    # LAPACK's SVD keeps the values to a few eps, but left 50 eps in U S V^T of cores whose columns differ 1e6 in length.
    rounding = 100 * EPS * float(size) + noise + storage_rounding(sigma[:k], update.dtype)
    small = from_svd(xp.dot(Q_B, u[:, :k]), S[:k], xp.dot(vt[:k], Q_A.T), update.dtype)
    return Compressed(small, float(numpy.sqrt((sigma[k:] ** 2).sum())), rounding, float(numpy.sqrt((sigma ** 2).sum())), sigma)


def row_blocks(shape: tuple[int, int]) -> Iterator[slice]:
    """Slices that cut the rows of an (out, in) array into blocks of about `BLOCK` elements."""
    rows = max(1, BLOCK // shape[1])
    return (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


def top_svd(M: Array, k: int | None, exact: bool, rng: numpy.random.Generator | int | None) -> tuple[Array, Array, Array]:
    """The SVD of a dense M (out, in) in float64: all of it, or about its first k + 8 values by a randomised range finder.

    The range finder draws Omega (in, k + 8) on the host, and orthonormalises M Omega, then twice M^T Q and M Q: a power
    step multiplies the gap between wanted and unwanted values by itself. Then M ~ Q (Q^T M). O(out in k), not O(out in
    min(out, in)). Source: Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    device = device_of(M)
    xp = device.exact
    if exact:
        return xp.linalg.svd(M, full_matrices=False)  # type: ignore[no-any-return]
    width = min((k or 0) + OVERSAMPLE, *M.shape)
    omega = numpy.random.default_rng(rng).standard_normal((M.shape[1], width))
    Q = xp.linalg.qr(xp.dot(M, to_device(omega, device)))[0]
    for _ in range(POWER_STEPS):
        Q = xp.linalg.qr(xp.dot(M.T, Q))[0]
        Q = xp.linalg.qr(xp.dot(M, Q))[0]
    V, S, ut = tall_svd(xp.dot(M.T, Q))
    return xp.dot(Q, ut.T), S, V.T


def compress_dense(M: Array, dtype: Any, r: int | None, energy: float | None, tolerance: float | None, exact: bool,
                   rng: numpy.random.Generator | int | None) -> Compressed:
    """M (out, in), float64, as an update of `dtype`; the error is measured on M and includes the rounding to `dtype`."""
    xp = device_of(M).exact
    norm = float(xp.linalg.norm(M))  # sync point
    if not math.isfinite(norm):
        raise StateError("the matrix to factor holds NaN or inf, or its norm overflows")
    U, S, Vt = top_svd(M, r, exact, rng)
    sigma = to_host(S)
    rest = 0.0 if exact else max(0.0, norm ** 2 - float((sigma ** 2).sum()))
    noise = noise_level(M.shape, norm)
    k = choose_rank(sigma, rest, noise, r, energy, tolerance)
    update = from_svd(U[:, :k], S[:k], Vt[:k], dtype)
    A, B = wide(update.A), wide(update.B)
    parts = [xp.linalg.norm(M[rows] - delta(A, B[rows], update.s)) for rows in row_blocks(M.shape)]
    return Compressed(update, math.hypot(*map(float, parts)), noise, norm, sigma)


def extract(W_tuned: Array, W_base: Array, r: int | None = None, energy: float | None = None, *,
            tolerance: float | None = None, exact: bool = True, rng: numpy.random.Generator | int | None = None) -> Compressed:
    """The update that leads from one weight to another: W_tuned - W_base at low rank.

    Parameters
    ----------
    W_tuned, W_base : array, shape (out, in)
        Of one dtype, on one device.
    r, energy, tolerance
        As in `recompress`.
    exact : bool
        With False, a randomised range finder with two power steps looks for the first r singular values only, for large
        layers; `rng` draws its test matrix on the host. The error is measured, so it is as certain as with True.
    rng : numpy.random.Generator or int, optional

    Returns
    -------
    Compressed
        Its error includes the rounding of the factors to the weights' dtype.

    Raises
    ------
    ShapeError, DTypeError, DeviceError
        If the weights are not two matrices of one kind.
    ConfigError
        For a target outside its range, or exact=False without r and rng.
    StateError
        If the difference holds NaN or inf.

    Notes
    -----
    Works in float64: beside the weights, the difference, 8 out in bytes, and with exact=True U and V of
    8 min(out, in) (out + in) bytes and LAPACK's workspace.

    Examples
    --------
    >>> import numpy
    >>> base = numpy.zeros((4, 3), "float32")
    >>> found = extract(base + numpy.float32(2.0), base, energy=0.999)
    >>> print(found)
    rank 1: error ... of norm 6.928 (0.000%), energy kept 1.000000
    """
    check_target(r, energy, tolerance)
    check_sketch(exact, r, rng)
    device = device_of(W_tuned)
    if device is not device_of(W_base):
        raise DeviceError(f"extract: W_tuned is on the {device.name}, W_base on the {device_of(W_base).name}")
    if W_tuned.ndim != 2 or W_tuned.shape != W_base.shape or 0 in W_tuned.shape:
        raise ShapeError(f"extract: expected two weights (out, in) of one shape, got {W_tuned.shape} and {W_base.shape}")
    if W_tuned.dtype != W_base.dtype or W_tuned.dtype.name not in FLOATS:
        raise DTypeError(f"extract: expected two weights of one of {', '.join(FLOATS)}, got {W_tuned.dtype} and {W_base.dtype}")
    difference = W_tuned.astype("float64")
    difference -= W_base
    return compress_dense(difference, W_tuned.dtype, r, energy, tolerance, exact, rng)
