"""Sums, means and extremes over axes.

>>> import minilora
>>> from minilora import ops
>>> x = minilora.tensor([[1.0, 2.0], [3.0, 8.0]])
>>> ops.max(x).item(), ops.min(x, axis=0).numpy().tolist(), ops.mean(x, axis=1, keepdims=True).shape
(8.0, [1.0, 2.0], (2, 1))
"""

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

    rounds = False
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

    rounds = False
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


class Extreme(Op):
    """What `Max` and `Min` share: y = the extreme of x over axes, and its gradient.

    A small change of x moves y only through the elements that equal y. There are n of them, one as a rule; if more, y has a
    kink, and each gets an equal share: dx = dy / n where x = y, else 0. A NaN is the extreme, and NaNs share as equals do.
    Keeps x and y.
    """

    axes: tuple[int, ...]
    keepdims: bool
    moves = True

    def settle(self, x: Array, y: Array) -> Array:
        """Keep what backward reads of x and y, which has all axes still; y as it was asked for."""
        self.save(x, y)
        return y if self.keepdims else y.reshape(tuple(n for i, n in enumerate(x.shape) if i not in self.axes))

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        x, y = self.saved
        taken = (x == y) | (x != x)
        n = taken.sum(axis=self.axes, keepdims=True).astype(dy.dtype)
        return (self.xp.where(taken, dy.reshape(y.shape) / n, 0.0),)


class Max(Extreme):
    """y = the largest x over axes. dx = dy / n for the n elements that equal y, else 0; see `Extreme`."""

    def forward(self, x: Array) -> Array:
        return self.settle(x, x.max(axis=self.axes, keepdims=True))


class Min(Extreme):
    """y = the smallest x over axes. dx = dy / n for the n elements that equal y, else 0; see `Extreme`."""

    def forward(self, x: Array) -> Array:
        return self.settle(x, x.min(axis=self.axes, keepdims=True))


class ArgMax(Op):
    """The place of the largest x: whole numbers, which have no gradient."""

    axis: int | None
    moves = True

    def forward(self, x: Array) -> Array:
        return x.argmax(axis=self.axis)


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


def max(x: TensorLike, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The largest element over axes (all of them by default); see `Max`.

    Raises
    ------
    ShapeError
        If there is nothing to choose from.
    """
    return apply(Max, x, axes=filled_axes("max", shape_of(x), axis), keepdims=keepdims)


def min(x: TensorLike, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The smallest element over axes (all of them by default); see `Min`.

    Raises
    ------
    ShapeError
        If there is nothing to choose from.
    """
    return apply(Min, x, axes=filled_axes("min", shape_of(x), axis), keepdims=keepdims)


def argmax(x: TensorLike, axis: int | None = None) -> Tensor:
    """The place of the largest element along one axis, or in the flattened tensor; of equal ones, the first.

    Returns
    -------
    Tensor of int64
        A constant, outside the graph: places are whole numbers. It can be used as an index.

    Raises
    ------
    ShapeError
        If there is nothing to choose from.

    Examples
    --------
    >>> import minilora
    >>> argmax(minilora.tensor([[1.0, 5.0], [7.0, 2.0]]), axis=1).data
    array([1, 0])
    """
    filled_axes("argmax", shape_of(x), axis)
    return apply(ArgMax, x.detach() if hasattr(x, "node") else x, axis=axis)  # type: ignore[attr-defined]


def filled_axes(name: str, shape: tuple[int, ...], axis: Axis) -> tuple[int, ...]:
    """The axes to reduce, as `normal_axes` gives them; `ShapeError` if there is no element along them."""
    axes = normal_axes(name, shape, axis)
    if math.prod(shape[a] for a in axes) == 0:
        raise ShapeError(f"{name} over axis {axis} of shape {shape}: there is nothing to choose from. Is a batch empty?")
    return axes
