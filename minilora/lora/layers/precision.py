"""Adapters beside a weight in half precision: they are float32, and only the layer's output is rounded to the weight's dtype.

In float16 a step of Adam is lost (eps = 1e-8 is 0 there) and most of a small update too. So the rule is: A, B and what else an
adapter trains have at least float32, the low-rank branch is computed there, and the sum with the frozen branch is rounded once.
Beside float32 and float64 weights nothing is cast.
"""

from __future__ import annotations

from typing import Any

import numpy

from ... import ops
from ...half import mixing
from ...tensor import Tensor

__all__ = ["beside", "in_dtype", "rounded", "trained_dtype"]


def trained_dtype(dtype: Any) -> numpy.dtype[Any]:
    """The dtype of what is trained beside a weight of this dtype: float32 for half precision, else the same.

    Examples
    --------
    >>> trained_dtype("float16"), trained_dtype("float64")
    (dtype('float32'), dtype('float64'))
    """
    return numpy.result_type(numpy.dtype(dtype), numpy.float32)


def in_dtype(x: Any, dtype: Any) -> Tensor:
    """x in this dtype: x itself if it is so already, or if it holds no floating-point numbers (ids, lists)."""
    data = x.data if isinstance(x, Tensor) else x
    kind = getattr(getattr(data, "dtype", None), "kind", "")
    return x if kind != "f" or data.dtype == dtype else ops.cast(x, dtype)


def beside(x: Any, dtype: Any) -> Tensor:
    """x for a product with a parameter of this dtype: in mixed precision as it is, for there both may meet."""
    return x if mixing.get() else in_dtype(x, dtype)


def rounded(x: Any, dtype: Any) -> Tensor:
    """x in this dtype, if that is narrower than its own: in mixed precision x is float16 beside a float32 weight, and stays."""
    return in_dtype(x, dtype) if numpy.dtype(dtype).itemsize < x.dtype.itemsize else x
