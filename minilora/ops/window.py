"""Where a sliding window reads: shared by convolutions and pooling, for any number of spatial axes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from numbers import Integral
from typing import Any, NamedTuple

from ..errors import ConfigError, ShapeError

Array = Any
Slices = tuple[slice, ...]

SPATIAL = {1: ("length",), 2: ("height", "width")}  # what the axes after (N, channels) are called


class Window(NamedTuple):
    """A kernel of `kernel` places, `dilation` apart, moved by `stride` over lengths padded with `padding` zeros at each end.

    Every field has one int for each spatial axis. Along one axis of length n, output t meets kernel place k at

        i = t stride + k dilation - padding,        if 0 <= i < n; else it meets a zero.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def pointwise(self) -> bool:
        """Whether every output meets one place and every place one output: nothing has to be moved."""
        return set(self.kernel) | set(self.stride) <= {1} and not any(self.padding)

    def out(self, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """How many outputs fit along each axis; less than 1 if the kernel is longer than the padded axis."""
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(lengths, *self))

    def places(self, lengths: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Slices, Slices]]:
        """For every kernel place: the place, the outputs that meet data there, and the data they meet, as slices.

        Padding is never built: outputs that would meet it are left out. Within one place no element is met twice, so that
        what is added through these slices needs no care about duplicates.
        """
        axes = []
        for n, outputs, kernel, s, p, d in zip(lengths, self.out(lengths), *self):
            met = []
            for k in range(kernel):
                offset = k * d - p
                first, stop = max(0, -(offset // s)), min(outputs, (n - 1 - offset) // s + 1)
                if first < stop:
                    met.append((k, slice(first, stop), slice(first * s + offset, (stop - 1) * s + offset + 1, s)))
            axes.append(met)
        for place in product(*axes):
            k, outputs_met, data_met = zip(*place)
            yield k, outputs_met, data_met


def columns(x: Array, window: Window, xp: Any, again: Array | None = None) -> Array:
    """x (N, C, *lengths) as a matrix (C K, T N): one row for a channel and kernel place, one column for an output and sample.

    K is the number of kernel places and T that of outputs of one sample, so that a convolution is a product with this matrix.
    Columns of one output stand together, sample by sample: x is brought into that order once, and then each of the K slices is
    copied in long runs, also where images are small (of 8 x 8 in a third of the time). A pointwise window of one sample gives a
    view, and of more only changes the order.
    `again` is what an earlier call with this window returned. If it has the right shape it is filled again: its zeros for the
    padding are in place, and its memory is in the cache.
    """
    n, channels, lengths = x.shape[0], x.shape[1], x.shape[2:]
    out = window.out(lengths)
    x = samples_last(x)
    shape = (channels * math.prod(window.kernel), math.prod(out) * n)
    if window.pointwise:
        return x.reshape(shape)
    x = xp.ascontiguousarray(x)
    if again is None or again.shape != shape:
        again = (xp.zeros if any(window.padding) else xp.empty)(shape, dtype=x.dtype)
    X = again.reshape(channels, *window.kernel, *out, n)
    every = slice(None)
    for k, outputs, data in window.places(lengths):
        X[(every, *k, *outputs)] = x[(every, *data)]
    return again


def from_columns(X: Array, window: Window, into: Array) -> None:
    """The adjoint of `columns`: add every element of X (C K, T N) to the element of `into` that `columns` would copy there.

    Parameters
    ----------
    X : array, shape (C K, T N)
    window : Window
    into : array, shape (N, C, *lengths)
        An array that the caller made: it is changed.
    """
    n, channels, lengths = into.shape[0], into.shape[1], into.shape[2:]
    X, into = X.reshape(channels, *window.kernel, *window.out(lengths), n), samples_last(into)
    sums = into if n == 1 or window.pointwise else into.copy()  # in the order of X, for long runs: see `columns`
    every = slice(None)
    for k, outputs, data in window.places(lengths):
        sums[(every, *data)] += X[(every, *k, *outputs)]
    if sums is not into:
        into[...] = sums


def samples_last(x: Array) -> Array:
    """x (N, C, *lengths) as (C, *lengths, N): a view."""
    return x.transpose(*range(1, x.ndim), 0)


# -- what a caller may give -------------------------------------------------------------------------------------------


def for_each_axis(name: str, value: Any, axes: int, least: int) -> tuple[int, ...]:
    """An int, or a sequence of `axes` ints, as a tuple; `ConfigError` unless all are ints >= `least`."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
    if len(values) != axes or not all(is_int(v, least) for v in values):
        several = f" or a tuple of {axes} such ints" if axes > 1 else ""
        raise ConfigError(f"{name} must be an int >= {least}{several}, got {value!r}")
    return tuple(int(v) for v in values)


def is_int(value: Any, least: int) -> bool:
    """Whether `value` is an int (of Python or NumPy) >= `least`; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def window_of(kernel_size: Any, stride: Any, padding: Any, dilation: Any, axes: int) -> Window:
    """Settings as a caller may give them, an int or one int for each of the axes, as a `Window`.

    Raises
    ------
    ConfigError
        If kernel, stride or dilation is below 1, or padding below 0.
    """
    return Window(for_each_axis("kernel_size", kernel_size, axes, 1), for_each_axis("stride", stride, axes, 1),
                  for_each_axis("padding", padding, axes, 0), for_each_axis("dilation", dilation, axes, 1))


def check_fits(name: str, shape: tuple[int, ...], window: Window) -> None:
    """Raise `ShapeError` if the kernel is longer than the padded input along some spatial axis of `shape`."""
    words = SPATIAL[len(window.kernel)]
    for word, n, out, k, p, d in zip(words, shape[2:], window.out(shape[2:]), window.kernel, window.padding, window.dilation):
        if out < 1:
            spread = f" with dilation {d} covers {d * (k - 1) + 1}" if d > 1 else ""
            raise ShapeError(f"{name}: input {shape} has {word} {n}, with padding {n + 2 * p}, but the kernel of {k}{spread}: "
                             f"nothing comes out. Is the image too small for so many strides, or is padding missing?")
