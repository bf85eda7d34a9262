"""Tensor, a handle on an array, and Parameter, a leaf that may be trained. Operators are one-line calls to `ops`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from . import backend
from .errors import DTypeError, ShapeError

if TYPE_CHECKING:
    from .engine import Op

__all__ = ["Parameter", "Tensor", "tensor"]

Array = Any  # numpy.ndarray or cupy.ndarray: whichever the device makes


class Tensor:
    """An array, and the operation that made it.

    A tensor is only a handle: the graph points at operations, never at tensors, so when the last name for a tensor goes,
    its array goes too, unless an operation said that backward needs it.

    Parameters
    ----------
    data : array
        A `numpy.ndarray` (or `cupy.ndarray`), used as it is and not copied. `minilora.tensor` converts other values.

    Attributes
    ----------
    data : array
        The raw array.
    node : Op or None
        What made this tensor, if a gradient can flow through it.

    Raises
    ------
    DTypeError
        If `data` is not an array of a known device.

    Examples
    --------
    >>> import minilora
    >>> w = minilora.Parameter(minilora.backend.asarray([1.0, 2.0, 3.0]))
    >>> loss = (w * w).sum()
    >>> loss.backward()
    >>> w.grad
    array([2., 4., 6.])
    """

    __slots__ = ("__weakref__", "data", "node")

    data: Array
    node: Op | Parameter | None

    # NumPy asks this before it takes over `array + tensor`: with None it lets Tensor.__radd__ answer.
    __array_ufunc__ = None

    def __init__(self, data: Array, node: Op | None = None) -> None:
        backend.device_of(data)
        self.data = data
        self.node = node

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape  # type: ignore[no-any-return]

    @property
    def ndim(self) -> int:
        return self.data.ndim  # type: ignore[no-any-return]

    @property
    def size(self) -> int:
        return self.data.size  # type: ignore[no-any-return]

    @property
    def dtype(self) -> numpy.dtype[Any]:
        return self.data.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> backend.Device:
        return backend.device_of(self.data)

    def item(self) -> float:
        """The one number in this tensor as a Python number. On a GPU this waits for the device (a sync point)."""
        if self.size != 1:
            raise ShapeError(f"item() needs a tensor with one element, got shape {self.shape}: "
                             "reduce it first, for instance with .mean()")
        return self.data.item()  # type: ignore[no-any-return]

    def numpy(self) -> numpy.ndarray:
        """A copy of the data on the host, as `numpy.ndarray`. On a GPU this waits for the device (a sync point)."""
        return numpy.array(backend.to_host(self.data))

    def detach(self) -> Tensor:
        """The same array, outside the graph: no gradient flows through the result."""
        return Tensor(self.data)

    def backward(self, gradient: Array | None = None) -> None:
        """Compute the gradients of this tensor with respect to every trainable parameter; see `engine.backward`."""
        engine.backward(self, gradient)

    def __repr__(self) -> str:
        made_by = f", by {type(self.node).__name__}" if self.node is not None else ""
        return f"{type(self).__name__}({backend.to_host(self.data)}, dtype={self.dtype}{made_by})"

    def __reduce__(self) -> Any:
        return Tensor, (self.data,)  # a copy (copy.deepcopy, or another process) is outside the graph

    def __len__(self) -> int:
        return len(self.data)

    def __float__(self) -> float:
        return float(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())  # like NumPy, for one element only: `if loss:` means its value, never its length

    # Operators: the calculus is in ops.
    def __add__(self, other: Any) -> Tensor:
        return ops.add(self, other)

    def __radd__(self, other: Any) -> Tensor:
        return ops.add(other, self)

    def __sub__(self, other: Any) -> Tensor:
        return ops.sub(self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return ops.sub(other, self)

    def __mul__(self, other: Any) -> Tensor:
        return ops.mul(self, other)

    def __rmul__(self, other: Any) -> Tensor:
        return ops.mul(other, self)

    def __truediv__(self, other: Any) -> Tensor:
        return ops.div(self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return ops.div(other, self)

    def __pow__(self, exponent: float) -> Tensor:
        return ops.pow(self, exponent)

    def __neg__(self) -> Tensor:
        return ops.neg(self)

    def __matmul__(self, other: Any) -> Tensor:
        return ops.matmul(self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return ops.matmul(other, self)

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, tuple):
            return ops.getitem(self, tuple(i.data if isinstance(i, Tensor) else i for i in index))
        return ops.getitem(self, index.data if isinstance(index, Tensor) else index)

    @property
    def T(self) -> Tensor:
        return ops.transpose(self)

    def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        return ops.sum(self, axis, keepdims)

    def mean(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        return ops.mean(self, axis, keepdims)

    def reshape(self, *shape: int) -> Tensor:
        return ops.reshape(self, shape)

    def transpose(self, *axes: int) -> Tensor:
        return ops.transpose(self, axes or None)


class Parameter(Tensor):
    """A leaf of the graph: an array that may be trained.

    Parameters
    ----------
    data : array
        A floating-point array, used as it is and not copied.
    trainable : bool
        A frozen parameter (False) gets no gradient, and layers keep nothing for it.

    Attributes
    ----------
    grad : array or None
        The gradient, same shape and dtype as `data`. Backward passes add to it, in place; `Optimizer.zero_grad` sets it to
        None. It may be changed in place and assigned (as it is, without a copy): clipping and `Optimizer.step` use what it
        holds then. An array that was read here is yours once `grad` is None again: nothing writes into it any more.
    trainable : bool
    version : int
        How often the array was written in place. Whoever writes into a parameter's array while a graph may hold it
        (``parameter.data[...] = values``) adds one, ``parameter.version += 1``, as an optimizer's step does. An operation that
        saved the array itself then refuses its backward, which would read the new values. A view that was taken of the array
        before, such as W.T, is not followed.

    Raises
    ------
    DTypeError
        If `data` is not a floating-point array: integers, booleans and objects have no gradient. If a `grad` is assigned that
        is no array of the parameter's device and dtype.
    ShapeError
        If a `grad` of another shape is assigned.
    """

    __slots__ = ("gathered", "room", "trainable", "version")

    gathered: Array | None  # the gradient, for the walk and for optimizers: the room, or an array that somebody may hold
    room: Array | None  # where an optimizer wants the gradient written: a view of its flat array, never shown to anybody

    def __init__(self, data: Array, trainable: bool = True) -> None:
        backend.device_of(data)
        if data.dtype.kind != "f":
            raise DTypeError(f"a parameter must hold floating-point numbers, got dtype {data.dtype}: "
                             "a gradient moves by fractions; convert with .astype('float32')")
        self.data = data
        self.gathered = None
        self.room = None
        self.trainable = trainable
        self.version = 0

    @property
    def grad(self) -> Array | None:
        # The next gradient is written into the room again. So what a reader gets is a copy, which is the gradient from then on:
        # a copy a step for those who look, and none for those who do not.
        if self.gathered is not None and self.gathered is self.room:
            self.gathered = self.room.copy()
        return self.gathered

    @grad.setter
    def grad(self, value: Array | None) -> None:
        if isinstance(value, numpy.generic):
            value = self.device.xp.asarray(value)  # NumPy gives a scalar where no axis is left
        if value is not None and (type(value) is not type(self.data) or value.dtype != self.dtype):
            raise DTypeError(f"grad: expected an array {self.dtype} on the {self.device.name}, like the parameter, got "
                             f"{type(value).__name__} {getattr(value, 'dtype', '')}")
        if value is not None and value.shape != self.shape:
            raise ShapeError(f"grad: expected shape {self.shape}, like the parameter, got {value.shape}")
        self.gathered = value

    @property
    def node(self) -> Parameter | None:  # type: ignore[override]
        # A leaf stands for itself in the graph. A property, not an attribute: an attribute would be a reference cycle.
        return self if self.trainable else None

    def __reduce__(self) -> Any:
        return Parameter, (self.data, self.trainable)  # a copy has no gradient, and no optimizer

    def __repr__(self) -> str:
        frozen = "" if self.trainable else ", frozen"
        return f"Parameter({backend.to_host(self.data)}, dtype={self.dtype}{frozen})"


def tensor(value: Any, dtype: Any = None) -> Tensor:
    """Make a tensor on the current device.

    Parameters
    ----------
    value : array_like
        Numbers, nested lists or a host array; copied to the device that `minilora.use` chose.
    dtype : dtype, optional
        Defaults to the value's own dtype.

    Examples
    --------
    >>> import minilora
    >>> minilora.tensor([[1.0, 2.0]], dtype="float32").shape
    (1, 2)
    """
    return Tensor(backend.asarray(value.data if isinstance(value, Tensor) else value, dtype))


from . import engine, ops  # noqa: E402  (last: both need the two classes above)
