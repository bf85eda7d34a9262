"""Element by element, one of several numbers: their gradients go to the number that was taken.

>>> import minilora
>>> from minilora import ops
>>> x = minilora.tensor([-3.0, 1.0])
>>> [y.numpy().tolist() for y in (ops.abs(x), ops.maximum(x, 0.0), ops.minimum(x, 0.0))]
[[3.0, 1.0], [0.0, 1.0], [-3.0, 0.0]]
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .. import backend
from ..engine import Op, apply, shape_of
from ..errors import ConfigError, DTypeError, ShapeError
from ..values import number
from .elementwise import Binary, explain, unbroadcast
from .indices import beside

if TYPE_CHECKING:
    from ..tensor import Tensor
    from ..typing import Integers, Operand, TensorLike

Array = Any


class Where(Binary):
    """y = a where the condition c holds, else b (all broadcast). da = dy where c holds, else 0; db the other way round.

    Both are summed where broadcast. Keeps the condition only. The condition has no gradient: a small change of what it was
    made from changes nothing, but at a jump.
    """

    moves = True
    condition: Array

    def forward(self, a: Array, b: Array) -> Array:
        self.remember_shapes(a, b)
        return self.xp.where(self.condition, a, b)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        a, b = self.shapes
        return (unbroadcast(self.xp.where(self.condition, dy, 0.0), a) if self.needs[0] else None,
                unbroadcast(self.xp.where(self.condition, 0.0, dy), b) if self.needs[1] else None)


def share(dy: Array, equal: Array, lost: Array, xp: Any) -> Array:
    """One operand's share of dy: half of it where both are equal, nothing where it lost, else all."""
    return xp.where(equal, 0.5 * dy, xp.where(lost, 0.0, dy))


class Maximum(Binary):
    """y = the larger of x1 and x2 (broadcast). dx1 = dy where x1 > x2, dx2 = dy where x2 > x1, summed where broadcast.

    Where both are equal, y has a kink: each of them gets dy / 2, so that nothing is lost and neither is preferred. A NaN wins,
    and is handed on with the gradients of both. Keeps x1 and x2.
    """

    moves = True

    def forward(self, x1: Array, x2: Array) -> Array:
        self.remember_shapes(x1, x2)
        self.save(x1, x2)
        return self.xp.maximum(x1, x2)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        x1, x2 = self.saved
        s1, s2 = self.shapes
        equal = x1 == x2
        return (unbroadcast(share(dy, equal, x1 < x2, self.xp), s1) if self.needs[0] else None,
                unbroadcast(share(dy, equal, x1 > x2, self.xp), s2) if self.needs[1] else None)


class Minimum(Binary):
    """y = the smaller of x1 and x2 (broadcast). dx1 = dy where x1 < x2, dx2 = dy where x2 < x1, summed where broadcast.

    Equal numbers get dy / 2 each, and a NaN wins, as in `Maximum`. Keeps x1 and x2.
    """

    moves = True

    def forward(self, x1: Array, x2: Array) -> Array:
        self.remember_shapes(x1, x2)
        self.save(x1, x2)
        return self.xp.minimum(x1, x2)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        x1, x2 = self.saved
        s1, s2 = self.shapes
        equal = x1 == x2
        return (unbroadcast(share(dy, equal, x1 > x2, self.xp), s1) if self.needs[0] else None,
                unbroadcast(share(dy, equal, x1 < x2, self.xp), s2) if self.needs[1] else None)


class Abs(Op):
    """y = |x|. dx = dy sign x: 0 at the kink x = 0. Keeps x."""

    moves = True

    def forward(self, x: Array) -> Array:
        self.save(x)
        return self.xp.abs(x)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        (x,) = self.saved
        return (dy * self.xp.sign(x),)


