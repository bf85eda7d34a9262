"""Softmax and its logarithm, along one axis.

>>> import minilora
>>> from minilora import ops
>>> x = minilora.tensor([[0.0, 0.0], [1000.0, 0.0]])
>>> ops.softmax(x).numpy().tolist(), ops.log_softmax(x).numpy()[1].tolist()
([[0.5, 0.5], [1.0, 0.0]], [0.0, -1000.0])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..engine import Op, apply, floating, shape_of
from .reduce import normal_axes

if TYPE_CHECKING:
    from ..tensor import Tensor
    from ..typing import TensorLike

Array = Any


def below_largest(x: Array, axis: int) -> Array:
    """x less its largest element along an axis; nothing stays nothing."""
    return x - x.max(axis=axis, keepdims=True) if x.size else x.copy()


class Softmax(Op):
    """y_i = e^(x_i) / sum_j e^(x_j) along one axis.

    dy_i/dx_j = y_i ([i = j] - y_j), so dx = y (dy - sum_i dy_i y_i). The largest x is subtracted first: it cancels, and
    nothing overflows. Keeps y.
    """

    axis: int

    def forward(self, x: Array) -> Array:
        y = below_largest(x, self.axis)
        self.xp.exp(y, out=y)
        y /= y.sum(axis=self.axis, keepdims=True)
        self.save(y)
        return y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        (y,) = self.saved
        dx = dy * y
        dx -= y * dx.sum(axis=self.axis, keepdims=True)
        return (dx,)


class LogSoftmax(Op):
    """y_i = x_i - log sum_j e^(x_j) along one axis, with the largest x subtracted first.

    dy_i/dx_j = [i = j] - e^(y_j), so dx = dy - e^y sum_i dy_i. Keeps y.
    """

    rounds = False
    axis: int

    def forward(self, x: Array) -> Array:
        y = below_largest(x, self.axis)
        if y.size:  # the logarithm of an empty sum would warn
            y -= self.xp.log(self.xp.exp(y).sum(axis=self.axis, keepdims=True))
        self.save(y)
        return y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        (y,) = self.saved
        return (dy - self.xp.exp(y) * dy.sum(axis=self.axis, keepdims=True),)


def softmax(x: TensorLike, axis: int = -1) -> Tensor:
    """Positive numbers that sum to 1 along `axis`; see `Softmax`."""
    normal_axes("softmax", shape_of(x), axis)
    return apply(Softmax, floating(x), axis=axis)


def log_softmax(x: TensorLike, axis: int = -1) -> Tensor:
    """Logarithm of the softmax along `axis`, finite where the softmax underflows; see `LogSoftmax`."""
    normal_axes("log_softmax", shape_of(x), axis)
    return apply(LogSoftmax, floating(x), axis=axis)
