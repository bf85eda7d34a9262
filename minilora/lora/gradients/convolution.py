"""The gradient of a low-rank update of a convolution: that of `gradient`, with the columns of x in place of its rows.

Shapes: x (N, C, *lengths), W (O, C/groups, *kernel), b (O), A (r, C/groups, *kernel), B (O, r/groups, 1) or (.., 1, 1),
y (N, O, *outputs), s a number. As in `ops.conv`, T is the number of outputs of one sample, K that of kernel places, and L is
the loss, dy = dL/dy.

The update is a pair of convolutions: A, with the kernel, stride, padding and dilation of the base, takes the C channels to r;
B, which looks at one place only, takes the r channels to O. Element by element, for one spatial axis and one group (n a sample,
o an output channel, c an input channel, j a rank, t an output, k a kernel place; with two axes t, k and i are pairs):

    z_njt = sum_c sum_k x_nci A_jck                                i = t stride + k dilation - padding; x is 0 outside
    y_not = sum_c sum_k x_nci W_ock + b_o + s sum_j z_njt B_oj

Backward: every path from a letter to L goes through y, so sum dy over the y's that the letter meets.

    B_oj meets y_not in every sample and output:      dL/dB_oj = sum_n sum_t dy_not s z_njt
    z_njt meets y_not in every output channel:        dL/dz_njt = s sum_o dy_not B_oj      call u_njt = sum_o dy_not B_oj
    A_jck meets z_njt in every sample and output:     dL/dA_jck = s sum_n sum_t u_njt x_nci
    x_nci meets every y_not and every z_njt, for every (t, k) with t stride + k dilation - padding = i:
                                                      dL/dx_nci = sum_(t,k) (sum_o dy_not W_ock + s sum_j u_njt A_jck)

Gathered into matrices, with X (C K, T N) holding x_nci at row (c, k) and column (t, n), W as (O, C K), A as (r, C K), B as
(O, r), and y and dy as Y and dY (O, T N):

    Z = A X                     (r, T N)      kept: makes dB one product
    Y = W X + b + s B Z
    U = B^T dY                  (r, T N)      used twice
    dB = s dY Z^T               (O, r)
    dA = s U X^T                (r, C K)
    dX = W^T dY + s A^T U       (C K, T N),   and dx is the sum of the elements of dX that are copies of it
    db = sums of dY along its rows; dW = dY X^T only if W is trained as well

These are the lines of `gradient` for a linear layer whose rows are the columns of X: x := X^T, y := Y^T, z := Z^T, u := U^T.
X is made once for W and A, and dX is summed to dx once, where two convolutions side by side do both twice.

The delta D = s B A (O, C K) has rank r at most. In the shape of W it is the weight of a convolution, and Y = (W + D) X + b: so
with G = dY X^T, the gradient of the merged weight, dA = s B^T G and dB = s G A^T.

With groups, channels, ranks and outputs come in `groups` equal parts. Each is a layer with its own W, A (r/groups, C/groups K)
and B (O/groups, r/groups): the same lines, part by part, and each part of D has rank r/groups at most.

Source: Hu et al. 2021, arXiv 2106.09685, for the update; Yeh et al. 2023, arXiv 2309.14859, for this form of it, which PEFT
shares where groups and dilation are 1 (its A has neither). loralib's convolution is another: it reshapes a product of
(O k, r k) and (r k, C k) to the weight's shape, and so is no pair of convolutions.
"""

from __future__ import annotations

import math
from typing import Any

from ...backend import add_matmul
from ...engine import apply, floating, shape_of
from ...errors import ConfigError, ShapeError
from ...ops.conv import Convolution, by_channel, check_conv, parts, room_in, settle, total, weights
from ...ops.grouped import by_group, product
from ...ops.window import Window
from ...tensor import Tensor

__all__ = ["LoRAConv", "lora_conv1d", "lora_conv2d"]

Array = Any


def add_product(out: Array, a: Array, b: Array, s: float, xp: Any) -> None:
    """out += s a b, matrix by matrix: out (G, p, q), a (G, p, k), b (G, k, q)."""
    if len(out) == 1:
        add_matmul(out[0], a[0], b[0], s)
    else:
        out += product(s * a, b, xp)


def transposed(matrices: Array | None) -> Array | None:
    """(G, p, q) as (G, q, p): a view. None stays None."""
    return None if matrices is None else matrices.swapaxes(1, 2)


