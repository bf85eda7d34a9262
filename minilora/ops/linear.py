"""Matrix products.

>>> import minilora
>>> from minilora import ops
>>> x, W = minilora.tensor([[1.0, 2.0]]), minilora.tensor([[3.0, 4.0], [5.0, 6.0]])
>>> ops.linear(x, W).numpy().tolist(), ops.matmul(x, W).numpy().tolist()
([[11.0, 17.0]], [[13.0, 16.0]])
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..engine import Op, apply, shape_of
from ..errors import ShapeError
from .elementwise import unbroadcast

if TYPE_CHECKING:
    from ..tensor import Tensor
    from ..typing import TensorLike

Array = Any


# Products of two matrices are written dot(a, b), not a @ b: NumPy's matmul leaves BLAS when the inner length is 1, as in a
# LoRA of rank 1, and is then five times slower. On two matrices both mean the same.


def rows(x: Array) -> Array:
    """x (..., n) as a matrix (N, n): NumPy and CuPy are both slow on a 3-D array times a 2-D one."""
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def unrows(y: Array, shape: tuple[int, ...]) -> Array:
    """y (N, m) with the leading axes of an input of this shape, which `rows` had joined: y itself where there was one."""
    return y if len(shape) == 2 else y.reshape(shape[:-1] + y.shape[1:])


class MatMul(Op):
    """y = x1 x2, matrix by matrix over any leading axes (broadcast).

    y_ij = sum_k x1_ik x2_kj, so dx1_ik = sum_j dy_ij x2_kj and dx2_kj = sum_i x1_ik dy_ij: dx1 = dy x2^T, dx2 = x1^T dy,
    summed over leading axes that were broadcast. Keeps a factor only for the other's gradient.

    A vector x1 (k) is a matrix of one row, a vector x2 (k) one of one column, and y lacks that axis: without i,
    dx2_kj = x1_k dy_j; without j, dx1_ik = dy_i x2_k and dx2_k = sum_i x1_ik dy_i.
    """

    rounds = True
    shapes: tuple[tuple[int, ...], tuple[int, ...]]

    def forward(self, x1: Array, x2: Array) -> Array:
        self.shapes = x1.shape, x2.shape
        self.save(x1 if self.needs[1] else None, x2 if self.needs[0] else None)
        if x2.ndim <= 2:
            return self.xp.dot(rows(x1), x2).reshape(x1.shape[:-1] + x2.shape[1:])
        return self.xp.matmul(x1, x2)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        x1, x2 = self.saved
        s1, s2 = self.shapes
        if len(s2) == 1:
            dy1 = dy.reshape(-1)
            return ((dy1[:, None] * x2).reshape(s1) if x2 is not None else None,
                    self.xp.dot(rows(x1).T, dy1, out=self.into(1)) if x1 is not None else None)
        if len(s2) == 2:
            dy2 = rows(dy)
            return (self.xp.dot(dy2, x2.T).reshape(s1) if x2 is not None else None,
                    self.xp.dot(rows(x1).T, dy2, out=self.into(1)) if x1 is not None else None)
        if len(s1) == 1:
            dy, x1 = dy[..., None, :], None if x1 is None else x1[None]
        matmul, whole = self.xp.matmul, s1 if len(s1) > 1 else (1, *s1)
        return (unbroadcast(matmul(dy, x2.swapaxes(-1, -2)), whole).reshape(s1) if x2 is not None else None,
                unbroadcast(matmul(x1.swapaxes(-1, -2), dy), s2) if x1 is not None else None)


class Linear(Op):
    """y = x W^T + b          x (..., in) = N rows, W (out, in), b (out)

    y_nk = sum_i x_ni W_ki + b_k. A weight W_ki meets every row, so its gradient sums over them:

        dx = dy W        dW = dy^T x        db = sum over rows of dy

    Keeps x only if W is trained, and W (no copy) only if x wants a gradient.
    """

    rounds = True
    in_shape: tuple[int, ...]

    def forward(self, x: Array, W: Array, b: Array | None) -> Array:
        self.in_shape = x.shape
        self.save(x if self.needs[1] else None, W if self.needs[0] else None)
        y = self.dot(rows(x), W.T)
        if b is not None:
            y += b
        return unrows(y, x.shape)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        x, W = self.saved
        dy = rows(dy)
        return (self.dot(dy, W).reshape(self.in_shape) if self.needs[0] else None,
                self.xp.dot(dy.T, rows(x), out=self.into(1)) if self.needs[1] else None,
                dy.sum(axis=0, out=self.into(2)) if self.needs[2] else None)


def matmul(x1: TensorLike, x2: TensorLike) -> Tensor:
    """x1 @ x2 over any leading axes, as `numpy.matmul`; see `MatMul`.

    Raises
    ------
    ShapeError
        If one of them is a single number, or the inner lengths differ.
    """
    s1, s2 = shape_of(x1), shape_of(x2)
    if not s1 or not s2:
        raise ShapeError(f"matmul needs vectors or matrices, got shapes {s1} and {s2}: a single number multiplies with *")
    if s1[-1] != s2[-2:][0]:
        raise ShapeError(f"matmul: {s1} @ {s2}: the inner lengths {s1[-1]} and {s2[-2:][0]} differ. Is a transpose missing?")
    try:
        return apply(MatMul, x1, x2)
    except ValueError as error:
        raise ShapeError(f"matmul: {s1} @ {s2}: the leading axes {s1[:-2]} and {s2[:-2]} do not broadcast") from error


def linear(x: TensorLike, W: TensorLike, b: TensorLike | None = None) -> Tensor:
    """x W^T + b on the last axis of x; see `Linear`.

    Parameters
    ----------
    x : Tensor, shape (..., in)
    W : Tensor, shape (out, in)
    b : Tensor, shape (out,), optional

    Raises
    ------
    ShapeError
        If x's last axis is not `in`, or b does not fit.
    """
    check_linear(x, W, b)
    return apply(Linear, x, W, b)


def check_linear(x: Any, W: Any, b: Any) -> None:
    """Raise `ShapeError` unless x (..., in), W (out, in) and b (out,) fit together."""
    x_shape, W_shape = shape_of(x), shape_of(W)
    if len(W_shape) != 2:
        raise ShapeError(f"linear: expected a weight (out, in), got shape {W_shape}")
    if not x_shape or x_shape[-1] != W_shape[1]:
        raise ShapeError(f"linear: expected input with last axis {W_shape[1]} (weight {W_shape} is (out, in)), got {x_shape}. "
                         "Is the input transposed, or from another layer?")
    if b is not None and shape_of(b) != W_shape[:1]:
        raise ShapeError(f"linear: expected bias of shape {W_shape[:1]} for weight {W_shape}, got {shape_of(b)}")
