"""The Taylor test: is g the gradient? A check that needs no tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy

from ..errors import ConfigError
from ..shown import shown
from ..tensor import Tensor
from .differences import EPS
from .point import Point, contract
from .promises import draw_cotangent
from .reports import Verdict, table

__all__ = ["TaylorReport", "taylor_test"]

STEPS = tuple(2.0 ** -k for k in range(4, 13))
LOW, HIGH = 1.9, 2.1


@shown
@dataclass(frozen=True)
class TaylorReport(Verdict):
    """What `taylor_test` found. True if passed; ``str(report)`` is a table, ``report.check()`` raises if not passed.

    Attributes
    ----------
    passed : bool
    h, R : tuple of float
        Steps, and what the linear prediction leaves unexplained at each.
    slopes : tuple of float
        log2(R(h) / R(h / 2)) from each step to the next; NaN where R is nothing but rounding.
    slope : float
        Median of the last three slopes that are not NaN; NaN if there is none.
    note : str
    """

    passed: bool
    h: tuple[float, ...]
    R: tuple[float, ...]
    slopes: tuple[float, ...]
    slope: float
    note: str

    def __str__(self) -> str:
        head = f"Taylor test {'passed' if self.passed else 'FAILED'}: {self.note}"
        slopes = ["", *("-" if math.isnan(slope) else f"{slope:.3f}" for slope in self.slopes)]
        return "\n".join([head, *table(("h", "R(h)", "slope"), [
            (f"2^{round(math.log2(h))}", f"{R:.3e}", slope) for h, R, slope in zip(self.h, self.R, slopes)])])


def taylor_test(f: Callable[..., Tensor], *inputs: Any, parameters: Iterable[Any] = (),
                rng: numpy.random.Generator | None = None) -> TaylorReport:
    """Test whether the gradient g of L = sum(c f), c a random cotangent, predicts L along a random direction v.

    R(h) = abs(L(x + h v) - L(x) - h <g, v>) is what remains after the linear prediction. If g is the gradient, this is
    h^2 v^T H v / 2 + O(h^3): it falls by 4 when h is halved, slope 2. If g is wrong, a part h <error, v> remains, and
    the slope goes to 1. No tolerance has to be chosen, and all leaves are tested at once.

    Parameters
    ----------
    f, inputs, parameters, rng
        As in `gradcheck`.

    Returns
    -------
    TaylorReport

    Raises
    ------
    ConfigError
        If there is nothing to check.
    DTypeError
        If an input or trainable parameter is not float64.

    Notes
    -----
    v has length 1 over all leaves together, h runs from 2^-4 to 2^-12. Judged is the median of the last three slopes
    above rounding, which must lie in [1.9, 2.1]. Two cases pass with a note: f is linear along v, and all R are
    rounding; or f bends so little along v that R falls faster than h^2.

    Examples
    --------
    >>> import numpy, minilora
    >>> from minilora import ops, testing
    >>> x = numpy.random.default_rng(0).standard_normal((5, 3))
    >>> report = testing.taylor_test(ops.softmax, x)
    >>> report.passed, round(report.slope, 1)
    (True, 2.0)
    """
    rng = numpy.random.default_rng(0) if rng is None else rng
    with Point(f, inputs, parameters) as point:
        if not point.leaves:
            raise ConfigError("taylor_test: nothing to check: give inputs, or parameters of which one is trainable")
        y = point.output()
        host, cotangent = draw_cotangent(y, rng)
        gradients = point.gradients(y, cotangent)
        point.undo_changes()
        v = [rng.standard_normal(leaf.shape) for _, leaf in point.leaves]
        length = math.sqrt(sum(float((part * part).sum()) for part in v)) or 1.0
        v = [part / length for part in v]
        slope = sum(contract(part, dx) for part, dx in zip(v, gradients) if dx is not None)
        at_point = point.at({})
        R = [abs(contract(host, point.at({i: h * part for i, part in enumerate(v)}) - at_point) - h * slope)
             for h in STEPS]
        rounding = 16.0 * EPS * float(abs(host * at_point).sum())
    return _judge(tuple(R), rounding)


def _judge(R: tuple[float, ...], rounding: float) -> TaylorReport:
    slopes = tuple(math.log2(a / b) if b > rounding and a > rounding else math.nan for a, b in zip(R, R[1:]))
    usable = [slope for slope in slopes if not math.isnan(slope)][-3:]
    if not all(map(math.isfinite, R)):
        return TaylorReport(False, STEPS, R, slopes, math.nan, "L is not finite near this point")
    if not usable:
        return TaylorReport(True, STEPS, R, slopes, math.nan, "f is linear along v, R is rounding only")
    slope = float(numpy.median(usable))
    if slope < LOW:
        cause = "g is not the gradient" if slope < 1.5 else "g is wrong, or a kink is near"
        note = f"slope {slope:.2f}, not 2: {cause}"
    elif slope > HIGH:
        note = f"slope {slope:.2f}: R falls faster than h^2, since f hardly bends along v"
    else:
        note = f"slope {slope:.2f}"
    return TaylorReport(slope >= LOW, STEPS, R, slopes, slope, note)
