"""One low-rank update as a value: D = s B A of one layer, kept in factors and never formed unless asked for.

Everything here costs O((out + in) r^2). The road is always the same: B = Q_B R_B and A^T = Q_A R_A with orthonormal columns
in Q, so that D = Q_B (s R_B R_A^T) Q_A^T. The core in brackets is (r, r) at most and has the singular values and the norm of D.

How exact it is. Factors are widened to float64 first: a product of two float32 numbers is then exact. Householder QR is
backward stable column by column (Higham, Accuracy and Stability of Numerical Algorithms, 2002, theorem 19.4): R_B belongs
to columns b_j + e_j with |e_j| <= c u |b_j|, u = 2^-53, c of the order of out r, in practice below 10. Hence the core is
that of an update that differs from D by E,

    ||E||_F <= c u size,        size = |s| sum_j |b_j| |a_j|,

and by Weyl and Mirsky the norm and every singular value is off by ||E||_F at most. Size does not change with a diagonal
gauge (B C, C^-1 A). Where it is far above ||D||, as for the difference of two nearly equal adapters, digits are lost: the
*relative* error is c u size / ||D||. Two float32 adapters that differ at all differ by about 2^-24, which leaves half of
the digits of float64. A norm taken as sqrt(<D, D>) would lose twice as many, since <D, D> is off by c u size^2; therefore
`norm` uses the core.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ... import ops
from ...backend import Device, device_of
from ...engine import no_grad
from ...errors import ConfigError, DeviceError, DTypeError, ShapeError, StateError
from ...tensor import Tensor
from ..gradient import delta

__all__ = ["LowRank", "core_of", "tall_svd"]

Array = Any
FLOATS = ("float16", "bfloat16", "float32", "float64")


def wide(array: Array) -> Array:
    return array.astype("float64", copy=False)


def check_factor(name: str, value: Any) -> float:
    """`value` as a float; `ConfigError` unless it is a finite number."""
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{name} must be a finite number, got {value!r}")
    return number


@dataclass(frozen=True, eq=False, repr=False)
class LowRank:
    """The update D = s B A of one layer, in factored form.

    Parameters
    ----------
    A : array or Tensor, shape (r, in)
    B : array or Tensor, shape (out, r)
        On A's device and of A's dtype: float16, bfloat16, float32 or float64. Shared, not copied, and never changed.
    s : float
        The scaling; any finite number, 0 and negative ones too.

    Raises
    ------
    ShapeError, DTypeError, DeviceError
        If A and B do not fit together.
    ConfigError
        If s is not finite.

    Notes
    -----
    `norm`, `inner` and `cosine` return Python floats: one sync point each. Nothing else leaves the device, but the
    decompositions report to the host whether they succeeded. Accuracy: see the top of this file.

    Examples
    --------
    >>> import numpy
    >>> D = LowRank(A=numpy.array([[3.0, 4.0]]), B=numpy.array([[1.0], [0.0]]), s=2.0)
    >>> D
    LowRank(out=2, in=2, r=1, s=2, float64, cpu)
    >>> D.norm(), D.inner(-D)
    (10.0, -100.0)
    """

    A: Array
    B: Array
    s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("A", "B"):
            factor = getattr(self, name)
            object.__setattr__(self, name, factor.data if isinstance(factor, Tensor) else factor)
        if device_of(self.A) is not device_of(self.B):
            raise DeviceError(f"LowRank: A is on the {device_of(self.A).name}, B on the {device_of(self.B).name}")
        if self.A.dtype != self.B.dtype or self.A.dtype.name not in FLOATS:
            raise DTypeError(f"LowRank: A is {self.A.dtype}, B is {self.B.dtype}: expected one dtype of {', '.join(FLOATS)}")
        a, b = self.A.shape, self.B.shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a + b:
            raise ShapeError(f"LowRank: expected A (r, in) and B (out, r), none of them empty, got A {a} and B {b}. "
                             "Some sources store A as (in, r): transpose it once when loading")
        object.__setattr__(self, "s", check_factor("s", self.s))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), the shape of D."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def r(self) -> int:
        """The number of columns of B; the rank of D is r at most."""
        return int(self.A.shape[0])

    @property
    def dtype(self) -> Any:
        return self.A.dtype

    @property
    def device(self) -> Device:
        return device_of(self.A)

    def dense(self) -> Array:
        """D itself, shape (out, in), in the dtype of the factors."""
        return delta(self.A, self.B, self.s)

    def apply(self, x: Array) -> Array:
        """x D^T = s (x A^T) B^T for an array x (..., in): what the update adds to a layer's output, shape (..., out)."""
        with no_grad():
            return ops.linear(ops.linear(x, self.A) * self.s, self.B).data

    def scaled(self, weight: float) -> LowRank:
        """weight D, with the same A and B."""
        return LowRank(self.A, self.B, self.s * check_factor("weight", weight))

    def __neg__(self) -> LowRank:
        return self.scaled(-1.0)

    def norm(self) -> float:
        """The Frobenius norm ||D||_F. A sync point."""
        return float(self.device.exact.linalg.norm(core_of(self, vectors=False)[0]))

    def inner(self, other: LowRank) -> float:
        """<D1, D2>, the sum of all products D1_ki D2_ki. A sync point.

        With D1_ki = s1 sum_j B1_kj A1_ji, and D2 likewise with l, the sums over k and i separate:

            <D1, D2> = s1 s2 sum_jl (B1^T B2)_jl (A1 A2^T)_jl        O((out + in) r1 r2)

        Off by at most gamma(out + in + r1 r2) size1 size2 with gamma(n) = n u / (1 - n u), u = 2^-53.

        Raises
        ------
        ShapeError, DeviceError
            If the updates belong to layers of other shapes or live on two devices.
        """
        if self.shape != other.shape:
            raise ShapeError(f"inner: updates of shapes {self.shape} and {other.shape}: they belong to different layers")
        if self.device is not other.device:
            raise DeviceError(f"inner: one update is on the {self.device.name}, the other on the {other.device.name}")
        dot = self.device.exact.dot
        outs, ins = dot(wide(self.B).T, wide(other.B)), dot(wide(self.A), wide(other.A).T)
        return self.s * other.s * float((outs * ins).sum())

    def cosine(self, other: LowRank) -> float:
        """<D1, D2> / (||D1|| ||D2||) in [-1, 1]; NaN if one of them is 0, which has no direction. Sync points."""
        product, sizes = self.inner(other), self.norm() * other.norm()
        return max(-1.0, min(1.0, product / sizes)) if sizes else math.nan

    def singular_values(self) -> Array:
        """The singular values of D, largest first, without the zeros that rank r implies.

        Returns
        -------
        array of float64, shape (min(r, out, in),), on the update's device
        """
        return self.device.exact.linalg.svd(core_of(self, vectors=False)[0], compute_uv=False)

    def svd(self) -> tuple[Array, Array, Array]:
        """D = U diag(S) V^T with k = min(r, out, in) columns, by QR of B and A^T and an SVD of the core.

        Returns
        -------
        U : array of float64, shape (out, k)
        S : array of float64, shape (k,), largest first
        Vt : array of float64, shape (k, in)
        """
        core, _, Q_B, Q_A = core_of(self)
        xp = self.device.exact
        u, S, vt = xp.linalg.svd(core, full_matrices=False)
        return xp.dot(Q_B, u), S, xp.dot(vt, Q_A.T)

    def balanced(self) -> LowRank:
        """The same D as B = U sqrt(S), A = sqrt(S) V^T, s = 1, in the factors' dtype; rank min(r, out, in).

        D fixes B and A only up to a gauge (B C, C^-1 A). Here both have the same singular values and orthogonal columns
        and rows, sorted: ||A|| = ||B||, and the size of the factors that rounding is measured by is the least possible.
        """
        return from_svd(*self.svd(), self.dtype)

    def __repr__(self) -> str:
        return f"LowRank(out={self.shape[0]}, in={self.shape[1]}, r={self.r}, s={self.s:g}, {self.dtype}, {self.device.name})"


