"""Products of arrays without numbers: their shapes, their FLOPs, and the copies that BLAS wants."""

from __future__ import annotations

import math
from typing import Any

import numpy

from .answers import dtype_of, kind_of, rule
from .array import Hollow
from .meter import current

__all__ = ["dot", "matmul", "vecdot"]


def _count(flops: int, *arrays: Any) -> None:
    current().multiply(flops, frozenset(x.role for x in arrays if isinstance(x, Hollow)))


@rule(numpy.dot)
def dot(a: Any, b: Any, out: Any = None) -> Any:
    if len(b.shape) < 2:
        shape = (*a.shape[:-1], *b.shape[1:])
    else:
        shape = (*a.shape[:-1], *b.shape[:-2], b.shape[-1])
    if a.shape[-1] != b.shape[-2:][0]:
        raise ValueError(f"shapes {a.shape} and {b.shape} not aligned")
    _count(2 * math.prod(shape) * a.shape[-1], a, b)
    if len(a.shape) == len(b.shape) == 2:
        current().pass_by(sum(x.nbytes for x in (a, b) if not _ready(x)))  # BLAS gets a copy of what has gaps
    return out if out is not None else Hollow(shape, dtype_of(numpy.multiply, (kind_of(a), kind_of(b))))


def _ready(x: Any) -> bool:
    """Whether BLAS takes a matrix as it lies: the elements of its rows, or of its columns, without gaps."""
    return x.itemsize in x.strides or 1 in x.shape


def matmul(a: Any, b: Any, out: Any = None) -> Any:
    if len(a.shape) < 2 or len(b.shape) < 2:
        return dot(a, b, out)
    shape = (*numpy.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(f"shapes {a.shape} and {b.shape} not aligned")
    _count(2 * math.prod(shape) * a.shape[-1], a, b)
    return out if out is not None else Hollow(shape, dtype_of(numpy.multiply, (kind_of(a), kind_of(b))))


def vecdot(a: Any, b: Any, out: Any = None) -> Any:
    shape = numpy.broadcast_shapes(a.shape, b.shape)[:-1]
    return out if out is not None else Hollow(shape, dtype_of(numpy.multiply, (kind_of(a), kind_of(b))))
