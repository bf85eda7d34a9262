"""Arithmetic, element by element, with NumPy's broadcasting.

>>> import minilora
>>> from minilora import ops
>>> x = minilora.tensor([1.0, 4.0])
>>> [f(x, 2.0).numpy().tolist() for f in (ops.add, ops.sub, ops.mul, ops.div, ops.pow)]
[[3.0, 6.0], [-1.0, 2.0], [2.0, 8.0], [0.5, 2.0], [1.0, 16.0]]
>>> [y.numpy().tolist() for y in (ops.neg(x), ops.sqrt(x), ops.exp(x * 0.0), ops.log(x / x))]
[[-1.0, -4.0], [1.0, 2.0], [1.0, 1.0], [0.0, 0.0]]
"""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Any

from ..engine import Op, apply, floating, shape_of
from ..errors import DTypeError, MiniloraError, ShapeError
from ..values import number

if TYPE_CHECKING:
    from ..tensor import Tensor
    from ..typing import Operand, TensorLike

Array = Any


def unbroadcast(dy: Array, shape: tuple[int, ...]) -> Array:
    """Sum where broadcasting copied: the gradient of a broadcast operand, in the operand's own shape.

    Broadcasting copies an element along the axes that were added in front or had length 1. Each copy contributes its own
    gradient, and the gradient of the element is their sum.

    Parameters
    ----------
    dy : array
        Gradient in the broadcast shape.
    shape : tuple of int
        The operand's shape.

    Returns
    -------
    array, shape `shape`
        `dy` itself if nothing was broadcast.
    """
    if dy.shape == shape:
        return dy
    added = dy.ndim - len(shape)
    stretched = tuple(i + added for i, n in enumerate(shape) if n == 1 and dy.shape[i + added] != 1)
    return dy.sum(axis=tuple(range(added)) + stretched, keepdims=True).reshape(shape)


class Binary(Op):
    """What the four operations on two broadcast inputs share: their shapes."""

    shapes: tuple[tuple[int, ...], tuple[int, ...]]

    def remember_shapes(self, x1: Array, x2: Array) -> None:
        try:
            self.shapes = x1.shape, x2.shape
        except AttributeError:  # a Python number broadcasts like a 0-d array
            self.shapes = getattr(x1, "shape", ()), getattr(x2, "shape", ())


class Add(Binary):
    """y = x1 + x2 (broadcast). dx1 = dx2 = dy, summed where broadcast. Keeps nothing."""

    def forward(self, x1: Array, x2: Array) -> Array:
        self.remember_shapes(x1, x2)
        return x1 + x2

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        s1, s2 = self.shapes
        return (unbroadcast(dy, s1) if self.needs[0] else None,
                unbroadcast(dy, s2) if self.needs[1] else None)


class Sub(Binary):
    """y = x1 - x2 (broadcast). dx1 = dy, dx2 = -dy, summed where broadcast. Keeps nothing."""

    def forward(self, x1: Array, x2: Array) -> Array:
        self.remember_shapes(x1, x2)
        return x1 - x2

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        s1, s2 = self.shapes
        return (unbroadcast(dy, s1) if self.needs[0] else None,
                unbroadcast(-dy, s2) if self.needs[1] else None)


class Mul(Binary):
    """y = x1 x2 (broadcast). dx1 = dy x2, dx2 = dy x1, summed where broadcast. Keeps a factor only for the other's gradient."""

    def forward(self, x1: Array, x2: Array) -> Array:
        self.remember_shapes(x1, x2)
        self.save(x1 if self.needs[1] else None, x2 if self.needs[0] else None)
        return x1 * x2

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        x1, x2 = self.saved
        s1, s2 = self.shapes
        return (unbroadcast(dy * x2, s1) if self.needs[0] else None,
                unbroadcast(dy * x1, s2) if self.needs[1] else None)


class Div(Binary):
    """y = x1 / x2 (broadcast). dx1 = dy / x2, dx2 = -dy x1 / x2^2 = -dy y / x2, summed where broadcast."""

    def forward(self, x1: Array, x2: Array) -> Array:
        self.remember_shapes(x1, x2)
        y = x1 / x2
        self.save(x2, y if self.needs[1] else None)
        return y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        x2, y = self.saved
        s1, s2 = self.shapes
        dx1 = dy / x2
        return (unbroadcast(dx1, s1) if self.needs[0] else None,
                unbroadcast(-dx1 * y, s2) if self.needs[1] else None)


