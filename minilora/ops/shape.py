"""Operations that move elements and change none. Their gradients move them back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..engine import Op, apply, shape_of
from ..errors import DTypeError, ShapeError

if TYPE_CHECKING:
    from ..tensor import Tensor
    from ..typing import TensorLike

Array = Any


class Reshape(Op):
    """y = x in another shape. dx = dy in the shape of x. Keeps nothing."""

    to: tuple[int, ...]
    in_shape: tuple[int, ...]

    def forward(self, x: Array) -> Array:
        self.in_shape = x.shape
        return x.reshape(self.to)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        return (dy.reshape(self.in_shape),)


class Transpose(Op):
    """y = x with its axes permuted. dx = dy with the inverse permutation. Keeps nothing."""

    axes: tuple[int, ...]

    def forward(self, x: Array) -> Array:
        return x.transpose(self.axes)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        n = len(self.axes)
        inverse = sorted(range(n), key=lambda i: self.axes[i] % n)
        return (dy.transpose(inverse),)


class GetItem(Op):
    """y = x[index]. dx = zeros of the shape of x, with dy added at `index`. Keeps the index only.

    An integer array may name an element twice; its gradients are added. A basic index (ints, slices) names none twice, and
    is assigned, which is faster.
    """

    index: Any
    in_shape: tuple[int, ...]

    def forward(self, x: Array) -> Array:
        self.in_shape = x.shape
        return x[self.index]

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        dx = self.xp.zeros(self.in_shape, dtype=dy.dtype)
        parts = self.index if isinstance(self.index, tuple) else (self.index,)
        if any(hasattr(part, "dtype") or isinstance(part, list) for part in parts):
            self.xp.add.at(dx, self.index, dy)
        else:
            dx[self.index] = dy
        return (dx,)


class Concatenate(Op):
    """y = the inputs joined along an axis. Each dx is its own slice of dy. Keeps nothing."""

    axis: int
    lengths: tuple[int, ...]

    def forward(self, *xs: Array) -> Array:
        self.lengths = tuple(x.shape[self.axis] for x in xs)
        return self.xp.concatenate(xs, axis=self.axis)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        gradients, start = [], 0
        before = (slice(None),) * (self.axis % dy.ndim)
        for length in self.lengths:
            gradients.append(dy[before + (slice(start, start + length),)])
            start += length
        return tuple(gradients)


def reshape(x: TensorLike, shape: int | Sequence[Any]) -> Tensor:
    """The same elements in another shape; one length may be -1. See `Reshape`.

    Raises
    ------
    ShapeError
        If the number of elements would change.
    """
    to: Any = (shape,) if isinstance(shape, int) else tuple(shape)
    if len(to) == 1 and isinstance(to[0], (tuple, list)):
        to = tuple(to[0])  # x.reshape((2, 3)) as well as x.reshape(2, 3)
    try:
        return apply(Reshape, x, to=to)
    except TypeError as error:
        raise DTypeError(f"reshape: lengths must be ints, got {to}") from error
    except ValueError as error:
        raise ShapeError(f"reshape: {shape_of(x)} has {math.prod(x.shape)} elements, which do not fill {to}") from error


def transpose(x: TensorLike, axes: Sequence[int] | None = None) -> Tensor:
    """Permute the axes; without `axes`, reverse them. See `Transpose`.

    Raises
    ------
    ShapeError
        If `axes` is not a permutation of the tensor's axes.
    """
    n = len(shape_of(x))
    order = tuple(range(n))[::-1] if axes is None else tuple(axes)
    if sorted(a % n if n else a for a in order) != list(range(n)):
        raise ShapeError(f"transpose: {order} is not a permutation of the {n} axes of shape {x.shape}")
    return apply(Transpose, x, axes=order)


def getitem(x: TensorLike, index: Any) -> Tensor:
    """x[index], with NumPy's indexing; an integer array must live on the tensor's device. See `GetItem`.

    Raises
    ------
    IndexError
        If an index is out of range.
    """
    return apply(GetItem, x, index=index)


def concatenate(xs: Sequence[TensorLike], axis: int = 0) -> Tensor:
    """Join tensors along an existing axis. See `Concatenate`.

    Raises
    ------
    ShapeError
        If there is none, or if the shapes differ anywhere but along `axis`.
    """
    shapes = [shape_of(x) for x in xs]
    if not shapes:
        raise ShapeError("concatenate: got no tensors")
    n = len(shapes[0])
    if n == 0 or not -n <= axis < n or len({s[:axis % n] + s[axis % n + 1:] for s in shapes}) != 1 \
            or any(len(s) != n for s in shapes):
        raise ShapeError(f"concatenate along axis {axis}: shapes must agree elsewhere, got {', '.join(map(str, shapes))}")
    return apply(Concatenate, *xs, axis=axis)
