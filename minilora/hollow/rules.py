"""What NumPy's functions give for arrays without numbers: shape, dtype and order of the result, and the FLOPs of products.

A function that is not here does not exist for a hollow array: the first use says so. dtypes are NumPy's own answers, asked
with arrays of one number.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy

from . import making  # noqa: F401  (writes down its answers)
from .answers import ANSWERS, dtype_of, kind_of, lacking, rule
from .array import Hollow, protocol
from .products import matmul, vecdot

__all__ = ["known", "of_function", "of_ufunc"]

Shape = tuple[int, ...]

REDUCTIONS = {numpy.sum, numpy.mean, numpy.max, numpy.min, numpy.any, numpy.all, numpy.prod, numpy.argmax, numpy.argmin,
              numpy.var, numpy.std, numpy.count_nonzero}
REDUCED = {"add": numpy.sum, "maximum": numpy.max, "minimum": numpy.min, "multiply": numpy.prod, "logical_or": numpy.any,
           "logical_and": numpy.all}  # by the ufunc whose reduction it is
VIEWS = {numpy.swapaxes: Hollow.swapaxes, numpy.reshape: Hollow.reshape, numpy.broadcast_to: Hollow.broadcast_to,
         numpy.transpose: Hollow.transpose, numpy.squeeze: Hollow.squeeze, numpy.ravel: Hollow.ravel}
NEW = {numpy.empty_like, numpy.zeros_like, numpy.ones_like, numpy.full_like, numpy.nan_to_num}
SAME_ROWS = {numpy.triu, numpy.tril, numpy.flip, numpy.roll, numpy.sort, numpy.cumsum, numpy.cumprod}


def known(function: Any) -> bool:
    return function in REDUCTIONS or function in VIEWS or function in NEW or function in SAME_ROWS or function in ANSWERS


def of_function(function: Any, args: Sequence[Any], options: dict[str, Any]) -> Any:
    """The result of one of NumPy's functions that is no ufunc."""
    if function in REDUCTIONS:
        return reduced(function, *args, **options)
    if function in VIEWS:
        return VIEWS[function](*args, **options)  # type: ignore[operator]
    if function in NEW:
        return Hollow.like(args[0], options.get("shape"), options.get("dtype"))
    if function in SAME_ROWS:
        return Hollow(args[0].shape, _reduction_dtype(function, args[0].dtype))
    found = ANSWERS.get(function)
    if found is None:
        raise lacking(function.__name__)
    return found(*args, **options)


def of_ufunc(ufunc: Any, method: str, inputs: Sequence[Any], options: dict[str, Any]) -> Any:
    """The result of a ufunc, or of one of its methods."""
    out = options.get("out")
    out = out[0] if isinstance(out, tuple) else out
    if method == "reduce":
        return reduced(REDUCED[ufunc.__name__], inputs[0], **options)
    if method == "at":
        return None
    if ufunc is numpy.matmul or ufunc is numpy.vecdot:
        return (matmul if ufunc is numpy.matmul else vecdot)(inputs[0], inputs[1], out)
    if method != "__call__" or ufunc.nout != 1:
        raise lacking(f"{ufunc.__name__}.{method}")
    return out if out is not None else elementwise(ufunc, inputs, options.get("dtype"))


protocol.update(known=known, of_function=of_function, of_ufunc=of_ufunc)


# -- one element at a time ----------------------------------------------------------------------------------------------


def elementwise(function: Any, inputs: Sequence[Any], dtype: Any = None) -> Hollow:
    """A new array of the shape to which the inputs broadcast, in the order of the first that has it."""
    shape: Shape | None = None
    for x in inputs:
        own = getattr(x, "shape", ())
        if own and own != shape:
            shape = own if not shape else numpy.broadcast_shapes(shape, own)
    made = numpy.dtype(dtype) if dtype is not None else dtype_of(function, tuple(kind_of(x) for x in inputs))
    like = next((x for x in inputs if isinstance(x, Hollow) and x.shape == shape), None)
    result = Hollow(shape or (), made) if like is None else Hollow.like(like, dtype=made)
    if like is not None and not any(hasattr(x, "shape") for x in inputs if x is not like):
        result.role = like.role  # a weight times a number is that weight
    return result


@rule(numpy.where)
def where(condition: Any, a: Any, b: Any) -> Hollow:
    return elementwise(numpy.where, (condition, a, b))


@rule(numpy.clip)
def clip(x: Any, low: Any = None, high: Any = None, out: Any = None) -> Any:
    return out if out is not None else Hollow.like(x)


# -- along axes ---------------------------------------------------------------------------------------------------------


