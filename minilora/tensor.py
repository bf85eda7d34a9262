"""Tensor, a handle on an array, and Parameter, a leaf that may be trained. Operators are one-line calls to `ops`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy

from . import backend, replay
from .calls import answered
from .errors import DTypeError, ShapeError
from .gathered import Retaining
from .handle import Handle
from .stored import Stored
from .unsupported import InPlaceRefusals, Refusals, explain_missing, refuse_keywords

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

    from .engine import Op
    from .typing import Numbers, Operand, TensorLike

__all__ = ["Parameter", "Tensor", "tensor"]

Array = Any  # numpy.ndarray or cupy.ndarray: whichever the device makes


class Tensor(Handle, Retaining, Refusals):
    """An array, and the operation that made it.

    A tensor is only a handle: the graph points at operations, never at tensors, so when the last name for a tensor goes,
    its array goes too, unless an operation said that backward needs it.

    Parameters
    ----------
    data : array
        A `numpy.ndarray` (or `cupy.ndarray`), used as it is and not copied: the tensor shares its memory. `minilora.tensor`
        copies, and converts other values.

    Attributes
    ----------
    data : array
        The raw array.
    node : Op or None
        What made this tensor, if a gradient can flow through it.
    grad : array or None
        Of a tensor that was asked to keep it: see `retain_grad`.

    Raises
    ------
    DTypeError
        If `data` is not an array of a known device, or one that computes otherwise (`numpy.matrix`, masked arrays).

    Notes
    -----
    Numbers, Python's and NumPy's, promote nothing: ``t * numpy.sqrt(2.0)`` has the dtype of t. An array of another dtype is
    refused, one without axes too: it was made as an array. ``t += 1`` is ``t = t + 1``, a new tensor. Comparisons give raw
    arrays, see `Handle`.

    Examples
    --------
    >>> import minilora
    >>> w = minilora.Parameter([1.0, 2.0, 3.0])
    >>> loss = (w * w).sum()
    >>> loss.backward()
    >>> w.grad
    array([2., 4., 6.], dtype=float32)
    """

    __slots__ = ("node",)

    node: Op | Parameter | None

    def __init__(self, data: Array, node: Op | None = None) -> None:
        backend.device_of(data)
        self.data = data
        self.node = node

    @answered
    def detach(self) -> Tensor:
        """The same array, outside the graph: no gradient flows through the result."""
        return Tensor(self.data)

    @answered
    def backward(self, gradient: Array | None = None) -> None:
        """Compute the gradients of this tensor with respect to every trainable parameter; see `engine.backward`."""
        engine.backward(self, gradient)

    @answered
    def astype(self, dtype: DTypeLike) -> Tensor:
        """The numbers in another dtype; the gradient comes back in this tensor's own. See `ops.cast`."""
        return ops.cast(self, dtype)

    def __repr__(self) -> str:
        return self._text() if self.node is None else self._text(f"by {type(self.node).__name__}")

    def __reduce__(self) -> Any:
        return Tensor, (self.data,)  # a copy (copy.deepcopy, or another process) is outside the graph

    # Operators: the calculus is in ops.
    def __add__(self, other: Operand) -> Tensor:
        return ops.add(self, other)

    def __radd__(self, other: Operand) -> Tensor:
        return ops.add(other, self)

    def __sub__(self, other: Operand) -> Tensor:
        return ops.sub(self, other)

    def __rsub__(self, other: Operand) -> Tensor:
        return ops.sub(other, self)

    def __mul__(self, other: Operand) -> Tensor:
        return ops.mul(self, other)

    def __rmul__(self, other: Operand) -> Tensor:
        return ops.mul(other, self)

    def __truediv__(self, other: Operand) -> Tensor:
        return ops.div(self, other)

    def __rtruediv__(self, other: Operand) -> Tensor:
        return ops.div(other, self)

    def __pow__(self, exponent: float) -> Tensor:
        return ops.pow(self, exponent)

    def __abs__(self) -> Tensor:
        return ops.abs(self)

    def __neg__(self) -> Tensor:
        return ops.neg(self)

    def __matmul__(self, other: TensorLike) -> Tensor:
        return ops.matmul(self, other)

    def __rmatmul__(self, other: TensorLike) -> Tensor:
        return ops.matmul(other, self)

    def __getitem__(self, index: Any) -> Tensor:
        return ops.getitem(self, index)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    @property
    def T(self) -> Tensor:
        return ops.transpose(self)

    def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False, **other: None) -> Tensor:
        refuse_keywords("sum", other)
        return ops.sum(self, axis, keepdims)

    def mean(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False, **other: None) -> Tensor:
        refuse_keywords("mean", other)
        return ops.mean(self, axis, keepdims)

    def reshape(self, *shape: int | tuple[int, ...], **other: None) -> Tensor:
        refuse_keywords("reshape", other)
        return ops.reshape(self, shape)

    def transpose(self, *axes: int | Sequence[int] | None, **other: None) -> Tensor:
        refuse_keywords("transpose", other)
        given: Any = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes  # transpose((1, 0)), as in NumPy
        return ops.transpose(self, given or None)


