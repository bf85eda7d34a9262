"""Pooling, and its counterpart that repeats: what changes the size of an image and has no weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..engine import Op, apply, floating, shape_of
from ..errors import ConfigError, ShapeError
from .window import SPATIAL, Window, check_fits, for_each_axis, window_of

if TYPE_CHECKING:
    from ..tensor import Tensor
    from ..typing import PerAxis, TensorLike

Array = Any

ALL = (slice(None), slice(None))  # every sample, every channel


class MaxPool(Op):
    """y_nct = the largest x_nci among the i that output t meets; the padding never wins.

    A small change of x moves y_nct only through that largest element, the first of them if several are equal, so
    dx_nci = sum of dy_nct over the t whose largest element is i. Keeps one byte for an output: which place of the kernel won.

    A NaN wins over every number, so that it is not lost.
    """

    moves = True
    window: Window
    in_shape: tuple[int, ...]

    def forward(self, x: Array) -> Array:
        self.in_shape, xp = x.shape, self.xp
        shape = (*x.shape[:2], *self.window.out(x.shape[2:]))
        y = xp.full(shape, -math.inf, dtype=x.dtype)
        winner = xp.zeros(shape, dtype="uint8" if math.prod(self.window.kernel) <= 256 else "int32")
        # From the last place to the first, which wins among equals; so data of -infinity wins over the -infinity of the start.
        for place, (_, outputs, data) in reversed(list(enumerate(self.window.places(x.shape[2:])))):
            new, best, number = x[(*ALL, *data)], y[(*ALL, *outputs)], winner[(*ALL, *outputs)]
            wins = (new.real >= best.real) | (new != new)
            y[(*ALL, *outputs)] = xp.where(wins, new, best)
            winner[(*ALL, *outputs)] = xp.where(wins, place, number)
        self.save(winner)
        return y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        (winner,) = self.saved
        dx = self.xp.zeros(self.in_shape, dtype=dy.dtype)
        for place, (_, outputs, data) in enumerate(self.window.places(self.in_shape[2:])):
            dx[(*ALL, *data)] += dy[(*ALL, *outputs)] * (winner[(*ALL, *outputs)] == place)
        return (dx,)


class AvgPool(Op):
    """y_nct = (1/K) sum of x_nci over the i that output t meets, K places in all: zeros of the padding do count.

    Each x_nci has the weight 1/K in every output t that meets it: dx_nci = (1/K) sum of dy_nct over these t. Keeps nothing.
    """

    window: Window
    in_shape: tuple[int, ...]

    def forward(self, x: Array) -> Array:
        self.in_shape = x.shape
        y = self.xp.zeros((*x.shape[:2], *self.window.out(x.shape[2:])), dtype=x.dtype)
        for _, outputs, data in self.window.places(x.shape[2:]):
            y[(*ALL, *outputs)] += x[(*ALL, *data)]
        y *= 1.0 / math.prod(self.window.kernel)
        return y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        dx = self.xp.zeros(self.in_shape, dtype=dy.dtype)
        dy = dy * (1.0 / math.prod(self.window.kernel))
        for _, outputs, data in self.window.places(self.in_shape[2:]):
            dx[(*ALL, *data)] += dy[(*ALL, *outputs)]
        return (dx,)


class Upsample(Op):
    """y_ncj = x_nci with i = j // factor along each spatial axis: every element repeated ("nearest").

    dx_nci = sum of the dy_ncj of its copies. Keeps nothing. `window` moves over y by its own length, so that its outputs are
    the elements of x.
    """

    window: Window

    def forward(self, x: Array) -> Array:
        lengths = tuple(n * factor for n, factor in zip(x.shape[2:], self.window.kernel))
        y = self.xp.empty((*x.shape[:2], *lengths), dtype=x.dtype)
        for _, originals, copies in self.window.places(lengths):
            y[(*ALL, *copies)] = x[(*ALL, *originals)]
        return y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        lengths = dy.shape[2:]
        dx = self.xp.zeros((*dy.shape[:2], *self.window.out(lengths)), dtype=dy.dtype)
        for _, originals, copies in self.window.places(lengths):
            dx[(*ALL, *originals)] += dy[(*ALL, *copies)]
        return (dx,)


def max_pool2d(x: TensorLike, kernel_size: PerAxis, stride: PerAxis | None = None, padding: PerAxis = 0) -> Tensor:
    """The largest element under a window that moves over the two last axes; see `MaxPool`.

    Parameters
    ----------
    x : Tensor, shape (N, C, height, width)
    kernel_size : int or (int, int)
    stride : int or (int, int), optional
        By default the kernel's size: windows side by side.
    padding : int or (int, int)
        At most half of the kernel's size, so that every window meets some data.

    Returns
    -------
    Tensor, shape (N, C, output height, output width)

    Raises
    ------
    ShapeError
        If x has not four axes, or the kernel is larger than the padded image.
    ConfigError
        If a setting is no int in its range.

    Examples
    --------
    >>> import minilora
    >>> minilora.ops.max_pool2d(minilora.tensor([[[[1.0, 5.0, 2.0, 0.0], [3.0, 4.0, 1.0, 7.0]]]]), 2).data
    array([[[[5., 7.]]]], dtype=float32)
    """
    window = pool_window(kernel_size, stride, padding)
    check_images("max_pool2d", x, window)
    return apply(MaxPool, floating(x), window=window)


def avg_pool2d(x: TensorLike, kernel_size: PerAxis, stride: PerAxis | None = None, padding: PerAxis = 0) -> Tensor:
    """The mean under a window that moves over the two last axes; zeros of the padding count. See `AvgPool`.

    Parameters, returns and errors as of `max_pool2d`.

    Examples
    --------
    >>> import minilora
    >>> minilora.ops.avg_pool2d(minilora.tensor([[[[1.0, 5.0, 2.0, 0.0], [3.0, 7.0, 3.0, 7.0]]]]), 2).data
    array([[[[4., 3.]]]], dtype=float32)
    """
    window = pool_window(kernel_size, stride, padding)
    check_images("avg_pool2d", x, window)
    return apply(AvgPool, floating(x), window=window)


def upsample(x: TensorLike, scale_factor: PerAxis = 2) -> Tensor:
    """Every element of an image repeated along the two last axes; see `Upsample`.

    Parameters
    ----------
    x : Tensor, shape (N, C, height, width)
    scale_factor : int or (int, int)

    Returns
    -------
    Tensor, shape (N, C, scale_factor height, scale_factor width)

    Raises
    ------
    ShapeError
        If x has not four axes.
    ConfigError
        If the factor is not an int >= 1.

    Examples
    --------
    >>> import minilora
    >>> minilora.ops.upsample(minilora.tensor([[[[1.0, 2.0]]]])).data
    array([[[[1., 1., 2., 2.],
             [1., 1., 2., 2.]]]], dtype=float32)
    """
    factors = for_each_axis("scale_factor", scale_factor, 2, 1)
    check_images("upsample", x, None)
    return apply(Upsample, floating(x), window=Window(factors, factors, (0, 0), (1, 1)))


def pool_window(kernel_size: Any, stride: Any, padding: Any) -> Window:
    """The settings of a pooling as a `Window`; `ConfigError` if one is out of its range."""
    window = window_of(kernel_size, kernel_size if stride is None else stride, padding, 1, 2)
    if any(2 * p > k for p, k in zip(window.padding, window.kernel)):
        raise ConfigError(f"padding={padding!r} is more than half of kernel_size={kernel_size!r}: some windows would meet "
                          "nothing but padding")
    return window


def check_images(name: str, x: Any, window: Window | None) -> None:
    """Raise `ShapeError` unless x is (N, C, height, width) and the window fits into it."""
    shape = shape_of(x)
    if len(shape) != 4:
        raise ShapeError(f"{name}: expected an input (N, channels, {', '.join(SPATIAL[2])}), got shape {shape}")
    if window is not None:
        check_fits(name, shape, window)
