"""The same numbers in another dtype: the one place where a dtype changes, and it is always asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from .. import backend
from ..engine import Op, apply, shape_of
from ..errors import DTypeError

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

    from ..tensor import Tensor
    from ..typing import TensorLike

Array = Any


class Cast(Op):
    """y = x, rounded to another floating-point dtype. dx = dy, in the dtype of x. Keeps nothing.

    Rounding is a staircase whose true slope is 0 or infinite; dx is that of y = x, which it follows. To its own dtype, x
    passes as it is, without a copy.
    """

    rounds = False
    moves = True
    to: numpy.dtype[Any]
    was: numpy.dtype[Any]

    def forward(self, x: Array) -> Array:
        self.was = x.dtype
        # a complex step stays one: complex64 for float16 and float32, complex128 for float64
        return x.astype(self.xp.result_type(self.to, self.xp.complex64) if x.dtype.kind == "c" else self.to, copy=False)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        return (dy.astype(self.was, copy=False),)


def cast(x: TensorLike, dtype: DTypeLike) -> Tensor:
    """x in another dtype; see `Cast`.

    Parameters
    ----------
    x : Tensor or array
        Of numbers or booleans.
    dtype : dtype
        Floating-point: the gradient comes back in the dtype of x. Integer or bool: whole numbers do not move with x, so the
        result is a constant, outside the graph.

    Raises
    ------
    DTypeError
        If `dtype` names no dtype of numbers or booleans.

    Examples
    --------
    >>> import minilora
    >>> w = minilora.Parameter(minilora.backend.asarray([0.1, 2.0], "float16"))
    >>> y = cast(w, "float32")
    >>> (y * y).sum().backward()
    >>> y.dtype.name, w.grad
    ('float32', array([0.2, 4. ], dtype=float16))
    """
    shape_of(x)
    try:
        to = backend.cpu.xp.dtype(dtype)
    except TypeError:
        to = None
    if dtype is None or to is None or to.kind not in "fiub":
        raise DTypeError(f'cast: expected a dtype of numbers, such as "float32", got {dtype!r}')
    constant = to.kind != "f" and hasattr(x, "node")
    return apply(Cast, x.detach() if constant else x, to=to)  # type: ignore[attr-defined]
