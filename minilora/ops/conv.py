"""Convolution over one or two spatial axes, as a matrix product.

Shapes: x (N, C, *lengths), W (O, C/groups, *kernel), b (O), y (N, O, *outputs). T is the number of outputs of one sample and K
that of kernel places. L is the loss, dy = dL/dy.

Forward, element by element for one spatial axis and one group (n a sample, o an output channel, c an input channel, t an
output, k a kernel place); with two axes t, k and i are pairs:

    y_not = sum_c sum_k x_nci W_ock + b_o        i = t stride + k dilation - padding; x is 0 outside of its range

Backward: every path from a letter to L goes through y, so sum dy over the y's that the letter meets.

    W_ock meets y_not in every sample and output:            dL/dW_ock = sum_n sum_t dy_not x_nci
    b_o meets y_not in every sample and output:              dL/db_o = sum_n sum_t dy_not
    x_nci meets y_not in every o, for every (t, k) with
    t stride + k dilation - padding = i:                     dL/dx_nci = sum_(t,k) sum_o dy_not W_ock

Gathered into matrices: let X (C K, T N) hold x_nci at row (c, k) and column (t, n). It is linear in x: each element of X is a
copy of one element of x, or a zero of the padding. With W as (O, C K), and y and dy as Y and dY (O, T N):

    Y = W X + b
    dW = dY X^T
    dX = W^T dY,  and dx is the sum of the elements of dX that are copies of it
    db = sums of dY along its rows

`columns` makes X from x and `from_columns` sums dX to dx. With groups, channels and outputs come in `groups` equal parts, each
with its own W: the same products, part by part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..engine import Op, apply, floating, shape_of
from ..errors import ConfigError, ShapeError
from .grouped import by_group, product
from .window import SPATIAL, Window, check_fits, columns, from_columns, is_int, samples_last, window_of

if TYPE_CHECKING:
    from ..tensor import Tensor
    from ..typing import PerAxis, TensorLike

Array = Any


def by_channel(y: Array) -> Array:
    """y (N, O, *outputs) as a matrix (O, T N); a view if N is 1."""
    return samples_last(y).reshape(y.shape[1], math.prod(y.shape[2:]) * y.shape[0])


def weights(W: Array, groups: int) -> Array:
    """W (O, C/groups, *kernel) as matrices (groups, O/groups, C/groups K): a view."""
    return by_group(W.reshape(W.shape[0], math.prod(W.shape[1:])), groups)


def parts(samples: int, outputs: int, at_once: int) -> Iterator[slice]:
    """The samples, in slices of about `at_once` outputs; one empty slice if there is none."""
    step = max(1, at_once // max(outputs, 1))
    return (slice(start, start + step) for start in range(0, max(samples, 1), step))


def room_in(y: Array, groups: int) -> Array | None:
    """y (1, O, *outputs) as matrices (groups, O/groups, T), to write a product into; None if y has more samples than one."""
    return by_group(by_channel(y), groups) if len(y) == 1 else None


def settle(Y: Array, b: Array | None, y: Array) -> None:
    """Add b (O) to Y (groups, O/groups, T N) in place, and write that to y (N, O, *outputs) unless it stands there already."""
    Y = Y.reshape(y.shape[1], Y.shape[2])
    if b is not None:
        Y += b[:, None]
    if len(y) != 1:
        samples_last(y)[...] = Y.reshape(y.shape[1], *y.shape[2:], len(y))


def total(sums: Array | None, new: Array, xp: Any) -> Array:
    """sums + new, in the memory of `sums`; `new` if there are none yet."""
    return new if sums is None else xp.add(sums, new, out=sums)


class Convolution(Op):
    """What operations on the columns X of x share: their settings, and how a weight's gradient is handed out.

    X is K times larger than x, so it is not kept, and backward makes it again: each of its elements is copied once and then
    takes part in 2 O additions and multiplications. Nor does X ever exist as a whole: samples are taken in parts of about
    `at_once` columns, enough for a product to run at full speed, and few enough that what was just copied is still in the
    cache.
    """

    rounds = True
    window: Window
    groups: int
    at_once = 1 << 10
    in_shape: tuple[int, ...]

    def columns(self, x: Array, again: Array | None) -> Array:
        """X of these samples; see `window.columns`."""
        return columns(x, self.window, self.xp, again=again)

    def from_columns(self, X: Array, into: Array) -> None:
        """Add X up into these samples; see `window.from_columns`."""
        from_columns(X, self.window, into)

    def weight_gradient(self, i: int, matrices: Array | None, kernel: tuple[int, ...], s: float = 1.0) -> Array | None:
        """s times `matrices` (groups, p/groups, q K) as a weight (p, q, *kernel); into the place that waits for input i's."""
        if matrices is None:
            return None
        out = self.into(i)
        if out is None:
            groups, channels, n = matrices.shape
            out = self.xp.empty((groups * channels, n // math.prod(kernel), *kernel), dtype=matrices.dtype)
        self.xp.multiply(matrices, s, out=weights(out, self.groups))
        return out


class Conv(Convolution):
    """Y = W X + b, with X the columns of x, and the gradients derived at the top of this file.

    Keeps x if W is trained, and W (no copy) if x wants a gradient.
    """

    def forward(self, x: Array, W: Array, b: Array | None) -> Array:
        self.in_shape = x.shape
        self.save(x if self.needs[1] else None, W if self.needs[0] else None)
        outputs = self.window.out(x.shape[2:])
        y = self.xp.empty((len(x), W.shape[0], *outputs), dtype=x.dtype)
        W, X = weights(W, self.groups), None
        for some in parts(len(x), math.prod(outputs), self.at_once):
            X = self.columns(x[some], X)
            Y = product(W, by_group(X, self.groups), self.xp, out=room_in(y[some], self.groups))
            settle(Y, b, y[some])
        return y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        needs_x, needs_W, needs_b = self.needs
        x, W = self.saved
        dx: Array = None
        X = dW_T = None
        if needs_x:
            dx = self.xp.zeros(self.in_shape, dtype=dy.dtype)
            W_T = weights(W, self.groups).swapaxes(1, 2)
        for some in parts(len(dy), math.prod(dy.shape[2:]), self.at_once) if needs_x or needs_W else ():
            dY = by_group(by_channel(dy[some]), self.groups)
            if needs_W:
                X = self.columns(x[some], X)
                # dW^T, not dW: with few outputs OpenBLAS is 1.4 times faster this way round (measured: O = 32)
                dW_T = total(dW_T, product(by_group(X, self.groups), dY.swapaxes(1, 2), self.xp), self.xp)
            if needs_x:
                self.from_columns(product(W_T, dY, self.xp), dx[some])
        dW = self.weight_gradient(1, None if dW_T is None else dW_T.swapaxes(1, 2), self.window.kernel)
        return dx, dW, dy.sum(axis=(0, *range(2, dy.ndim))) if needs_b else None


def conv1d(x: TensorLike, W: TensorLike, b: TensorLike | None = None, stride: PerAxis = 1, padding: PerAxis = 0,
           dilation: PerAxis = 1, groups: int = 1) -> Tensor:
    """Convolution over one spatial axis (without turning the kernel round, as usual in networks); see `Conv`.

    Parameters
    ----------
    x : Tensor, shape (N, C, length)
    W : Tensor, shape (O, C / groups, kernel)
    b : Tensor, shape (O,), optional
    stride, padding, dilation : int
        Step between outputs, zeros added at each end, and distance between kernel places.
    groups : int
        Output channels and input channels come in so many parts that do not see each other.

    Returns
    -------
    Tensor, shape (N, O, (length + 2 padding - dilation (kernel - 1) - 1) // stride + 1)

    Raises
    ------
    ShapeError
        If the shapes do not fit together, or the kernel is longer than the padded input.
    ConfigError
        If a setting is no int in its range, or `groups` does not divide O.

    Examples
    --------
    >>> import minilora
    >>> x = minilora.tensor([[[1.0, 2.0, 4.0, 8.0]]])
    >>> minilora.ops.conv1d(x, minilora.tensor([[[-1.0, 1.0]]])).data
    array([[[1., 2., 4.]]], dtype=float32)
    """
    window = check_conv("conv1d", 1, x, W, b, stride, padding, dilation, groups)
    return apply(Conv, floating(x), W, b, window=window, groups=int(groups))


def conv2d(x: TensorLike, W: TensorLike, b: TensorLike | None = None, stride: PerAxis = 1, padding: PerAxis = 0,
           dilation: PerAxis = 1, groups: int = 1) -> Tensor:
    """Convolution over two spatial axes (without turning the kernel round, as usual in networks); see `Conv`.

    Parameters
    ----------
    x : Tensor, shape (N, C, height, width)
    W : Tensor, shape (O, C / groups, kernel height, kernel width)
    b : Tensor, shape (O,), optional
    stride, padding, dilation : int or (int, int)
        As in `conv1d`; one int for both axes, or one for each.
    groups : int
        Output channels and input channels come in so many parts that do not see each other. With groups = C every channel
        has kernels of its own ("depthwise").

    Returns
    -------
    Tensor, shape (N, O, output height, output width)

    Raises
    ------
    ShapeError
        If the shapes do not fit together, or the kernel is longer than the padded input.
    ConfigError
        If a setting is no int in its range, or `groups` does not divide O.

    Examples
    --------
    >>> import minilora
    >>> x = minilora.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    >>> minilora.ops.conv2d(x, minilora.tensor([[[[1.0, 10.0]]]]), padding=(0, 1)).data
    array([[[[10., 21.,  2.],
             [30., 43.,  4.]]]], dtype=float32)
    """
    window = check_conv("conv2d", 2, x, W, b, stride, padding, dilation, groups)
    return apply(Conv, floating(x), W, b, window=window, groups=int(groups))


def check_conv(name: str, axes: int, x: Any, W: Any, b: Any, stride: Any, padding: Any, dilation: Any, groups: Any) -> Window:
    """The window of a convolution with weight W, if everything fits together; else `ShapeError` or `ConfigError`."""
    x_shape, W_shape = shape_of(x), shape_of(W)
    words = ", ".join(SPATIAL[axes])
    if len(W_shape) != axes + 2 or 0 in W_shape[2:]:
        raise ShapeError(f"{name}: expected a weight (out, in / groups, kernel {words}), got shape {W_shape}")
    if len(x_shape) != axes + 2:
        raise ShapeError(f"{name}: expected an input (N, channels, {words}), got shape {x_shape}. Is the axis of samples "
                         "or of channels missing? Add one with x.reshape(...)")
    window = window_of(W_shape[2:], stride, padding, dilation, axes)
    check_groups(groups, W_shape[0], "output channels")
    groups = int(groups)  # one of NumPy's small types would overflow below
    if x_shape[1] != W_shape[1] * groups:
        times = f" x {groups} groups" if groups > 1 else ""
        raise ShapeError(f"{name}: expected input with {W_shape[1] * groups} channels on axis 1 (weight {W_shape} has "
                         f"{W_shape[1]} on axis 1{times}), got {x_shape}. Are the channels last? Move them with "
                         "x.transpose(...)")
    if b is not None and shape_of(b) != W_shape[:1]:
        raise ShapeError(f"{name}: expected bias of shape {W_shape[:1]} for weight {W_shape}, got {shape_of(b)}")
    check_fits(name, x_shape, window)
    return window


def check_groups(groups: Any, channels: int, what: str) -> None:
    """Raise `ConfigError` unless `groups` is an int >= 1 that divides `channels`."""
    if not is_int(groups, 1):
        raise ConfigError(f"groups must be an int >= 1, got {groups!r}")
    if channels % int(groups):
        raise ConfigError(f"groups={groups} does not divide the {channels} {what}")