class Neg(Op):
    """y = -x. dx = -dy."""

    moves = True

    def forward(self, x: Array) -> Array:
        return -x

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        return (-dy,)


def power(x: Array, exponent: float) -> Array:
    """x^exponent. A complex x is multiplied out where it can be: CuPy takes e^(p log x), in which a complex step is lost."""
    if x.dtype.kind != "c" or exponent != int(exponent) or exponent == 0:
        return x ** exponent
    y = functools.reduce(operator.mul, [x] * abs(int(exponent)), 1.0)
    return y if exponent > 0 else 1.0 / y


class Pow(Op):
    """y = x^p for a number p. dx = dy p x^(p-1)."""

    rounds = False
    exponent: float

    def forward(self, x: Array) -> Array:
        self.save(x)
        return power(x, self.exponent)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        (x,) = self.saved
        if self.exponent == 0:
            return (self.xp.zeros_like(dy),)  # p x^(p-1) would be 0 / 0 at x = 0
        return (dy * (self.exponent * power(x, self.exponent - 1)),)


class Exp(Op):
    """y = e^x. dx = dy y."""

    rounds = False

    def forward(self, x: Array) -> Array:
        y = self.xp.exp(x)
        self.save(y)
        return y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        (y,) = self.saved
        return (dy * y,)


class Log(Op):
    """y = ln x. dx = dy / x."""

    def forward(self, x: Array) -> Array:
        self.save(x)
        return self.xp.log(x)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        (x,) = self.saved
        return (dy / x,)


class Sqrt(Op):
    """y = x^(1/2). dx = dy / (2 y)."""

    def forward(self, x: Array) -> Array:
        y = self.xp.sqrt(x)
        self.save(y)
        return y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        (y,) = self.saved
        return (0.5 * dy / y,)


def explain(name: str, x1: Any, x2: Any, error: Exception) -> Exception:
    """NumPy's complaint about two operands as one of ours."""
    if isinstance(error, MiniloraError):
        return error
    if x1 is None or x2 is None:
        return DTypeError(f"{name}: one of the two operands is None")
    shapes = [() if isinstance(x, (int, float)) else shape_of(x) for x in (x1, x2)]
    return ShapeError(f"{name}: shapes {shapes[0]} and {shapes[1]} do not broadcast: aligned at the right, two lengths must be "
                      f"equal or one of them 1 ({error})")


def add(x1: Operand, x2: Operand) -> Tensor:
    """x1 + x2, broadcast; see `Add`."""
    try:
        return apply(Add, x1, x2)
    except (ValueError, TypeError) as error:
        raise explain("add", x1, x2, error) from error


def sub(x1: Operand, x2: Operand) -> Tensor:
    """x1 - x2, broadcast; see `Sub`."""
    try:
        return apply(Sub, x1, x2)
    except (ValueError, TypeError) as error:
        raise explain("sub", x1, x2, error) from error


def mul(x1: Operand, x2: Operand) -> Tensor:
    """x1 x2 element by element, broadcast; see `Mul`."""
    try:
        return apply(Mul, x1, x2)
    except (ValueError, TypeError) as error:
        raise explain("mul", x1, x2, error) from error


def div(x1: Operand, x2: Operand) -> Tensor:
    """x1 / x2 element by element, broadcast; see `Div`."""
    try:
        return apply(Div, x1, x2)
    except (ValueError, TypeError) as error:
        raise explain("div", x1, x2, error) from error


def neg(x: TensorLike) -> Tensor:
    """-x; see `Neg`."""
    return apply(Neg, x)


def pow(x: TensorLike, exponent: float) -> Tensor:
    """x^exponent for a number; see `Pow`.

    Raises
    ------
    DTypeError
        If the exponent is no real number.
    """
    exponent = number(exponent)
    if type(exponent) not in (int, float):
        raise DTypeError(f"pow: the exponent must be a number, got {type(exponent).__name__}: "
                         "for two tensors write ops.exp(y * ops.log(x))")
    return apply(Pow, x, exponent=exponent)


def exp(x: TensorLike) -> Tensor:
    """e^x; see `Exp`."""
    return apply(Exp, floating(x))


def log(x: TensorLike) -> Tensor:
    """Natural logarithm; see `Log`."""
    return apply(Log, floating(x))


def sqrt(x: TensorLike) -> Tensor:
    """Square root; see `Sqrt`."""
    return apply(Sqrt, floating(x))
