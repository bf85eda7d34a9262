"""Operations that move elements and change none. Their gradients move them back.

>>> import minilora
>>> from minilora import ops
>>> x = minilora.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
>>> [y.shape for y in (ops.concatenate([x, x], axis=1), ops.stack([x, x]), ops.reshape(x, (3, -1)), ops.transpose(x, (1, 0)))]
[(2, 6), (2, 2, 3), (3, 2), (3, 2)]
>>> ops.getitem(x, (slice(None), 0)).numpy().tolist()
[1.0, 4.0]
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from .. import backend
from ..engine import Op, apply, shape_of
from ..errors import DTypeError, ShapeError

if TYPE_CHECKING:
    from ..tensor import Tensor
    from ..typing import TensorLike

Array = Any


class Reshape(Op):
    """y = x in another shape. dx = dy in the shape of x. Keeps nothing."""

    moves = True
    to: tuple[int, ...]
    in_shape: tuple[int, ...]

    def forward(self, x: Array) -> Array:
        self.in_shape = x.shape
        return x.reshape(self.to)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        return (dy.reshape(self.in_shape),)


class Transpose(Op):
    """y = x with its axes permuted. dx = dy with the inverse permutation. Keeps nothing."""

    moves = True
    axes: tuple[int, ...]

    def forward(self, x: Array) -> Array:
        return x.transpose(self.axes)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        n = len(self.axes)
        inverse = sorted(range(n), key=lambda i: self.axes[i] % n)
        return (dy.transpose(inverse),)


class GetItem(Op):
    """y = x[index]. dx = zeros of the shape of x, with dy added at `index`. Keeps the index only.

    An array of integers may name an element twice; its gradients are added. Where nothing can come twice (`all_differ`), dy is
    assigned, which is faster.
    """

    moves = True
    index: tuple[Any, ...]
    in_shape: tuple[int, ...]

    def forward(self, x: Array) -> Array:
        self.in_shape = x.shape
        return x[self.index]

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        dx = self.xp.zeros(self.in_shape, dtype=dy.dtype)
        if all_differ(self.index):
            dx[self.index] = dy
        else:
            self.xp.add.at(dx, self.index, dy)
        return (dx,)


def all_differ(index: tuple[Any, ...]) -> bool:
    """Whether no element is named twice for certain: by ints, slices, None, Ellipsis and masks alone. All else may do so."""
    return all(part is None or part is Ellipsis or isinstance(part, (slice, Integral)) or getattr(part, "dtype", None) == bool
               for part in index)


def plain_index(index: Any, device: backend.Device) -> tuple[Any, ...]:
    """An index as a tuple in which every tensor, sequence and bool has become an array on the device."""
    def plain(part: Any) -> Any:
        if hasattr(part, "node"):
            return part.data
        return [plain(p) for p in part] if isinstance(part, (list, tuple)) else part

    def array(part: Any) -> Any:
        part = plain(part)
        if not isinstance(part, (list, range, bool, backend.cpu.xp.bool_)):
            return part
        try:
            made = backend.cpu.xp.asarray(part)
        except (ValueError, TypeError) as error:
            raise DTypeError(f"getitem: {part} makes no array: {error}") from error
        return backend.to_device(made if made.size else made.astype("int64"), device)

    return tuple(map(array, index)) if isinstance(index, tuple) else (array(index),)


class Concatenate(Op):
    """y = the inputs joined along an axis. Each dx is its own slice of dy. Keeps nothing."""

    moves = True
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


class Stack(Op):
    """y = inputs of one shape, side by side along a new axis. Each dx is its own place of dy. Keeps nothing."""

    moves = True
    axis: int

    def forward(self, *xs: Array) -> Array:
        return self.xp.stack(xs, axis=self.axis)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        before = (slice(None),) * (self.axis % dy.ndim)
        return tuple(dy[(*before, i)] for i in range(len(self.needs)))


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
    """x[index], with all of NumPy's indexing; an array in it must live on the tensor's device. See `GetItem`.

    Raises
    ------
    IndexError
        If an index is out of range.
    """
    device = backend.device_of(x.data if hasattr(x, "node") else x)  # type: ignore[attr-defined]
    return apply(GetItem, x, index=plain_index(index, device))


def check_list(name: str, axis: Any) -> None:
    """Raise `DTypeError` for tensors that were not given in one list: the second would be the axis."""
    if not isinstance(axis, Integral):
        raise DTypeError(f"{name}: axis must be an int, got {type(axis).__name__}: the tensors go into one list, "
                         f"ops.{name}([x, y])")


def concatenate(xs: Sequence[TensorLike], axis: int = 0) -> Tensor:
    """Join tensors along an existing axis. See `Concatenate`.

    Raises
    ------
    ShapeError
        If there is none, or if the shapes differ anywhere but along `axis`.
    """
    check_list("concatenate", axis)
    shapes = [shape_of(x) for x in xs]
    if not shapes:
        raise ShapeError("concatenate: got no tensors")
    n = len(shapes[0])
    if n == 0 or not -n <= axis < n or len({s[:axis % n] + s[axis % n + 1:] for s in shapes}) != 1 \
            or any(len(s) != n for s in shapes):
        raise ShapeError(f"concatenate along axis {axis}: shapes must agree elsewhere, got {', '.join(map(str, shapes))}")
    return apply(Concatenate, *xs, axis=axis)


def stack(xs: Sequence[TensorLike], axis: int = 0) -> Tensor:
    """Put tensors of one shape side by side along a new axis. See `Stack`.

    Raises
    ------
    ShapeError
        If there is none, their shapes differ, or the result has no such axis.
    """
    check_list("stack", axis)
    shapes = [shape_of(x) for x in xs]
    if not shapes:
        raise ShapeError("stack: got no tensors")
    n = len(shapes[0]) + 1
    if len(set(shapes)) != 1 or not -n <= axis < n:
        raise ShapeError(f"stack along a new axis {axis}: expected tensors of one shape and an axis from {-n} to {n - 1}, got "
                         f"shapes {', '.join(map(str, shapes))}")
    return apply(Stack, *xs, axis=axis)


def split(x: TensorLike, indices_or_sections: Any, axis: int = 0) -> tuple[Tensor, ...]:
    """Parts of a tensor along an axis, as `numpy.split` makes them; each is a view, by `getitem`.

    Parameters
    ----------
    x : Tensor
    indices_or_sections : int or sequence of int
        An int: so many equal parts. A sequence: where to cut, so that [2, 3] gives x[:2], x[2:3] and x[3:]. (PyTorch's split
        takes lengths: [2, 1, ...].)
    axis : int

    Raises
    ------
    ShapeError
        If there is no such axis, or it has not so many equal parts.

    Examples
    --------
    >>> import minilora
    >>> [part.shape for part in split(minilora.tensor([1.0, 2.0, 3.0]), [2])]
    [(2,), (1,)]
    """
    shape = shape_of(x)
    if not -len(shape) <= axis < len(shape):
        raise ShapeError(f"split along axis {axis}: shape {shape} has the axes 0 to {len(shape) - 1}")
    n, before = shape[axis], (slice(None),) * (axis % len(shape))
    if isinstance(indices_or_sections, Integral):
        sections = int(indices_or_sections)
        if sections < 1 or n % sections:
            raise ShapeError(f"split: axis {axis} of shape {shape} has no {sections} equal parts. Give the places to cut, such "
                             f"as [{n // 2}]")
        cuts = [n // sections * i for i in range(1, sections)]
    else:
        cuts = [operator.index(cut) for cut in indices_or_sections]
    return tuple(getitem(x, (*before, slice(start, stop))) for start, stop in zip([0, *cuts], [*cuts, n]))


def repeated(number: Array, shape: tuple[int, ...]) -> Array:
    """A 0-d array seen as one of any shape, by strides of 0: no memory, and on the host read-only."""
    return backend.device_of(number).xp.broadcast_to(number, shape)
