"""Sums and means over axes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..engine import Op, apply, shape_of
from ..errors import ShapeError

if TYPE_CHECKING:
    from ..tensor import Tensor

Array = Any
Axis = Any  # None, an int or a tuple of ints, as in NumPy


def spread(dy: Array, shape: tuple[int, ...], axis: Axis, keepdims: bool, xp: Any) -> Array:
    """Undo a reduction's loss of axes: `dy` repeated along them, as a read-only view of shape `shape`."""
    if not keepdims:
        axes = range(len(shape)) if axis is None else (axis,) if isinstance(axis, int) else axis
        reduced = {a % len(shape) for a in axes}
        dy = dy.reshape(tuple(1 if i in reduced else n for i, n in enumerate(shape)))
    return xp.broadcast_to(dy, shape)


class Sum(Op):
    """y = sum of x over axes. dx = dy, repeated along those axes. Keeps nothing."""

    axis: Axis
    keepdims: bool
    in_shape: tuple[int, ...]

    def forward(self, x: Array) -> Array:
        self.in_shape = x.shape
        return x.sum(axis=self.axis, keepdims=self.keepdims)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        return (spread(dy, self.in_shape, self.axis, self.keepdims, self.xp),)


class Mean(Op):
    """y = (1/n) sum of x over axes, n elements each. dx = dy / n, repeated along those axes. Keeps nothing."""

    axis: Axis
    keepdims: bool
    in_shape: tuple[int, ...]
    n: int

    def forward(self, x: Array) -> Array:
        y = x.sum(axis=self.axis, keepdims=self.keepdims)
        self.in_shape = x.shape
        self.n = x.size // y.size if y.size else 1
        return y / self.n

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        return (spread(dy / self.n, self.in_shape, self.axis, self.keepdims, self.xp),)


def sum(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Sum over axes (all of them by default); see `Sum`."""
    return apply(Sum, x, axis=axis, keepdims=keepdims)


def mean(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Mean over axes (all of them by default); see `Mean`.

    Raises
    ------
    ShapeError
        If there is nothing to average: the mean of no elements is not a number.
    """
    shape = shape_of(x)
    axes = range(len(shape)) if axis is None else (axis,) if isinstance(axis, int) else axis
    if math.prod(shape[a] for a in axes) == 0:
        raise ShapeError(f"mean over axis {axis} of shape {shape}: there is nothing to average. Is a batch empty?")
    return apply(Mean, x, axis=axis, keepdims=keepdims)
