"""Sums and means over axes."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Union

from ..engine import Op, apply, floating, shape_of
from ..errors import ShapeError

if TYPE_CHECKING:
    from ..tensor import Tensor
    from ..typing import TensorLike

Array = Any
Axis = Union[int, Sequence[int], None]  # what a caller may give, as in NumPy


def spread(dy: Array, shape: tuple[int, ...], axes: tuple[int, ...], xp: Any) -> Array:
    """Undo a reduction's loss of axes: `dy` repeated along them, as a read-only view of shape `shape`."""
    return xp.broadcast_to(dy.reshape(tuple(1 if i in axes else n for i, n in enumerate(shape))), shape)


def normal_axes(name: str, shape: tuple[int, ...], axis: Axis) -> tuple[int, ...]:
    """The axes to reduce as a tuple of ints in [0, ndim); `ShapeError` for one that does not exist or comes twice."""
    n = len(shape)
    given = range(n) if axis is None else axis if isinstance(axis, (tuple, list)) else (axis,)
    axes = tuple(operator.index(a) for a in given)
    if not all(-n <= a < n for a in axes) or len({a % n for a in axes}) != len(axes):
        raise ShapeError(f"{name} over axis {axis}: shape {shape} has the axes 0 to {n - 1}, each may come once")
    return tuple(a % n for a in axes)


class Sum(Op):
    """y = sum of x over axes. dx = dy, repeated along those axes. Keeps nothing."""

    axes: tuple[int, ...]
    keepdims: bool
    in_shape: tuple[int, ...]

    def forward(self, x: Array) -> Array:
        self.in_shape = x.shape
        return x.sum(axis=self.axes, keepdims=self.keepdims)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        return (spread(dy, self.in_shape, self.axes, self.xp),)


class Mean(Op):
    """y = (1/n) sum of x over axes, n elements each. dx = dy / n, repeated along those axes. Keeps nothing."""

    axes: tuple[int, ...]
    keepdims: bool
    in_shape: tuple[int, ...]
    n: int

    def forward(self, x: Array) -> Array:
        y = x.sum(axis=self.axes, keepdims=self.keepdims)
        self.in_shape = x.shape
        self.n = x.size // y.size if y.size else 1
        return y / self.n

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        return (spread(dy / self.n, self.in_shape, self.axes, self.xp),)


def sum(x: TensorLike, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Sum over axes (all of them by default); see `Sum`."""
    return apply(Sum, x, axes=normal_axes("sum", shape_of(x), axis), keepdims=keepdims)


def mean(x: TensorLike, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Mean over axes (all of them by default); see `Mean`.

    Raises
    ------
    ShapeError
        If there is nothing to average: the mean of no elements is not a number.
    """
    shape = shape_of(x)
    axes = normal_axes("mean", shape, axis)
    if math.prod(shape[a] for a in axes) == 0:
        raise ShapeError(f"mean over axis {axis} of shape {shape}: there is nothing to average. Is a batch empty?")
    return apply(Mean, floating(x), axes=axes, keepdims=keepdims)
