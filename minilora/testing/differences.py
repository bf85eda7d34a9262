"""Numerical derivatives: the complex step, central differences, and what is wrong where neither can be trusted."""

from __future__ import annotations

import sys
from typing import Any

from numpy.exceptions import ComplexWarning

from ..errors import ConfigError
from .point import Point, contract

__all__ = ["MODES", "Slope"]

Array = Any

EPS = sys.float_info.epsilon
H_COMPLEX = 1e-30
H_CENTRAL = EPS ** (1.0 / 3.0)

# The default tolerances. The complex step has no truncation error to speak of (h^2 = 1e-60) and subtracts nothing: what
# is left is the rounding of f itself. A central difference is off by h^2 f'''/6 + eps |f| / h: 1e-11 to 1e-10 at this h
# for values of order 1, and 1e-6 leaves room for third derivatives in the thousands.
MODES = {"complex": ("complex step", 1e-9), "central": ("central differences", 1e-6)}


class Slope:
    """Derivatives of L = sum(cotangent f) along a direction in one leaf.

    Attributes
    ----------
    noise : float
        What rounding alone can make of such a derivative.
    """

    def __init__(self, point: Point, cotangent: Array, mode: str, rtol: float) -> None:
        self.point, self.cotangent, self.mode, self.rtol = point, cotangent, mode, rtol
        self.y = point.at({})
        size = float(abs(cotangent * self.y).sum())
        self.central_noise = 16.0 * EPS * size / H_CENTRAL
        self.noise = 64.0 * EPS * size if mode == "complex" else self.central_noise

    def __call__(self, leaf: int, v: Array) -> float:
        return self.complex_step(leaf, v) if self.mode == "complex" else self.central(leaf, v)

    def complex_step(self, leaf: int, v: Array) -> float:
        """Im L(x + i h v) / h. Nothing is subtracted, so h may be so small that h^2 vanishes beside 1."""
        return contract(self.cotangent, self.complex_output({leaf: (1j * H_COMPLEX) * v}).imag) / H_COMPLEX

    def complex_output(self, shifts: dict[int, Array]) -> Array:
        """f's output for complex leaves.

        Raises
        ------
        ConfigError
            If f cannot be computed with complex numbers.
        """
        try:
            y = self.point.at(shifts, "complex128")
        except (TypeError, ComplexWarning) as error:  # it ran in float64 a moment ago: complex numbers are the cause
            raise ConfigError(
                "gradcheck: f cannot be computed with complex numbers. If it closes over real tensors of its own, such "
                "as a target or a frozen weight, hand them over too: as inputs, or as parameters=[...] (a Tensor or a "
                "frozen Parameter there is converted but not checked). If an operation in it exists for real numbers "
                "only, use mode='central'. It failed with: "
                + "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])) from error
        if y.dtype.kind != "c":
            raise ConfigError(f"gradcheck: with complex inputs f still gives {y.dtype}: it takes the real part, the "
                              "absolute value or a comparison on the way, or it uses none of its inputs. "
                              "Use mode='central'")
        return y

    def central(self, leaf: int, v: Array, part: float = 1.0) -> float:
        """(L(x + h v) - L(x - h v)) / 2h, with the h that was really added after rounding."""
        x = self.point.start[leaf]
        h = part * self._step(leaf, v)
        plus, minus = (x + h * v) - x, (x - h * v) - x
        length = contract(plus - minus, v) / contract(v, v)
        return contract(self.cotangent, self.point.at({leaf: plus}) - self.point.at({leaf: minus})) / length

    def _step(self, leaf: int, v: Array) -> float:
        size, reach = abs(self.point.start[leaf][v != 0]).max(), abs(v).max()
        return float(H_CENTRAL * max(1.0, size) / reach)

    def bend(self, leaf: int, v: Array, part: float = 1.0) -> tuple[float, float]:
        """The slopes on the left and on the right of the point."""
        h = part * self._step(leaf, v)
        right = contract(self.cotangent, self.point.at({leaf: h * v}) - self.y) / h
        left = contract(self.cotangent, self.y - self.point.at({leaf: -h * v})) / h
        return left, right

    def objection(self, leaf: int, v: Array, numerical: float) -> tuple[str, bool]:
        """Why `numerical`, found along `v`, cannot be trusted (empty if it can), and whether the reason is a kink.

        With half the step, a smooth function shows nearly the same central difference, and left and right slopes that
        differ by half as much. At a kink they differ by as much as before; with a kink a little aside, the central
        difference itself changes. The complex step goes nowhere, so that only a kink at the point itself disturbs it:
        there the steps tried are 512 times smaller, and accordingly less exact.
        """
        part, sharp = (2.0 ** -9, 1e-3) if self.mode == "complex" else (1.0, 0.5 * self.rtol)
        whole, half = self.central(leaf, v, part), self.central(leaf, v, 0.5 * part)
        left, right = self.bend(leaf, v, part)
        left_half, right_half = self.bend(leaf, v, 0.5 * part)
        scale, noise = max(map(abs, (whole, half, left, right))), self.central_noise / part
        bend, bend_half = abs(right - left), abs(right_half - left_half)
        if abs(whole - half) > max(sharp * scale, noise) or bend_half > max(1e-3 * scale, 4.0 * noise, 0.75 * bend):
            return f"kink near: slope {left:.6g} on the left, {right:.6g} on the right", True
        if abs(whole - numerical) > max(1e-3 * scale, 4.0 * noise):
            return (f"not analytic: central differences give {whole:.9g}. f may use abs, conj, norm or a comparison, "
                    "which the complex step cannot see through: use mode='central'"), False
        return "", False
