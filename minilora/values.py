"""From what a user writes to NumPy: numbers, and host arrays. No devices here."""

from __future__ import annotations

from typing import Any

import numpy

from .errors import DTypeError

__all__ = ["check_kind", "host_array", "no_array", "number", "types_in"]

_PYTHON = {float, int, bool}
_NUMERIC = "fiubc"  # dtype kinds: floating-point, integers, booleans, complex


def number(x: Any) -> Any:
    """A NumPy scalar (or a bool, or the size of a tensor) as a Python number, which promotes no dtype; anything else as it is.

    A 0-d array stays an array: it was made as one, and has a dtype of its own.

    Examples
    --------
    >>> number(numpy.float64(0.5)), number(numpy.int64(2)), number(numpy.array(2.0))
    (0.5, 2, array(2.))
    """
    if isinstance(x, numpy.floating):
        return float(x)
    return int(x) if isinstance(x, (numpy.integer, numpy.bool_, int)) else x


def types_in(value: Any) -> set[type]:
    """The types of the entries of nested lists and tuples; of anything else its own type."""
    if not isinstance(value, (list, tuple)):
        return {type(value)}
    kinds = set(map(type, value))
    if any(issubclass(kind, (list, tuple)) for kind in kinds):
        kinds = set().union(*map(types_in, value))
    return kinds


def check_kind(kind: type) -> None:
    """Raise `DTypeError` for a type of array that computes otherwise than an array, with the line that makes it one."""
    if issubclass(kind, numpy.matrix):
        raise DTypeError("expected an array, got numpy.matrix, whose * is a matrix product: convert it with "
                         "numpy.asarray(value)")
    if issubclass(kind, numpy.ndarray) and hasattr(kind, "filled"):  # not isinstance: that would import numpy.ma
        raise DTypeError(f"expected an array, got {kind.__name__}, whose mask would be lost: put numbers in the place of what "
                         "is masked with value.filled(0.0)")


def no_array(kind: type) -> DTypeError:
    """The error for a value of another type where a raw array is wanted, with the line that helps, if one does."""
    if hasattr(kind, "node"):
        cure = ": pass the array that it holds, tensor.data"
    elif hasattr(kind, "__array__") or issubclass(kind, (list, tuple, int, float, complex)):
        cure = ": convert it with minilora.tensor(value)"
    else:
        cure = ""
    return DTypeError(f"expected an array, got {kind.__name__}{cure}")


def host_array(value: Any, dtype: Any = None, copy: bool = False) -> numpy.ndarray:
    """A value as a plain `numpy.ndarray`: Python's floats as float32, whatever has a dtype in its own.

    Raises
    ------
    DTypeError
        If the value makes no array of numbers.
    """
    kinds = types_in(value)
    for kind in kinds:
        check_kind(kind)
    try:
        host = numpy.array(value, copy=True if copy else None)
    except ValueError as error:
        raise DTypeError(f"{type(value).__name__} makes no array: {error}") from error
    # before any conversion: NumPy would read the text "1.5" as a number, and None as NaN
    if host.dtype.kind not in _NUMERIC:
        raise DTypeError(f"expected numbers, got {type(value).__name__} that makes an array of dtype {host.dtype}")
    if dtype is None:
        return host.astype(numpy.float32) if host.dtype == numpy.float64 and kinds <= _PYTHON else host
    if numpy.dtype(dtype).kind not in _NUMERIC:
        raise DTypeError(f'expected a dtype of numbers, such as "float32", got {dtype!r}')
    return host.astype(dtype, copy=False)