class Parameter(InPlaceRefusals, Tensor):
    """A leaf of the graph: an array that may be trained.

    Parameters
    ----------
    data : array_like
        A floating-point array, or a tensor's, is used as it is and not copied. Numbers, and lists of them, make a new array on
        the current device, float32 unless they are NumPy's.
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
        saved the array, or a view of it such as W.T, then refuses its backward, which would read the new values.

    Raises
    ------
    DTypeError
        If `data` is not floating-point: integers, booleans and objects have no gradient. And for ``p += x``, which would put
        a plain tensor in the parameter's place. If a `grad` is assigned that is no array of the parameter's device and dtype.
    ShapeError
        If a `grad` of another shape is assigned.

    Examples
    --------
    >>> import minilora
    >>> minilora.Parameter([1.0, 2.0])
    Parameter([1. 2.], dtype=float32)
    """

    __slots__ = ("gathered", "room", "trainable", "version")

    gathered: Array | None  # the gradient, for the walk and for optimizers: the room, or an array that somebody may hold
    room: Array | None  # where an optimizer wants the gradient written: a view of its flat array, never shown to anybody

    @answered
    def __init__(self, data: Numbers, trainable: bool = True) -> None:
        array: Array = data.data if isinstance(data, Tensor) else data
        if isinstance(data, (list, tuple, float, int, numpy.generic)):
            array = backend.asarray(data)
            if array.dtype.kind in "iu":
                array = array.astype("float32")  # whole numbers that somebody wrote down: Parameter([1, 2])
        backend.device_of(array)
        if trainable and isinstance(array, Stored):
            raise DTypeError(f"a weight held as {array.kind} is read only, and cannot be trained: make it frozen, "
                             "Parameter(data, trainable=False), and train an adapter beside it; or Parameter(data.dense())")
        if array.dtype.kind != "f":
            raise DTypeError(f"a parameter must hold floating-point numbers, got dtype {array.dtype}: a gradient moves by "
                             "fractions; convert with minilora.tensor(value, dtype='float32')")
        self.data = array
        self.gathered = None
        self.room = None
        self.trainable = trainable
        self.version = 0

    @property
    def grad(self) -> Array | None:
        # The next gradient is written into the room again. So what a reader gets is a copy, which is the gradient from then on:
        # a copy a step for those who look, and none for those who do not.
        replay.found_gradient(self)
        if self.gathered is not None and (self.gathered is self.room or self.gathered.dtype != self.dtype):
            self.gathered = self.gathered.astype(self.dtype)
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
        replay.left_gradient(self)
        self.gathered = value

    @property
    def node(self) -> Parameter | None:  # type: ignore[override]
        # A leaf stands for itself in the graph. A property, not an attribute: an attribute would be a reference cycle.
        return self if self.trainable else None

    def __reduce__(self) -> Any:
        return Parameter, (self.data, self.trainable)  # a copy has no gradient, and no optimizer

    def __repr__(self) -> str:
        if isinstance(self.data, Stored):
            return f"Parameter({self.data!r}, frozen)"
        return self._text() if self.trainable else self._text("frozen")


@answered
def tensor(value: Numbers, dtype: DTypeLike | None = None) -> Tensor:
    """Make a tensor on the current device, with numbers of its own.

    Parameters
    ----------
    value : array_like
        Numbers, nested lists, a host array or a tensor; copied to the device that `minilora.use` chose, also where that is
        the host. `Tensor(array)` and `backend.asarray` share the memory of an array instead.
    dtype : dtype, optional
        Without it, Python's floats become float32 (and its ints int64), and what has a dtype keeps it: arrays, tensors, and
        NumPy's numbers.

    Returns
    -------
    Tensor
        A constant: no gradient flows to a tensor in `value`.

    Examples
    --------
    >>> import minilora, numpy
    >>> minilora.tensor([[1.0, 2.0]]).dtype.name, minilora.tensor(numpy.ones(2)).dtype.name
    ('float32', 'float64')
    """
    return Tensor(backend.asarray(value.data if isinstance(value, Tensor) else value, dtype, copy=True))


from . import engine, ops  # noqa: E402  (last: both need the two classes above)

explain_missing(ops)
