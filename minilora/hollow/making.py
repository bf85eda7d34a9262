"""New arrays without numbers. NumPy's functions come here by ``like=``, and those of the device by its module."""

from __future__ import annotations

from typing import Any

import numpy

from .answers import rule
from .array import Hollow

__all__ = ["arange", "array", "asarray", "ascontiguousarray", "empty", "full", "ones"]


@rule(numpy.empty, numpy.zeros)
def empty(shape: Any, dtype: Any = float, order: str = "C", **_: Any) -> Hollow:
    return Hollow(shape, dtype)


@rule(numpy.full)
def full(shape: Any, value: Any, dtype: Any = None, order: str = "C", **_: Any) -> Hollow:
    made = Hollow(shape, numpy.asarray(value).dtype if dtype is None else dtype)
    made.role = "constant"  # a product with it is a sum
    return made


@rule(numpy.ones)
def ones(shape: Any, dtype: Any = float, order: str = "C", **_: Any) -> Hollow:
    return full(shape, 1.0, dtype)


@rule(numpy.arange)
def arange(*bounds: Any, dtype: Any = None, **_: Any) -> Hollow:
    return Hollow(len(range(*bounds)), "int64" if dtype is None else dtype)


@rule(numpy.array, numpy.asarray)
def array(value: Any, dtype: Any = None, copy: Any = True, **_: Any) -> Hollow:
    if isinstance(value, Hollow):
        return value.astype(value.dtype if dtype is None else dtype, copy=bool(copy))
    value = numpy.asarray(value)
    return Hollow(value.shape, value.dtype if dtype is None else dtype)


def asarray(value: Any, dtype: Any = None) -> Any:
    return array(value, dtype, copy=False)


@rule(numpy.ascontiguousarray)
def ascontiguousarray(x: Any, dtype: Any = None, **_: Any) -> Any:
    return x if x.flags.c_contiguous else Hollow(x.shape, x.dtype)
