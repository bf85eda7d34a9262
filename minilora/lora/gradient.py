"""The gradient of a low-rank update, derived by hand. The file that this project is about.

Shapes: x (N, in), W (out, in), b (out), A (r, in), B (out, r), y (N, out), s a number. L is the loss, dy = dL/dy.

Forward, element by element (n a row, k an output, i an input, j a rank):

    z_nj = sum_i x_ni A_ji
    y_nk = sum_i x_ni W_ki + b_k + s sum_j z_nj B_kj

Backward: every path from a letter to L goes through y, so sum dy over the y's that the letter meets.

    B_kj meets y_nk in every row n:           dL/dB_kj = sum_n dy_nk s z_nj
    z_nj meets y_nk in every output k:        dL/dz_nj = s sum_k dy_nk B_kj           call u_nj = sum_k dy_nk B_kj
    A_ji meets z_nj in every row n:           dL/dA_ji = sum_n dL/dz_nj x_ni = s sum_n u_nj x_ni
    x_ni meets every y_nk and every z_nj:     dL/dx_ni = sum_k dy_nk W_ki + s sum_j u_nj A_ji

Gathered into matrices:

    z = x A^T            (N, r)     kept: makes dB one product
    y = x W^T + b + s z B^T
    u = dy B             (N, r)     used twice
    dB = s dy^T z        (out, r)
    dA = s u^T x         (r, in)
    dx = dy W + s u A    (N, in)    dW is never formed

The delta D = s B A has rank r at most, and y = x (W + D)^T + b: so with G = dy^T x, the gradient of the merged weight,
dA = s B^T G and dB = s G A^T. The tests use that as an independent check. At the start B = 0, hence u = 0 and dA = 0,
while dB = s dy^T z is not: the first step moves B alone.

With dropout on the adapter's input, x' = dropout(x), the two branches read different arrays: y = (x W^T + b) + s (x' A^T) B^T.
Then z = x' A^T, dA = s u^T x', dx' = s u A and dx = dy W: the frozen branch is `ops.linear`, the other one `LoRAUpdate`.

Source: Hu et al. 2021, arXiv 2106.09685, section 4.1. The same derivation with a worked example: docs/lora_gradients.md.
"""

from __future__ import annotations

import math
import sys
from numbers import Real
from typing import Any

from ..backend import add_matmul, device_of
from ..engine import Op, apply, shape_of
from ..errors import ConfigError, ShapeError
from ..nn.linear import check_size
from ..ops.linear import check_linear, rows, unrows
from ..tensor import Tensor

__all__ = ["LoRALinear", "LoRAUpdate", "delta", "lora_linear", "lora_update", "scaling"]

Array = Any
MAX = sys.float_info.max


def scaling(lora_alpha: float, r: int, use_rslora: bool = False) -> float:
    """s = lora_alpha / r, the factor of the low-rank update. A Python float, so that it promotes no array.

    With `use_rslora`, s = lora_alpha / sqrt(r): then the size of the update does not shrink as r grows (Kalajdzievski 2023,
    arXiv 2312.03732).

    Raises
    ------
    ConfigError
        If r is not an int >= 1, or lora_alpha is not finite or is 0.

    Examples
    --------
    >>> scaling(16, 8)
    2.0
    >>> scaling(16, 64, use_rslora=True)
    2.0
    """
    check_size("r", r)
    alpha = lora_alpha.item() if hasattr(lora_alpha, "item") and isinstance(lora_alpha, Real) else lora_alpha  # NumPy's numbers
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not -MAX < alpha < MAX:
        raise ConfigError(f"lora_alpha must be a finite number, got {lora_alpha!r}")
    if alpha == 0:
        raise ConfigError("lora_alpha must not be 0: the scaling lora_alpha / r would be 0 and nothing would ever train")
    return float(alpha) / (math.sqrt(r) if use_rslora else int(r))


def delta(A: Array, B: Array, s: float) -> Array:
    """D = s B A (out, in): what a low-rank update adds to the weight.

    Parameters
    ----------
    A : array, shape (r, in)
    B : array, shape (out, r)
    s : float

    Returns
    -------
    array, shape (out, in)
    """
    return device_of(A).exact.matmul(s * B, A)


def scaled(x: Array, s: float) -> Array:
    """s x; for s = 1 x itself, which on a GPU spares a launch."""
    return x if s == 1.0 else s * x


