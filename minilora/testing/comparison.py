"""Two arrays side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy

from .. import backend, complaints
from ..shown import shown
from ..tensor import Tensor
from .evidence import Difference, Known, relative_errors
from .guesses import guess
from .reports import Verdict, paragraph

__all__ = ["Comparison", "compare"]

Array = Any


@shown
@dataclass(frozen=True)
class Comparison(Verdict):
    """What `compare` found. True if the arrays agree within the tolerance; ``str(comparison)`` is one line, and more if not.

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
        line = (f"{self.name:<10} exact: {_yes(self.exact)}  approximately: {_yes(self.passed)}  "
                f"max diff: {self.max_abs:.1e}  relative: {self.relative:.1e}")
        if self.passed:
            return line
        differ = self.guess.startswith("shapes differ")
        values = "" if differ else f" at {self.index}: {self.mine:.9g}, reference {self.reference:.9g}"
        return "\n".join([line, *paragraph(f"FAILED{values}: {self.guess}")])


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
        return Comparison(name, False, False, float("inf"), float("inf"), rtol, guess=text + _misfit(a, b, rtol))
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
    text = "" if passed else _why(name, a, b, errors > rtol)
    largest = float(numpy.nan_to_num(difference, nan=numpy.inf).max())
    return Comparison(name, passed, exact, largest, float(errors[index]), rtol, index, float(a[index].real),
                      float(b[index].real), text)


def _why(name: str, a: Array, b: Array, wrong: Array) -> str:
    if a.dtype.kind != "c":
        lengths = [(n, f"the length of axis {axis}") for axis, n in enumerate(a.shape)]
        lengths += [(a.size, "the number of elements")]
        return guess(Difference(name, a, b.reshape(-1), wrong.reshape(-1)), Known(lengths=lengths, ratio="reference / mine"))
    if (b == a.conj()).all():
        return "equals the complex conjugate"
    for part, of, other, same in (("real", numpy.real, numpy.imag, "imaginary"), ("imaginary", numpy.imag, numpy.real, "real")):
        if (other(a) == other(b)).all():
            return f"the {same} parts are equal, the {part} ones not: {_why(name, of(a), of(b), wrong)}"
    return f"wrong in {int(wrong.sum())} of {wrong.size}"


def _misfit(a: Array, b: Array, rtol: float) -> str:
    """What may have happened to an array of another shape than its reference; the values may tell."""
    if a.shape == b.shape[::-1] and compare("", a.T, b, rtol):
        return ": equals the transpose"
    if a.size == b.size and compare("", a.reshape(b.shape), b, rtol):
        return f": reshape it to {b.shape}, and it is equal"
    found = complaints.summed(a.shape, b.shape)  # where b was stretched to a, or else an axis that a has more than b
    for axes in ([sum(found, ())] if found else []) + [(k,) for k in range(a.ndim) if a.shape[:k] + a.shape[k + 1:] == b.shape]:
        if _sums(a, axes, b, rtol):
            return f": summed over {_named(axes)} it is equal"
    if (lost := complaints.summed(b.shape, a.shape)) is not None:
        axes = sum(lost, ())
        if _sums(b, axes, a, rtol):
            return f": it is the sum of the reference over {_named(axes)}: leave that sum out"
        return (f": {_named(axes)} of the reference is not there: was it summed away, or is one number meant for several "
                "elements?")
    hint = complaints.misfit(a.shape, b.shape)
    return f": {hint}" if hint else ""


def _sums(large: Array, axes: tuple[int, ...], small: Array, rtol: float) -> bool:
    """Whether one array, summed over axes, is the other."""
    with numpy.errstate(all="ignore"):
        total = large.sum(axis=axes, keepdims=True).reshape(small.shape)
    return bool(compare("", total, small, max(rtol, 1e-9)))


def _named(axes: tuple[int, ...]) -> str:
    return f"{'axis' if len(axes) == 1 else 'axes'} {', '.join(map(str, axes))}"


def _host(array: Any) -> Array:
    if isinstance(array, Tensor):
        array = array.data
    if isinstance(array, (list, tuple, int, float, numpy.generic)):
        return numpy.asarray(array)
    return backend.to_host(array)
