"""The arithmetic of strides: which views NumPy makes of an array."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy

__all__ = ["broadcast", "contiguous", "cut", "in_order_of", "regrouped"]

Shape = tuple[int, ...]


def contiguous(shape: Sequence[int], itemsize: int) -> Shape:
    """Strides of rows that lie one after the other."""
    strides = []
    for n in reversed(shape):
        strides.append(itemsize)
        itemsize *= max(n, 1)
    return tuple(reversed(strides))


def in_order_of(strides: Shape, old: Shape, shape: Shape, itemsize: int) -> Shape:
    """Strides without gaps for a new array whose axes lie in the order of those of another."""
    places = [i for i in range(len(shape)) if old[i] != 1 and strides[i] != 0]
    ordered = sorted(places, key=lambda i: -strides[i])  # stable
    if ordered == places:
        return contiguous(shape, itemsize)
    order = list(range(len(shape)))
    for place, axis in zip(places, ordered):
        order[place] = axis
    found = dict(zip(order, contiguous([shape[i] for i in order], itemsize)))
    return tuple(found[i] for i in range(len(shape)))


def broadcast(shape: Shape, strides: Shape, wanted: Shape) -> Shape:
    """Strides with 0 for the axes along which an array is repeated."""
    numpy.broadcast_shapes(shape, wanted)
    lead = len(wanted) - len(shape)
    return (0,) * lead + tuple(stride if n == m else 0 for n, m, stride in zip(shape, wanted[lead:], strides))


def regrouped(shape: Shape, strides: Shape, wanted: Shape, itemsize: int) -> Shape | None:
    """Strides with which an array is seen in another shape; None if that needs a copy.

    Axes of both shapes are taken in groups of equal products. Within a group the old axes must follow each other without gaps.
    """
    if math.prod(shape) <= 1:
        return contiguous(wanted, itemsize)
    old = [(n, stride) for n, stride in zip(shape, strides) if n != 1]
    found: list[int] = []
    i = j = 0  # where a group begins
    while j < len(wanted) and i < len(old):
        size, group, i_end, j_end = old[i][0], wanted[j], i + 1, j + 1
        while group != size:
            if group < size:
                group *= wanted[j_end]
                j_end += 1
            else:
                size *= old[i_end][0]
                i_end += 1
        if any(outer != n * inner for (_, outer), (n, inner) in zip(old[i:i_end], old[i + 1:i_end])):
            return None
        inside = contiguous(wanted[j:j_end], 1)
        found += [old[i_end - 1][1] * k for k in inside]
        i, j = i_end, j_end
    return (*found, *[itemsize] * (len(wanted) - j))


def cut(key: Any, shape: Shape, strides: Shape) -> tuple[Shape, Shape | None]:
    """What an index makes: shape and strides of a view; or the shape of a copy, and None, if arrays choose.

    Of a mask only the shape is known: it counts as if it let everything through.
    """
    parts = list(key) if isinstance(key, tuple) else [key]
    taken = sum(0 if part is None or part is Ellipsis else ndim_of_mask(part) for part in parts)
    if not any(part is Ellipsis for part in parts):
        parts.append(Ellipsis)
    new_shape: list[int] = []
    new_strides: list[int] = []
    chosen: list[Shape] = []
    places: list[int] = []  # where in the new shape each choosing array stands
    axis = 0
    for part in parts:
        if part is None:
            new_shape.append(1)
            new_strides.append(0)
        elif part is Ellipsis:
            rest = len(shape) - taken
            new_shape += shape[axis:axis + rest]
            new_strides += strides[axis:axis + rest]
            axis += rest
        elif isinstance(part, slice):
            low, high, step = part.indices(shape[axis])
            new_shape.append(len(range(low, high, step)))
            new_strides.append(strides[axis] * step)
            axis += 1
        elif isinstance(part, (int, numpy.integer)) and not isinstance(part, bool):
            if not -shape[axis] <= part < shape[axis]:
                raise IndexError(f"index {part} is out of bounds for axis {axis} with size {shape[axis]}")
            axis += 1
        else:
            axes = ndim_of_mask(part)
            chosen.append(shape_of_choice(part))
            places.append(len(new_shape))
            axis += axes
    if not chosen:
        return tuple(new_shape), tuple(new_strides)
    common = numpy.broadcast_shapes(*chosen)
    place = places[0] if len(set(places)) == 1 else 0  # apart from each other, they come first
    return (*new_shape[:place], *common, *new_shape[place:]), None


def ndim_of_mask(part: Any) -> int:
    """How many axes a part of an index takes."""
    if isinstance(part, (slice, int, numpy.integer)):
        return 1
    dtype = getattr(part, "dtype", None)
    return len(part.shape) if dtype is not None and dtype.kind == "b" else 1


def shape_of_choice(part: Any) -> Shape:
    """The shape of what a choosing array puts in the place of its axes."""
    shape: Shape = tuple(part.shape) if hasattr(part, "shape") else numpy.shape(part)
    dtype = getattr(part, "dtype", None)
    if dtype is not None and dtype.kind == "b":
        return (int(numpy.count_nonzero(part)) if isinstance(part, numpy.ndarray) else math.prod(shape),)
    return shape