class LoRALinear(Op):
    """y = x W^T + b + s (x A^T) B^T, with the gradients derived at the top of this file.

    Keeps x and z: N (in + r) numbers. What is frozen costs nothing: without a trained W or A, x is not kept; below the first
    trained layer dx is not computed, which spares the product dy W.
    """

    rounds = True
    s: float
    in_shape: tuple[int, ...]

    def forward(self, x: Array, W: Array, b: Array | None, A: Array, B: Array) -> Array:
        needs_x, needs_W, _, needs_A, needs_B = self.needs
        self.in_shape = x.shape
        x, dot = rows(x), self.dot
        z = dot(x, A.T)
        y = dot(x, W.T)
        if b is not None:
            y += b
        add_matmul(y, z, B.T, self.s)  # y += s z B^T, into the array just made
        self.save(x if needs_A or needs_W else None, z if needs_B else None,
                  W if needs_x else None, A if needs_x else None, B if needs_x or needs_A else None)
        return unrows(y, self.in_shape)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        needs_x, needs_W, needs_b, needs_A, needs_B = self.needs
        x, z, W, A, B = self.saved
        dx = dW = db = dA = dB = None
        s, dy, dot = self.s, rows(dy), self.dot
        if needs_B:
            dB = dot(dy.T, scaled(z, s), out=self.into(4))
        if needs_A or needs_x:
            u = dot(dy, B)
        if needs_A:
            dA = dot(scaled(u, s).T, x, out=self.into(3))
        if needs_x:
            dx = dot(dy, W)
            add_matmul(dx, u, A, s)
            dx = dx.reshape(self.in_shape)
        if needs_W:  # only if somebody trains the base beside the adapter: the same as in ops.Linear
            dW = dot(dy.T, x, out=self.into(1))
        if needs_b:
            db = dy.sum(axis=0, out=self.into(2))
        return dx, dW, db, dA, dB


class LoRAUpdate(Op):
    """y = s (x A^T) B^T: the update alone, the terms with s of the derivation. Keeps x and z: N (in + r) numbers."""

    rounds = True
    s: float
    in_shape: tuple[int, ...]

    def forward(self, x: Array, A: Array, B: Array) -> Array:
        needs_x, needs_A, needs_B = self.needs
        self.in_shape = x.shape
        x = rows(x)
        z = self.dot(x, A.T)
        y = self.dot(scaled(z, self.s), B.T)
        self.save(x if needs_A else None, z if needs_B else None, A if needs_x else None, B if needs_x or needs_A else None)
        return unrows(y, self.in_shape)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        needs_x, needs_A, needs_B = self.needs
        x, z, A, B = self.saved
        dx = dA = dB = None
        dy = rows(dy)
        if needs_B:
            dB = self.dot(dy.T, scaled(z, self.s), out=self.into(2))
        if needs_A or needs_x:
            su = scaled(self.dot(dy, B), self.s)
        if needs_A:
            dA = self.dot(su.T, x, out=self.into(1))
        if needs_x:
            dx = self.dot(su, A).reshape(self.in_shape)
        return dx, dA, dB


def lora_linear(x: Any, W: Any, b: Any, A: Any, B: Any, s: float) -> Tensor:
    """x W^T + b + s (x A^T) B^T on the last axis of x; see `LoRALinear`.

    Parameters
    ----------
    x : Tensor, shape (..., in)
    W : Tensor, shape (out, in)
    b : Tensor, shape (out,), or None
    A : Tensor, shape (r, in)
    B : Tensor, shape (out, r)
    s : float
        From `scaling`.

    Raises
    ------
    ShapeError
        If the shapes do not fit together.

    Examples
    --------
    >>> import numpy, minilora
    >>> W, A, B = numpy.zeros((2, 3)), numpy.ones((1, 3)), numpy.array([[1.0], [2.0]])
    >>> lora_linear(minilora.tensor([[1.0, 2.0, 3.0]], "float64"), W, None, A, B, s=0.5).data
    array([[3., 6.]])
    """
    check_linear(x, W, b)
    (out, n_in), A_shape, B_shape = W.shape, shape_of(A), shape_of(B)
    if len(A_shape) != 2 or A_shape[1] != n_in or B_shape != (out, A_shape[0]):
        raise ShapeError(f"lora: for a weight {(out, n_in)} expected A (r, {n_in}) and B ({out}, r), got A {A_shape} and "
                         f"B {B_shape}. Some sources store A as (in, r): transpose it once when loading")
    return apply(LoRALinear, x, W, b, A, B, s=s)


def lora_update(x: Any, A: Any, B: Any, s: float) -> Tensor:
    """s (x A^T) B^T on the last axis of x; see `LoRAUpdate`.

    Parameters
    ----------
    x : Tensor, shape (..., in)
    A : Tensor, shape (r, in)
    B : Tensor, shape (out, r)
    s : float
        From `scaling`.

    Raises
    ------
    ShapeError
        If the shapes do not fit together.

    Examples
    --------
    >>> import numpy, minilora
    >>> A, B = numpy.ones((1, 3)), numpy.array([[1.0], [2.0]])
    >>> lora_update(minilora.tensor([[1.0, 2.0, 3.0]], "float64"), A, B, s=0.5).data
    array([[3., 6.]])
    """
    check_linear(x, A, None)
    B_shape = shape_of(B)
    if len(B_shape) != 2 or B_shape[1] != A.shape[0]:
        raise ShapeError(f"lora: beside A {A.shape} expected B (out, {A.shape[0]}), got B {B_shape}. Some sources store B as "
                         "(r, out): transpose it once when loading")
    return apply(LoRAUpdate, x, A, B, s=s)