def from_svd(U: Array, S: Array, Vt: Array, dtype: Any) -> LowRank:
    """U diag(S) V^T as balanced factors of `dtype`, with s = 1."""
    root = S ** 0.5
    return LowRank((root[:, None] * Vt).astype(dtype), (U * root).astype(dtype), 1.0)


def core_of(update: LowRank, vectors: bool = True) -> tuple[Array, Array, Array, Array]:
    """(core, size, Q_B, Q_A): D = Q_B core Q_A^T, and what its rounding is measured by (top of this file).

    Parameters
    ----------
    update : LowRank
    vectors : bool
        With False, Q_B and Q_A are not formed and come as None.

    Returns
    -------
    core : array of float64, shape (min(out, r), min(in, r))
    size : array of float64, 0-d
        |s| sum_j |b_j| |a_j|.
    Q_B, Q_A : array of float64, shapes (out, min(out, r)) and (in, min(in, r)), or None

    Raises
    ------
    StateError
        If A or B holds NaN or inf, or their product overflows float64. Found out at a sync point.
    """
    xp = update.device.exact
    A, B = wide(update.A), wide(update.B)
    if vectors:
        Q_B, R_B = xp.linalg.qr(B)
        Q_A, R_A = xp.linalg.qr(A.T)
    else:
        Q_B, R_B, Q_A, R_A = None, xp.linalg.qr(B, mode="r"), None, xp.linalg.qr(A.T, mode="r")
    core = xp.dot(R_B * update.s, R_A.T)
    if not bool(xp.isfinite(core).all()):
        bad = [name for name, factor in (("A", A), ("B", B)) if not bool(xp.isfinite(factor).all())]
        raise StateError(f"{update!r} holds NaN or inf (found in: {', '.join(bad) or 'neither factor: s B A overflows'})")
    lengths = xp.sqrt((R_B * R_B).sum(axis=0) * (R_A * R_A).sum(axis=0))
    return core, lengths.sum() * abs(update.s), Q_B, Q_A


def tall_svd(matrix: Array) -> tuple[Array, Array, Array]:
    """U (n, k), S (k,), Vt (k, m), float64, k = min(n, m), of one matrix (n, m) with n well above m: QR first."""
    xp = device_of(matrix).exact
    Q, R = xp.linalg.qr(wide(matrix))
    u, S, Vt = xp.linalg.svd(R, full_matrices=False)
    return xp.dot(Q, u), S, Vt
