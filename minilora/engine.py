"""The graph, and no calculus: what an operation is, and how it is applied. How backward walks is in `walk`.

An `Op` instance is one application of y = f(x1 ... xn), and it is the node that remembers it. References run from a
tensor to the op that made it, and from an op to the ops and parameters that made its inputs; never back, and never to
an activation. So there are no cycles, and an array is freed at the moment when nobody needs it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy

from . import backend
from .errors import DeviceError, DTypeError
from .half import in_mixed, in_single, mixing
from .ledger import Ledger, ledger
from .recording import _state, is_recording, no_grad, recording, watcher
from .stored import Stored
from .values import number

if TYPE_CHECKING:
    from .gathered import Retained
    from .typing import Operand

__all__ = ["Ledger", "Op", "apply", "backward", "is_recording", "ledger", "no_grad", "recording"]

Array = Any

_SCALARS = numpy.generic, int  # what stands for a number, and is read as one; bools and sizes of tensors are ints
_clock = itertools.count(1)  # creation numbers: a consumer is always younger than what it consumes


class Op:
    """One application of an operation: the maths, and the node of the graph that remembers it.

    A subclass writes two methods side by side. Arrays in, one array out; settings are keyword arguments of `apply` and
    become attributes. An op is pure: it changes no input, and edits only arrays that it made in this call.

    Attributes
    ----------
    xp : module
        The array module of the inputs.
    needs : sequence of bool
        Which inputs want a gradient; known before `forward`, so that both halves skip work nobody needs.
    saved : tuple of array or None
        What `save` was given.
    moves : bool
        Set it to True in an operation whose forward pass only chooses or moves numbers: it takes float16 as it is, where
        others compute in float32 (see `half`).
    widens : bool
        Set it to False in an operation that sees to float16 itself, forward and backward.
    rounds : bool or None
        In mixed precision (see `half`): whether the output is float16. None: if one of the inputs is.
    rearranged : mapping
        Of what is saved, by its place: which input's numbers it holds, in another order. An override may keep such a copy in
        the place of the input; with float16 it is kept in float16, as the input is.
    composed : bool
        Set it to True in an operation that is made of others: its inputs may be of several dtypes, and a parameter among them
        may turn out to have no gradient.

    Examples
    --------
    >>> import minilora
    >>> class Square(minilora.engine.Op):
    ...     '''y = x^2; dx = 2 x dy'''
    ...     def forward(self, x):
    ...         self.save(x)
    ...         return x * x
    ...     def backward(self, dy):
    ...         (x,) = self.saved
    ...         return (2.0 * x * dy,)
    >>> w = minilora.Parameter(minilora.backend.asarray([3.0]))
    >>> minilora.engine.apply(Square, w).backward(gradient=minilora.backend.asarray([1.0]))
    >>> w.grad
    array([6.], dtype=float32)
    """

    xp: Any
    needs: Sequence[bool] = ()
    saved: tuple[Any, ...] = ()
    moves = False
    widens = True
    rounds: bool | None = None
    rearranged: Mapping[int, int] = {}
    composed = False
    sources: Sequence[Op | Parameter | None] | None = ()  # None once backward has used this op
    leaves: Sequence[tuple[Parameter, Array, int]] = ()  # of an op that saves or moves: parameters, arrays, versions
    gathered: Mapping[Any, Array] | None = None  # of the same, in a walk: who has a gradient from it already
    lent: Mapping[Parameter, Array] = {}  # what `into` gave out
    retained: Retained | None = None  # where somebody wants the gradient of the output
    reference: type[Op] | None = None  # of an override: the operation in whose place it stands
    kernel = ""  # of an override: its name, for a ledger; "" where it leaves the forward pass to the reference
    order = 0
    shape: tuple[int, ...] = ()

    def save(self, *arrays: Array | None) -> None:
        """List exactly what `backward` reads, in the order in which it unpacks `self.saved`; None for what it will not."""
        self.saved = arrays

    def dot(self, a: Array, b: Array, out: Array | None = None) -> Array:
        """a b for matrices, of which b may be a weight held in low precision (`stored`)."""
        return b.after(a, out) if isinstance(b, Stored) else self.xp.dot(a, b, out=out)

    def into(self, i: int) -> Array | None:
        """An array to write the gradient of input `i` into (as ``out=``), or None if there is none to write into.

        It is for a parameter's first gradient, and nobody else holds it: the place in an optimizer's flat array that waits for
        this gradient, or a new array. What is written there need not be copied. Ask only right before writing, and return the
        array as the gradient of this input and no other. An op that saves nothing is offered none.
        """
        if self.gathered is None or self.sources is None:
            return None
        source = self.sources[i]
        if not isinstance(source, Parameter) or source in self.gathered:
            return None
        for before in self.sources[:i]:  # not `in`, which compares numbers
            if before is source:
                return None  # a parameter that comes twice is written once
        array = source.room if source.gathered is None else None
        if array is not None and (array.dtype != source.dtype or array.shape != source.shape):
            return None  # of a parameter in float16, whose gradients are added in float32; or its array was replaced
        if array is None:
            array = self.xp.empty(source.shape, dtype=source.dtype)
        self.lent = {**self.lent, source: array}
        return array

    def forward(self, *arrays: Array) -> Array:
        """One fresh array from the input arrays. Operations that only change the shape may return a view."""
        raise TypeError(f"{type(self).__name__} has no forward: define forward(self, *arrays) in the subclass")

    def backward(self, dy: Array) -> Sequence[Array | None]:
        """One gradient, or None, for each input in input order.

        They may share memory with one another, with `dy` and with what was saved, and be read-only views: whoever gets one
        reads it only, and adds in place to sums that it made itself.
        """
        raise TypeError(f"{type(self).__name__} has no backward: define backward(self, dy) in the subclass")

    def __lt__(self, other: Op) -> bool:
        return self.order > other.order  # the heap in `backward` gives the newest first


def apply(op_class: type[Op], *inputs: Operand | None, **settings: Any) -> Tensor:
    """Run an operation on its inputs and, if a gradient can be wanted, remember it.

    Parameters
    ----------
    op_class : type of Op
        The reference operation; the inputs' device may have an override for it.
    *inputs : Tensor, array, number or None
        Raw arrays and numbers are constants; a number, Python's or NumPy's, promotes no dtype. None stays None (an absent
        bias).
    **settings
        Become attributes of the op.

    Returns
    -------
    Tensor

    Raises
    ------
    DeviceError
        If the inputs live on different devices.
    DTypeError
        If the inputs' dtypes differ (NumPy would promote silently), or an input is no array.
    """
    recording = _state.recording
    first: Array = None  # the first array: the others must live where it lives and have its dtype
    arrays: list[Any] = []
    sources: list[Op | Parameter | None] = []
    needs: list[bool] = []
    for x in inputs:
        node: Op | Parameter | None = None
        if x.__class__ is Tensor:
            data, node = x.data, x.node
        elif x.__class__ is Parameter:
            data, node = x.data, x if x.trainable else None
        else:
            data = x if x.__class__ is float or not isinstance(x, _SCALARS) else number(x)
        arrays.append(data)
        sources.append(node)
        needs.append(recording and node is not None)
        if first is None:
            if not (data is None or data.__class__ is float or data.__class__ is int):
                first = data
        elif data.__class__ is not first.__class__ or data.dtype is not first.dtype:
            check_alike(op_class, first, data)
    if first is None:
        raise DTypeError(f"{op_class.__name__} got no array, only "
                         f"{', '.join(type(x).__name__ for x in inputs)}: make a tensor with minilora.tensor(value)")
    device = backend.device_of(first)
    version = device.versions[op_class]
    op: Op = (in_mixed(version) if mixing.get() else version if first.dtype.char != "e" else in_single(version))()
    op.xp = device.xp
    if settings:
        op.__dict__.update(settings)
    op.needs = needs
    y = op.forward(*arrays)
    if y.__class__ is not device.array_type and not isinstance(y, Stored):
        y = device.xp.asarray(y)  # NumPy gives a scalar where no axis is left
    if (watch := watcher.get()) is not None:
        watch(op, inputs, y)
    result = Tensor.__new__(Tensor)  # no check: the array comes from an op
    result.data = y
    if True not in needs:
        result.node = None  # the op dies here, with all it saved: frozen parts of a network cost nothing
        return result
    if op.saved or op.moves:  # a view of a parameter's array, such as W.T, is that array for whoever saves it
        op.leaves = leaves_in(inputs)
    op.sources = sources
    op.order = next(_clock)
    op.shape = y.shape
    result.node = op
    return result


def leaves_in(inputs: Sequence[Any]) -> list[tuple[Parameter, Array, int]]:
    """The parameters among the inputs of an operation, and behind those that moves only: with their arrays and versions."""
    leaves = []
    for x in inputs:
        if x.__class__ is Parameter:
            leaves.append((x, x.data, x.version))
        elif x.__class__ is Tensor and isinstance(x.node, Op) and x.node.moves:
            leaves += x.node.leaves
    return leaves


def shape_of(x: Any) -> tuple[int, ...]:
    """The shape of a tensor or array; `DTypeError` for anything else, such as a list."""
    try:
        return tuple(x.shape)
    except AttributeError:
        raise DTypeError(f"expected a tensor or an array, got {type(x).__name__}: "
                         "make one with minilora.tensor(value)") from None


def floating(x: Any) -> Any:
    """`x` itself; `DTypeError` if it holds integers or booleans, which NumPy would promote to float64."""
    if getattr(x, "dtype", None) is None or x.dtype.kind not in "fc":
        raise DTypeError(f"expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}: "
                         "convert it with minilora.tensor(value, dtype='float32')")
    return x


def check_alike(op_class: type, first: Array, other: Array) -> None:
    """Raise `DeviceError` or `DTypeError` if two inputs of an operation do not go together; numbers and None always do."""
    if other is None or other.__class__ is float or other.__class__ is int:
        return
    devices = backend.device_of(first), backend.device_of(other)
    described = " and ".join(f"{a.dtype} {a.shape} on the {d.name}" for a, d in zip((first, other), devices))
    if devices[0] is not devices[1]:
        raise DeviceError(f"{op_class.__name__}: inputs on two devices: {described}. Nothing is copied silently: move "
                          "an array with minilora.to_device(array), a tensor with minilora.tensor(x.numpy()), a model with "
                          "model.to(device)")
    together = getattr(op_class, "composed", False) or mixing.get() and first.dtype.char + other.dtype.char in ("ef", "fe")
    if first.dtype != other.dtype and not together:
        raise DTypeError(f"{op_class.__name__}: inputs of two dtypes: {described}. Nothing is promoted silently: "
                         "convert the data with .astype(...), or the model with model.to(dtype=...)")


def newest() -> int:
    """A creation number that all operations so far are below, and all later ones above."""
    return next(_clock)


from .tensor import Parameter, Tensor  # noqa: E402  (last: of tensor, engine and walk, which need each other, any may be first)
from .walk import backward  # noqa: E402