class LoRAConv(Convolution):
    """Y = W X + b + s B (A X), with X the columns of x, and the gradients derived at the top of this file.

    Keeps x if A or W is trained, Z (T N r numbers) if B is, and of W, A and B, without a copy, what backward multiplies by.
    Samples are taken in parts, as in `ops.Conv`: X is made once for a part in forward, and once more in backward if A or W is
    trained; nothing of the size of W is ever made, unless W is trained.
    """

    s: float

    def forward(self, x: Array, W: Array, b: Array | None, A: Array, B: Array) -> Array:
        needs_x, needs_W, _, needs_A, needs_B = self.needs
        groups, xp, outputs = self.groups, self.xp, self.window.out(x.shape[2:])
        T = math.prod(outputs)
        y = xp.empty((len(x), W.shape[0], *outputs), dtype=x.dtype)
        kept = xp.empty((len(A), len(x) * T), dtype=x.dtype) if needs_B else None
        base, down, up, X = weights(W, groups), weights(A, groups), weights(B, groups), None
        for some in parts(len(x), T, self.at_once):
            X = self.columns(x[some], X)
            Z = product(down, by_group(X, groups), xp)
            Y = product(base, by_group(X, groups), xp, out=room_in(y[some], groups))
            add_product(Y, up, Z, self.s, xp)
            settle(Y, b, y[some])
            if kept is not None:
                kept[:, some.start * T:some.stop * T] = Z.reshape(len(A), Z.shape[2])
        self.in_shape = x.shape
        self.save(x if needs_A or needs_W else None, kept, W if needs_x else None, A if needs_x else None,
                  B if needs_x or needs_A else None)
        return y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        needs_x, needs_W, needs_b, needs_A, needs_B = self.needs
        x, Z, W, A, B = self.saved
        groups, xp, s, T, window = self.groups, self.xp, self.s, math.prod(dy.shape[2:]), self.window
        W_T, A_T, B_T = (None if M is None else transposed(weights(M, groups)) for M in (W, A, B))
        dx: Array = xp.zeros(self.in_shape, dtype=dy.dtype) if needs_x else None
        dW_T = dA_T = dB = X = None  # dW^T and dA^T: see `ops.Conv`
        for some in parts(len(dy), T, self.at_once) if needs_x or needs_W or needs_A or needs_B else ():
            dY = by_group(by_channel(dy[some]), groups)
            if needs_B:
                z = by_group(Z[:, some.start * T:some.stop * T], groups)
                dB = total(dB, product(dY, transposed(z), xp), xp)
            if needs_A or needs_W:
                X = self.columns(x[some], X)
            if needs_W:
                dW_T = total(dW_T, product(by_group(X, groups), transposed(dY), xp), xp)
            if needs_A or needs_x:
                U = product(B_T, dY, xp)
            if needs_A:
                dA_T = total(dA_T, product(by_group(X, groups), transposed(U), xp), xp)
            if needs_x:
                dX = product(W_T, dY, xp)
                add_product(dX, A_T, U, s, xp)
                self.from_columns(dX, dx[some])
        return (dx, self.weight_gradient(1, transposed(dW_T), window.kernel),
                dy.sum(axis=(0, *range(2, dy.ndim))) if needs_b else None,
                self.weight_gradient(3, transposed(dA_T), window.kernel, s),
                self.weight_gradient(4, dB, (1,) * (dy.ndim - 2), s))