class Clip(Op):
    """y = x, but low where x < low and high where x > high. dx = dy where low < x < high, else 0. Keeps x.

    At the kinks, the bounds themselves, dx is 0, as in `ReLU`, which is clip with low = 0, and in PyTorch (2.14). A NaN stays
    one, with dx = 0.
    """

    low: float
    high: float

    def forward(self, x: Array) -> Array:
        self.save(x)
        return self.xp.minimum(self.xp.maximum(x, self.low), self.high)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        (x,) = self.saved
        return (self.xp.where((x > self.low) & (x < self.high), dy, 0.0),)


def where(condition: Integers, a: Operand, b: Operand) -> Tensor:
    """a where the condition holds, else b; see `Where`.

    Parameters
    ----------
    condition : bool, array, Tensor or nested lists of bool
        Broadcasts with a and b; moved to their device if it lies on the host.
    a, b : Tensor, array or number
        Not both numbers.

    Raises
    ------
    DTypeError
        If the condition does not hold booleans.
    ShapeError
        If the three do not broadcast.

    Examples
    --------
    >>> import minilora
    >>> x = minilora.tensor([-1.0, 2.0])
    >>> where(x.data > 0.0, x, 0.0).data
    array([0., 2.], dtype=float32)
    """
    chosen: Array = condition.data if hasattr(condition, "node") else condition  # type: ignore[union-attr]
    if isinstance(chosen, (bool, list, tuple, backend.cpu.xp.bool_)):
        try:
            chosen = backend.cpu.xp.asarray(chosen)
        except ValueError as error:
            raise DTypeError(f"where: the condition makes no array: {error}") from error
    backend.device_of(chosen)
    if chosen.dtype != bool:
        raise DTypeError(f"where: expected a condition of booleans, got {chosen.dtype}: compare, as in x.data > 0")
    if a is None or b is None:
        raise DTypeError("where: one of the two operands is None")
    like = b if isinstance(number(a), (int, float)) else a
    try:
        return apply(Where, a, b, condition=beside(like, chosen))
    except ValueError as error:
        shapes = [chosen.shape, *(() if isinstance(x, (int, float)) else shape_of(x) for x in (a, b))]
        raise ShapeError(f"where: condition {shapes[0]}, a {shapes[1]} and b {shapes[2]} do not broadcast: aligned at the "
                         "right, lengths must be equal or 1") from error


def maximum(x1: Operand, x2: Operand) -> Tensor:
    """The larger of two numbers, element by element, broadcast; see `Maximum`."""
    try:
        return apply(Maximum, x1, x2)
    except (ValueError, TypeError) as error:
        raise explain("maximum", x1, x2, error) from error


def minimum(x1: Operand, x2: Operand) -> Tensor:
    """The smaller of two numbers, element by element, broadcast; see `Minimum`."""
    try:
        return apply(Minimum, x1, x2)
    except (ValueError, TypeError) as error:
        raise explain("minimum", x1, x2, error) from error


def abs(x: TensorLike) -> Tensor:
    """|x|; see `Abs`."""
    return apply(Abs, x)


def clip(x: TensorLike, low: float | None = None, high: float | None = None) -> Tensor:
    """x, held between two numbers; None is no bound. See `Clip`.

    Raises
    ------
    ConfigError
        If a bound is no number, or low is above high.

    Examples
    --------
    >>> import minilora
    >>> clip(minilora.tensor([-3.0, 0.5, 3.0]), -1.0, 1.0).data
    array([-1. ,  0.5,  1. ], dtype=float32)
    """
    try:
        bounds = -math.inf if low is None else float(low), math.inf if high is None else float(high)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"clip: the bounds must be numbers or None, got {low!r} and {high!r}: for arrays write "
                          "ops.minimum(ops.maximum(x, low), high)") from error
    if not bounds[0] <= bounds[1]:
        raise ConfigError(f"clip: low must not be above high, got {low!r} and {high!r}")
    return apply(Clip, x, low=bounds[0], high=bounds[1])
