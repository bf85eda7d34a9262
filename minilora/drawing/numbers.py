"""How the numbers of an array appear in a drawing: all of them where they are few, else their norm."""

from __future__ import annotations

from typing import Any

import numpy

from .. import backend
from ..stored import Stored

__all__ = ["FEW", "norm", "rows"]

Array = Any

FEW = 6  # numbers that are shown in full: a matrix of 2 x 3


def _host(array: Array) -> numpy.ndarray[Any, Any]:
    host = numpy.asarray(array) if isinstance(array, numpy.generic) else backend.to_host(array)  # 0-d arithmetic gives scalars
    return host if host.dtype.kind in "iub" else host.astype("float64")


def rows(array: Array) -> tuple[str, ...]:
    """The numbers of a small array as lines, a line for each row of a matrix; nothing for a large one.

    Examples
    --------
    >>> rows(numpy.array([[1.0, -20.0], [0.5, 3.0]]))
    ('  1 -20', '0.5   3')
    """
    if isinstance(array, Stored) or array.size > FEW:
        return ()
    if not array.size:
        return ("empty",)
    host = _host(array)
    cells = [[_digits(float(value)) if host.dtype.kind == "f" else str(value) for value in row]
             for row in host.reshape(-1, host.shape[-1] if host.ndim else 1)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return tuple(" ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells)


def _digits(value: float) -> str:
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e6 else f"{value:.4g}"


def norm(array: Array) -> str:
    """The root of the sum of squares, in digits. A sync point.

    Examples
    --------
    >>> norm(numpy.array([3.0, 4.0])), norm(numpy.array([1e200, 0.0])), norm(numpy.array([numpy.nan, numpy.inf]))
    ('5', '1e+200', 'nan')
    """
    host = numpy.abs(_host(array).astype("float64", copy=False))
    most = float(host.max(initial=0.0))  # NaN if there is one
    if most and numpy.isfinite(most):
        host /= most  # so that no square leaves the floats
        most *= float(numpy.sqrt(numpy.sum(host * host)))
    return f"{most:.3g}"