def lora_conv1d(x: Any, W: Any, b: Any, A: Any, B: Any, s: float, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
                groups: int = 1) -> Tensor:
    """conv1d(x, W) + b + s conv1d(conv1d(x, A), B), with A and W sharing every setting; see `LoRAConv`.

    Parameters
    ----------
    x : Tensor, shape (N, C, length)
    W : Tensor, shape (O, C / groups, kernel)
    b : Tensor, shape (O,), or None
    A : Tensor, shape (r, C / groups, kernel)
    B : Tensor, shape (O, r / groups, 1)
    s : float
        From `scaling`.
    stride, padding, dilation, groups : int
        As in `ops.conv1d`. `groups` divides r as well: each group is a layer of its own, with r / groups ranks.

    Returns
    -------
    Tensor, shape (N, O, (length + 2 padding - dilation (kernel - 1) - 1) // stride + 1)

    Raises
    ------
    ShapeError
        If the shapes do not fit together, or the kernel is longer than the padded input.
    ConfigError
        If a setting is no int in its range, or `groups` does not divide O and r.

    Examples
    --------
    >>> import numpy, minilora
    >>> x = minilora.tensor([[[1.0, 2.0, 4.0, 8.0]]], "float64")
    >>> W, A, B = numpy.zeros((2, 1, 2)), numpy.array([[[-1.0, 1.0]]]), numpy.array([[[1.0]], [[10.0]]])
    >>> lora_conv1d(x, W, None, A, B, s=0.5).data
    array([[[ 0.5,  1. ,  2. ],
            [ 5. , 10. , 20. ]]])
    """
    window = check_lora_conv("lora_conv1d", 1, x, W, b, A, B, stride, padding, dilation, groups)
    return apply(LoRAConv, floating(x), W, b, A, B, s=s, window=window, groups=int(groups))


def lora_conv2d(x: Any, W: Any, b: Any, A: Any, B: Any, s: float, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
                groups: int = 1) -> Tensor:
    """conv2d(x, W) + b + s conv2d(conv2d(x, A), B), with A and W sharing every setting; see `LoRAConv`.

    Parameters
    ----------
    x : Tensor, shape (N, C, height, width)
    W : Tensor, shape (O, C / groups, kernel height, kernel width)
    b : Tensor, shape (O,), or None
    A : Tensor, shape (r, C / groups, kernel height, kernel width)
    B : Tensor, shape (O, r / groups, 1, 1)
    s : float
        From `scaling`.
    stride, padding, dilation : int or (int, int)
        As in `ops.conv2d`.
    groups : int
        Divides C, O and r: each group is a layer of its own, with r / groups ranks.

    Returns
    -------
    Tensor, shape (N, O, output height, output width)

    Raises
    ------
    ShapeError
        If the shapes do not fit together, or the kernel is longer than the padded input.
    ConfigError
        If a setting is no int in its range, or `groups` does not divide O and r.

    Examples
    --------
    >>> import numpy, minilora
    >>> x = minilora.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], "float64")
    >>> W, A, B = numpy.zeros((1, 1, 1, 2)), numpy.array([[[[1.0, 10.0]]]]), numpy.array([[[[1.0]]]])
    >>> lora_conv2d(x, W, None, A, B, s=2.0).data
    array([[[[42.],
             [86.]]]])
    """
    window = check_lora_conv("lora_conv2d", 2, x, W, b, A, B, stride, padding, dilation, groups)
    return apply(LoRAConv, floating(x), W, b, A, B, s=s, window=window, groups=int(groups))


def check_lora_conv(name: str, axes: int, x: Any, W: Any, b: Any, A: Any, B: Any, stride: Any, padding: Any, dilation: Any,
                    groups: Any) -> Window:
    """The window of a convolution with weight W and update (A, B), if all fits together; else `ShapeError` or `ConfigError`."""
    window = check_conv(name, axes, x, W, b, stride, padding, dilation, groups)
    W_shape, A_shape, B_shape, groups = shape_of(W), shape_of(A), shape_of(B), int(groups)
    r = A_shape[0] if A_shape else 0
    if len(A_shape) == axes + 2 and r % groups:
        raise ConfigError(f"{name}: groups={groups} does not divide the rank r={r} of A {A_shape}: each group has r / groups "
                          f"ranks of its own. Take a multiple of {groups}, such as r={math.ceil(r / groups) * groups}")
    if A_shape[1:] != W_shape[1:] or B_shape != (W_shape[0], r // groups, *(1,) * axes):
        per_group = "r" if groups == 1 else f"r / {groups}"
        ones, kernel = ", ".join("1" * axes), ", ".join(map(str, W_shape[1:]))
        cause = (" Was it trained by PEFT? There A looks at every channel, across groups: that is no weight of this layer"
                 if groups > 1 and A_shape[1:2] == shape_of(x)[1:2] else
                 " Is B stored as a matrix? Give it a kernel of one place with B.reshape(...)" if len(B_shape) == 2 else "")
        raise ShapeError(f"{name}: for a weight {W_shape} expected A (r, {kernel}) and B ({W_shape[0]}, {per_group}, {ones}), "
                         f"got A {A_shape} and B {B_shape}.{cause}")
    return window
