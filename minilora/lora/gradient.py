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

Source: Hu et al. 2021, arXiv 2106.09685, section 4.1. The same derivation with a worked example: docs/lora_gradients.md.
"""

from __future__ import annotations

import math
from typing import Any

from ..backend import add_matmul
from ..engine import Op, apply
from ..errors import ConfigError, ShapeError
from ..ops.linear import check_linear, rows
from ..tensor import Tensor

__all__ = ["LoRALinear", "delta", "lora_linear", "scaling"]

Array = Any


def scaling(lora_alpha: float, r: int) -> float:
    """s = lora_alpha / r, the factor of the low-rank update. A Python float, so that it promotes no array.

    Raises
    ------
    ConfigError
        If r is not an int >= 1, or lora_alpha is not finite or is 0.

    Examples
    --------
    >>> scaling(16, 8)
    2.0
    """
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ConfigError(f"r must be an int >= 1, got {r!r}: it is the rank of the update, the number of rows of A")
    if isinstance(lora_alpha, bool) or not isinstance(lora_alpha, (int, float)) or not math.isfinite(lora_alpha):
        raise ConfigError(f"lora_alpha must be a finite number, got {lora_alpha!r}")
    if lora_alpha == 0:
        raise ConfigError("lora_alpha must not be 0: the scaling lora_alpha / r would be 0 and nothing would ever train")
    return float(lora_alpha) / r


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
    return (s * B) @ A


class LoRALinear(Op):
    """y = x W^T + b + s (x' A^T) B^T          W, b as in `Linear`, here usually frozen

    x' is the adapter's own input: x itself, or dropout(x). The formulas are those at the top of this file, with x' in the
    place of x wherever A is; without dropout x' = x, and its gradient joins dx:

        z = x' A^T        u = dy B        dB = s dy^T z        dA = s u^T x'
        dx = dy W  (+ s u A if x' = x)        dx' = s u A        dW = dy^T x        db = sum over rows of dy

    Keeps x' and z (and x, if it is another array and W is trained).
    """

    s: float
    in_shape: tuple[int, ...]

    def forward(self, x: Array, W: Array, b: Array | None, A: Array, B: Array, x_dropped: Array | None) -> Array:
        needs_x, needs_W, _, needs_A, needs_B, needs_dropped = self.needs
        self.in_shape = x.shape
        x2 = rows(x)
        adapter_x = x2 if x_dropped is None else rows(x_dropped)
        z = adapter_x @ A.T
        y = x2 @ W.T
        if b is not None:
            y += b
        add_matmul(y, z, B.T, self.s)  # y += s z B^T, into the array just made
        self.save(x2 if needs_W else None, adapter_x if needs_A else None, W if needs_x else None,
                  A if needs_x or needs_dropped else None, B if needs_x or needs_dropped or needs_A else None,
                  z if needs_B else None)
        return y.reshape(x.shape[:-1] + W.shape[:1])

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        needs_x, needs_W, needs_b, needs_A, needs_B, needs_dropped = self.needs
        x, adapter_x, W, A, B, z = self.saved
        s, dy = self.s, rows(dy)
        dx = dW = db = dA = dB = dx_dropped = None
        if B is not None:
            u = dy @ B
        if needs_B:
            dB = dy.T @ (s * z)
        if needs_A:
            dA = (s * u).T @ adapter_x
        if needs_dropped:
            dx_dropped = ((s * u) @ A).reshape(self.in_shape)
        if needs_x:
            dx = dy @ W
            if not needs_dropped:
                add_matmul(dx, u, A, s)
            dx = dx.reshape(self.in_shape)
        if needs_W:
            dW = self.xp.matmul(dy.T, x, out=self.into(1))
        if needs_b:
            db = dy.sum(axis=0)
        return dx, dW, db, dA, dB, dx_dropped


def lora_linear(x: Any, W: Any, b: Any, A: Any, B: Any, s: float, x_dropped: Any = None) -> Tensor:
    """x W^T + b + s (x' A^T) B^T with x' = `x_dropped`, or x if that is None; see `LoRALinear`.

    Parameters
    ----------
    x : Tensor, shape (..., in)
    W : Tensor, shape (out, in)
    b : Tensor, shape (out,), or None
    A : Tensor, shape (r, in)
    B : Tensor, shape (out, r)
    s : float
        From `scaling`.
    x_dropped : Tensor, shape (..., in), optional
        dropout(x).

    Raises
    ------
    ShapeError
        If the shapes do not fit together.
    """
    check_linear(x, W, b)
    (out, n_in), r = W.shape, A.shape[0]
    if tuple(A.shape) != (r, n_in) or tuple(B.shape) != (out, r):
        raise ShapeError(f"lora: for a weight {(out, n_in)} expected A (r, {n_in}) and B ({out}, r), got A {tuple(A.shape)} "
                         f"and B {tuple(B.shape)}. Some sources store A as (in, r): transpose it once when loading")
    if x_dropped is not None and x_dropped.shape != x.shape:
        raise ShapeError(f"lora: the adapter's input must have the shape of x {tuple(x.shape)}, got {tuple(x_dropped.shape)}")
    return apply(LoRALinear, x, W, b, A, B, x_dropped, s=s)
