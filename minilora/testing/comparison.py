"""Two arrays side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy

from .. import backend
from ..tensor import Tensor
from .guesses import guess, relative_errors, transposed
from .reports import Verdict

__all__ = ["Comparison", "compare"]

Array = Any


@dataclass(frozen=True)
class Comparison(Verdict):
    """What `compare` found. True if the arrays agree within the tolerance; ``str(comparison)`` is one line.

    Attributes
    ----------
    name : str
    passed : bool
        Whether `relative` is at most `rtol`.
    exact : bool
        Whether all elements are equal.
    max_abs, relative : float
        The largest absolute and the largest relative difference; inf if the shapes differ.
    rtol : float
    index : tuple of int
        The worst element; empty if the shapes differ.
    mine, reference : float
        Both values there.
    guess : str
        What may be wrong; empty if passed.
    """

    name: str
    passed: bool
    exact: bool
    max_abs: float
    relative: float
    rtol: float
    index: tuple[int, ...] = ()
    mine: float = float("nan")
    reference: float = float("nan")
    guess: str = ""

    @property
    def approximately(self) -> bool:
        """The same as `passed`."""
        return self.passed

    def __str__(self) -> str:
        line = (f"{self.name:<12} exact: {_yes(self.exact)}  approximately: {_yes(self.passed)}  "
                f"max abs diff: {self.max_abs:.3g}  relative: {self.relative:.3g}")
        if self.passed:
            return line
        return f"{line}  at {self.index}: {self.mine:.9g}, reference {self.reference:.9g}  FAILED: {self.guess}"


def _yes(fact: bool) -> str:
    return "yes" if fact else "no "


def compare(name: str, mine: Any, reference: Any, rtol: float | None = None) -> Comparison:
    """Compare two arrays, element by element.

    Parameters
    ----------
    name : str
        For the report.
    mine, reference : Tensor or array, on any device
    rtol : float, optional
        Default: eps^(2/3) of the coarser dtype, two thirds of its digits (4e-11 in float64, 2e-5 in float32); 0 for
        integers.

    Returns
    -------
    Comparison

    Notes
    -----
    The relative difference is abs(m - r) / max(abs(m), abs(r), floor), with a thousandth of the largest value as the
    floor. NaN equals NaN here; NaN differs from everything else by inf.

    Examples
    --------
    >>> import numpy
    >>> from minilora import testing
    >>> right = numpy.arange(6.0).reshape(2, 3)
    >>> bool(testing.compare("dA", right * (1 + 1e-14), right))
    True
    >>> testing.compare("dA", right / 2, right).guess
    'reference / mine = 2.000 everywhere: a missing factor 2?'
    """
    a, b = _host(mine), _host(reference)
    if rtol is None:
        floats = [x.dtype for x in (a, b) if x.dtype.kind in "fc"]
        rtol = max((float(numpy.finfo(d).eps) for d in floats), default=0.0) ** (2.0 / 3.0)
    if a.shape != b.shape:
        text = f"shapes differ: {a.shape}, reference {b.shape}"
        if a.shape == b.shape[::-1] and compare(name, a.T, b, rtol):
            text += ": equals the transpose"
        return Comparison(name, False, False, float("inf"), float("inf"), rtol, guess=text)
    if not a.size:
        return Comparison(name, True, True, 0.0, 0.0, rtol)
    exact = bool(numpy.array_equal(a, b, equal_nan=a.dtype.kind in "fc" and b.dtype.kind in "fc"))
    wide = numpy.result_type(a, b, numpy.float64)  # unsigned integers and float16 would overflow in a difference
    a, b = a.astype(wide), b.astype(wide)
    errors = relative_errors(a, b)
    with numpy.errstate(all="ignore"):
        difference = numpy.where(errors == 0.0, 0.0, abs(a - b))
    index = tuple(map(int, numpy.unravel_index(int(errors.argmax()), a.shape)))
    passed = bool(errors[index] <= rtol)
    text = ""
    if not passed:
        turned = transposed(a)
        text = guess(a.reshape(-1), b.reshape(-1), errors.reshape(-1) > rtol,
                     None if turned is None else turned.reshape(-1), ratio="reference / mine")
    largest = float(numpy.nan_to_num(difference, nan=numpy.inf).max())
    return Comparison(name, passed, exact, largest, float(errors[index]), rtol, index, float(a[index].real),
                      float(b[index].real), text)


def _host(array: Any) -> Array:
    if isinstance(array, Tensor):
        array = array.data
    if isinstance(array, (list, tuple, int, float, numpy.generic)):
        return numpy.asarray(array)
    return backend.to_host(array)