def reduced(function: Any, x: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: Any = False,
            **_: Any) -> Any:
    if out is not None:
        return out
    axes = range(x.ndim) if axis is None else {int(i) % x.ndim for i in numpy.atleast_1d(axis)}
    kept = keepdims is True
    shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape) if kept or i not in axes)
    return Hollow(shape, dtype or _reduction_dtype(function, x.dtype))


@functools.cache
def _reduction_dtype(function: Any, dtype: Any) -> Any:
    return function(numpy.ones((2, 2), dtype), *((1,) if function is numpy.roll else ())).dtype


@rule(numpy.concatenate)
def concatenate(arrays: Sequence[Any], axis: int = 0, out: Any = None) -> Any:
    first = arrays[0]
    axis = axis % len(first.shape)
    length = sum(x.shape[axis] for x in arrays)
    dtype = functools.reduce(numpy.promote_types, [x.dtype for x in arrays])
    return out if out is not None else Hollow((*first.shape[:axis], length, *first.shape[axis + 1:]), dtype)


@rule(numpy.stack)
def stack(arrays: Sequence[Any], axis: int = 0, out: Any = None) -> Any:
    first = arrays[0]
    axis = axis % (len(first.shape) + 1)
    return out if out is not None else Hollow((*first.shape[:axis], len(arrays), *first.shape[axis:]), first.dtype)


@rule(numpy.split)
def split(x: Any, sections: Any, axis: int = 0) -> list[Any]:
    n = x.shape[axis]
    ends = [n * i // sections for i in range(1, sections)] if isinstance(sections, int) else list(sections)
    lead = (slice(None),) * (axis % x.ndim)
    return [x[(*lead, slice(low, high))] for low, high in zip([0, *ends], [*ends, n])]


@rule(numpy.moveaxis)
def moveaxis(x: Any, source: int, destination: int) -> Any:
    order = [i for i in range(x.ndim) if i != source % x.ndim]
    order.insert(destination % x.ndim, source % x.ndim)
    return x.transpose(order)


@rule(numpy.expand_dims)
def expand_dims(x: Any, axis: int) -> Any:
    return x[(slice(None),) * (axis % (x.ndim + 1)) + (None,)]


@rule(numpy.repeat)
def repeat(x: Any, repeats: int, axis: int | None = None) -> Any:
    if axis is None:
        return Hollow(x.size * repeats, x.dtype)
    return Hollow(tuple(n * repeats if i == axis % x.ndim else n for i, n in enumerate(x.shape)), x.dtype)


@rule(numpy.pad)
def pad(x: Any, width: Any, mode: str = "constant", **_: Any) -> Any:
    pairs = numpy.broadcast_to(numpy.asarray(width), (x.ndim, 2)).tolist()
    return Hollow(tuple(n + sum(pair) for n, pair in zip(x.shape, pairs)), x.dtype)


@rule(numpy.argsort)
def argsort(x: Any, **_: Any) -> Any:
    return Hollow(x.shape, "int64")


@rule(numpy.flatnonzero)
def flatnonzero(x: Any) -> Any:
    return Hollow(x.size, "int64")  # at most


@rule(numpy.take)
def take(x: Any, places: Any, axis: int | None = None, out: Any = None, mode: str = "raise") -> Any:
    if out is not None:
        return out
    if axis is None:
        return Hollow(numpy.shape(places) if not isinstance(places, Hollow) else places.shape, x.dtype)
    axis %= len(x.shape)
    chosen = places.shape if hasattr(places, "shape") else numpy.shape(places)
    return Hollow((*x.shape[:axis], *chosen, *x.shape[axis + 1:]), x.dtype)


@rule(numpy.take_along_axis)
def take_along_axis(x: Any, places: Any, axis: int | None = -1) -> Any:
    return Hollow(places.shape, x.dtype)


# -- arrays as such -----------------------------------------------------------------------------------------------------


@rule(numpy.linalg.norm)
def norm(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    return reduced(numpy.sum, x, axis, keepdims=keepdims)


@rule(numpy.may_share_memory, numpy.shares_memory)
def share_memory(a: Any, b: Any, *_: Any) -> bool:
    return isinstance(a, Hollow) and isinstance(b, Hollow) and a.memory is b.memory


@rule(numpy.copyto)
def copyto(target: Any, source: Any, **_: Any) -> None:
    pass


@rule(numpy.shape)
def shape_of(x: Any) -> Shape:
    return x.shape  # type: ignore[no-any-return]


@rule(numpy.ndim)
def ndim_of(x: Any) -> int:
    return len(x.shape)


@rule(numpy.result_type)
def result_type(*given: Any) -> Any:
    return numpy.result_type(*(x.dtype if isinstance(x, Hollow) else x for x in given))
