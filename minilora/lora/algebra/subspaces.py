"""Section 7 of the LoRA paper: how the subspaces of two updates overlap, and what an update amplifies.

Everything comes from the QR and core SVD of `factors`, and one product with the weight where the weight takes part. Each
result prints as a table.

Chance. Two random directions in n dimensions are not at right angles to the last digit: a fixed unit vector u and a random
one v, uniform on the sphere, have E (u^T v)^2 = 1/n, because the n squares of v's coordinates are equal in mean and sum to
1. For orthonormal U (n, i) and V (n, j), one of them in random position, the i j entries of U^T V give

    E ||U^T V||_F^2 = i j / n,        E phi(i, j) = i j / (n min(i, j)) = max(i, j) / n.

With both U (out, r) and V (in, r) random, E U U^T = (r / out) I and E V V^T = (r / in) I, so for a fixed weight W

    E ||U^T W V||_F^2 = E tr(W V V^T W^T U U^T) = r^2 ||W||_F^2 / (out in).

For the paper's W_q (12288 x 12288, norm 61.95) the root is 0.0202 at r = 4 and 0.323 at r = 64; the one random pair that
it draws for each gives 0.02 and 0.33 (table 7).

Source: Hu et al. 2021, arXiv 2106.09685, sections 7.2 and 7.3, appendices G and H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy

from ...backend import device_of, to_host
from ...errors import ConfigError, DeviceError, DTypeError, ShapeError, StateError
from ...nn.linear import check_size
from ...shown import shown
from .compress import check_sketch, noise_level, row_blocks, top_svd
from .factors import FLOATS, LowRank, core_of, tall_svd, wide
from .spectra import spectrum

__all__ = ["Amplification", "Similarity", "amplification", "expected_similarity", "subspace_similarity"]

Array = Any
SIDES = ("A", "B", "V", "U")


def expected_similarity(i: int, j: int, n: int) -> float:
    """E phi(i, j) = max(i, j) / n: what random subspaces of n dimensions share; derived at the top of this file.

    Examples
    --------
    >>> expected_similarity(4, 8, 64)
    0.125
    """
    for name, value in (("i", i), ("j", j), ("n", n)):
        check_size(name, value)
    if max(i, j) > n:
        raise ConfigError(f"a space of {n} dimensions has no subspace of {max(i, j)}")
    return max(i, j) / n


@shown
@dataclass(frozen=True, eq=False)
class Similarity:
    """phi(i, j) for all i and j.

    Attributes
    ----------
    grid : numpy.ndarray of float64, shape (rank 1, rank 2)
        phi(i, j) at [i - 1, j - 1]: 0 if the subspaces are at right angles, 1 if the smaller lies in the larger.
    n : int
        The dimension that both live in.
    of : str
        Whose singular vectors were compared.
    """

    grid: numpy.ndarray
    n: int
    of: str

    @property
    def expected(self) -> numpy.ndarray:
        """max(i, j) / n, shape as grid: what two random Gaussian matrices give in mean."""
        i, j = numpy.indices(self.grid.shape) + 1
        chance: numpy.ndarray = numpy.maximum(i, j) / self.n
        return chance

    @property
    def above_chance(self) -> numpy.ndarray:
        """(phi - expected) / (1 - expected), shape as grid: 0 at chance, 1 at containment; NaN where chance is all."""
        room = 1.0 - self.expected
        room[room == 0] = numpy.nan
        above: numpy.ndarray = (self.grid - self.expected) / room
        return above

    def __str__(self) -> str:
        def some(count: int) -> list[int]:
            return sorted({*(2 ** k for k in range(count.bit_length())), count})

        columns = some(self.grid.shape[1])
        lines = [f"phi(i, j), {self.of}, n = {self.n}; in brackets: random subspaces",
                 "   i \\ j" + "".join(f"{j:>16}" for j in columns)]
        lines += [f"{i:>8}" + "".join(f"{self.grid[i - 1, j - 1]:>8.3f} ({self.expected[i - 1, j - 1]:.3f})" for j in columns)
                  for i in some(self.grid.shape[0])]
        return "\n".join(lines)


def directions(update: LowRank, of: str) -> Array:
    """The singular vectors that `of` names, as columns (n, rank), without those of singular values that are rounding."""
    if of in ("A", "B"):
        factor = update.A.T if of == "A" else update.B
        if not bool(update.device.exact.isfinite(factor).all()):
            raise StateError(f"subspace_similarity: {of} of {update!r} holds NaN or inf")
        vectors, S, _ = tall_svd(factor)
        sigma = to_host(S)
        noise = noise_level(vectors.shape, float(sigma[0]))
    else:
        U, S, Vt = update.svd()
        vectors, sigma = (U if of == "U" else Vt.T), to_host(S)
        noise = noise_level(update.shape, float(core_of(update, vectors=False)[1]))
    rank = int((sigma > noise).sum())
    if rank == 0:
        raise StateError(f"subspace_similarity: {of} of {update!r} is 0 and has no directions. Before training B is 0: "
                         "compare A then")
    return vectors[:, :rank]


def subspace_similarity(one: LowRank, two: LowRank, of: str = "A") -> Similarity:
    """phi(i, j) = ||U1[:, :i]^T U2[:, :j]||_F^2 / min(i, j) for all i and j: how much of two updates is the same.

    Parameters
    ----------
    one, two : LowRank
        Of one layer; the ranks may differ (the paper compares r = 8 with r = 64, and two seeds).
    of : "A", "B", "V" or "U"
        The right-singular vectors of A, the paper's choice, or the left ones of B; or the right (V) or left (U) ones of D
        itself. The vectors of A depend on the gauge (B C, C^-1 A), but for the space of all of them; those of D do not.

    Returns
    -------
    Similarity

    Raises
    ------
    ConfigError, ShapeError, DeviceError
        For an unknown side, or updates that do not fit together.
    StateError
        If one of the matrices is 0, as B is before training, or holds NaN or inf.

    Examples
    --------
    >>> import numpy
    >>> one = LowRank(A=numpy.eye(4)[:2] * [[2.0], [1.0], ], B=numpy.ones((3, 2)))
    >>> two = LowRank(A=numpy.eye(4)[1:3] * [[2.0], [1.0]], B=numpy.ones((3, 2)))
    >>> subspace_similarity(one, two).grid
    array([[0. , 0. ],
           [1. , 0.5]])
    """
    if of not in SIDES:
        raise ConfigError(f"of must be one of {', '.join(SIDES)}, got {of!r}")
    axis = 1 if of in ("A", "V") else 0
    if one.shape[axis] != two.shape[axis]:
        raise ShapeError(f"subspace_similarity: updates of shapes {one.shape} and {two.shape}: {of} lives in "
                         f"{one.shape[axis]} and {two.shape[axis]} dimensions")
    if one.device is not two.device:
        raise DeviceError(f"subspace_similarity: one update is on the {one.device.name}, the other on the {two.device.name}")
    U1, U2 = directions(one, of), directions(two, of)
    squares = to_host(one.device.exact.dot(U1.T, U2)) ** 2
    i, j = numpy.indices(squares.shape) + 1
    grid = squares.cumsum(axis=0).cumsum(axis=1) / numpy.minimum(i, j)
    return Similarity(numpy.minimum(grid, 1.0), one.shape[axis], of)


@shown
@dataclass(frozen=True, eq=False)
class Amplification:
    """How strong an update is in its own directions, beside what the weight has there.

    Attributes
    ----------
    r : int
        How many directions.
    update_norm, weight_norm : float
        ||D||_F and ||W||_F.
    along_update, along_weight, along_random : float
        ||U^T W V||_F with the top r singular vectors of D, with those of W itself, and the root mean square over random ones.
    """

    r: int
    update_norm: float
    weight_norm: float
    along_update: float
    along_weight: float
    along_random: float

    @property
    def factor(self) -> float:
        """||D||_F / ||U^T W V||_F with D's own directions: the paper's amplification factor; inf if W has nothing there."""
        return self.update_norm / self.along_update if self.along_update else math.inf

    def __str__(self) -> str:
        rows = [("D, the update", self.along_update), ("W, the weight", self.along_weight), ("random", self.along_random)]
        lines = [f"||D||_F = {self.update_norm:.4g}, ||W||_F = {self.weight_norm:.4g}, r = {self.r}",
                 f"{'U, V of':<14}  {'||U^T W V||_F':>13}  {'||D||_F / it':>12}"]
        return "\n".join(lines + [f"{name:<14}  {size:>13.4g}  {self.update_norm / size if size else math.inf:>12.4g}"
                                  for name, size in rows])


def random_projection(weight_norm: float, shape: tuple[int, int], r: int) -> float:
    """The root mean square of ||U^T W V||_F over random U and V with r columns; derived at the top of this file."""
    return r * weight_norm / math.sqrt(math.prod(shape))


def amplification(update: LowRank, W: Array, r: int | None = None, *, exact: bool = True,
                  rng: numpy.random.Generator | int | None = None) -> Amplification:
    """||D||_F / ||U^T W V||_F, U and V the top r singular vectors of D; the same with W's own vectors and with random ones.

    A large factor: the update strengthens directions that the weight has but hardly uses.

    Parameters
    ----------
    update : LowRank
    W : array, shape (out, in)
        The frozen weight, on the update's device.
    r : int, optional
        How many directions; the rank of D by default, and at most that.
    exact : bool
        With False, W's own top r values come from a randomised range finder drawn by `rng`: for large layers. It finds at
        most the true values: nearly those where they fall off, 8 % less for a Gaussian W (1024, 1024) and r = 4.
    rng : numpy.random.Generator or int, optional

    Raises
    ------
    ShapeError, DTypeError, DeviceError
        If the weight does not fit the update.
    ConfigError
        For an r that is not an int >= 1, or exact=False without rng.
    StateError
        If the update is 0 or holds NaN or inf.

    Notes
    -----
    D's part is one product with W in row blocks, 2 out in r. W's own vectors are an SVD of W in float64, by far the
    largest cost. ||U_W^T W V_W||_F is the root of the sum of its r largest squared singular values. The random line is the
    root mean square, r ||W||_F / sqrt(out in), derived at the top of this file, not one draw.

    Examples
    --------
    >>> import numpy
    >>> D = LowRank(A=numpy.array([[0.0, 6.0]]), B=numpy.array([[0.0], [1.0]]))
    >>> print(amplification(D, numpy.diag([4.0, 3.0])))
    ||D||_F = 6, ||W||_F = 5, r = 1
    U, V of         ||U^T W V||_F  ||D||_F / it
    D, the update               3             2
    W, the weight               4           1.5
    random                    2.5           2.4
    """
    if r is not None:
        check_size("r", r)
    check_sketch(exact, 1, rng)
    device = update.device
    if device_of(W) is not device:
        raise DeviceError(f"amplification: the update is on the {device.name}, W on the {device_of(W).name}")
    if W.shape != update.shape or W.dtype.name not in FLOATS:
        kind = ShapeError if W.shape != update.shape else DTypeError
        raise kind(f"amplification: expected a weight {update.shape} of one of {', '.join(FLOATS)}, got {W.shape} {W.dtype}")
    xp, used = device.exact, spectrum(update)
    if used.rank == 0:
        raise StateError(f"amplification: {update!r} is 0 and has no directions: before training B is 0")
    k = min(used.rank, used.rank if r is None else int(r))
    U, _, Vt = update.svd()
    inside = sum(xp.dot(U[rows, :k].T, xp.dot(wide(W[rows]), Vt[:k].T)) for rows in row_blocks(update.shape))
    weight_norm = math.hypot(*(float(xp.linalg.norm(wide(W[rows]))) for rows in row_blocks(update.shape)))
    if not math.isfinite(weight_norm):
        raise StateError(f"amplification: W {W.shape} holds NaN or inf")
    own = to_host(xp.linalg.svd(wide(W), compute_uv=False) if exact else top_svd(wide(W), k, False, rng)[1])[:k]
    return Amplification(k, used.norm, weight_norm, float(xp.linalg.norm(inside)), float(numpy.sqrt((own ** 2).sum())),
                         random_projection(weight_norm, update.shape, k))
