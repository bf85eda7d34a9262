"""Convolutional layers."""

from __future__ import annotations

import math
from typing import Any

import numpy

from .. import ops
from ..ops.conv import check_groups
from ..ops.window import window_of
from ..tensor import Parameter, Tensor
from .linear import check_size, uniform
from .module import Module

__all__ = ["Conv1d", "Conv2d"]


class _Conv(Module):
    """What convolutions over any number of spatial axes share: all but the op."""

    axes: int
    bias: Parameter | None

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1, padding: Any = 0,
                 dilation: Any = 1, groups: int = 1, bias: bool = True, *, dtype: Any = "float32",
                 rng: numpy.random.Generator | int | None = None) -> None:
        check_size("in_channels", in_channels)
        check_size("out_channels", out_channels)
        check_groups(groups, in_channels, "input channels")
        check_groups(groups, out_channels, "output channels")
        window = window_of(kernel_size, stride, padding, dilation, self.axes)
        self.in_channels, self.out_channels, self.groups = int(in_channels), int(out_channels), int(groups)
        self.kernel_size, self.stride, self.padding, self.dilation = window
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        fan_in = math.prod(shape[1:])
        rng = numpy.random.default_rng(rng)
        self.weight = uniform(rng, shape, fan_in, dtype)
        self.bias = uniform(rng, shape[:1], fan_in, dtype) if bias else None

    def extra_repr(self) -> str:
        settings = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        for name, usual in (("stride", 1), ("padding", 0), ("dilation", 1)):
            value = getattr(self, name)
            if set(value) != {usual}:
                settings.append(f"{name}={value}")
        settings += [f"groups={self.groups}"] if self.groups > 1 else []
        return ", ".join([*settings, f"bias={self.bias is not None}"])


class Conv1d(_Conv):
    """Convolution over one spatial axis: (N, in_channels, length) to (N, out_channels, output length).

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size : int
    stride, padding, dilation : int
        Step between outputs, zeros added at each end, distance between kernel places.
    groups : int
        Channels come in so many parts that do not see each other; it divides both numbers of channels.
    bias : bool
        With False there is no b.
    dtype : dtype
    rng : numpy.random.Generator or int, optional
        Draws the initial weights; on the host, so that one seed gives one model on every device. The same int in two layers
        gives them equal numbers: in a model, pass one Generator to all.

    Attributes
    ----------
    weight : Parameter, shape (out_channels, in_channels / groups, kernel_size)
    bias : Parameter, shape (out_channels,), or None

    Raises
    ------
    ConfigError
        If a setting is no int in its range, or `groups` does not divide the channels.

    Notes
    -----
    Weight and bias are drawn from U(-1/sqrt(n), 1/sqrt(n)) with n = in_channels / groups * kernel_size, the number of inputs
    that an output meets, as PyTorch does.

    Examples
    --------
    >>> import numpy, minilora
    >>> layer = minilora.nn.Conv1d(3, 8, kernel_size=5, padding=2, rng=numpy.random.default_rng(0))
    >>> layer(minilora.tensor(numpy.zeros((4, 3, 20)), dtype="float32")).shape
    (4, 8, 20)
    """

    axes = 1

    def forward(self, x: Any) -> Tensor:
        return ops.conv1d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Conv2d(_Conv):
    """Convolution over two spatial axes: (N, in_channels, height, width) to (N, out_channels, output height, output width).

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size, stride, padding, dilation : int or (int, int)
        One int for both axes, or one for each.
    groups, bias, dtype, rng
        As in `Conv1d`.

    Attributes
    ----------
    weight : Parameter, shape (out_channels, in_channels / groups, kernel height, kernel width)
    bias : Parameter, shape (out_channels,), or None

    Raises
    ------
    ConfigError
        If a setting is no int in its range, or `groups` does not divide the channels.

    Examples
    --------
    >>> import numpy, minilora
    >>> layer = minilora.nn.Conv2d(1, 8, 3, stride=2, padding=1, rng=numpy.random.default_rng(0))
    >>> layer
    Conv2d(1, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=True)
    >>> layer(minilora.tensor(numpy.zeros((4, 1, 8, 8)), dtype="float32")).shape
    (4, 8, 4, 4)
    """

    axes = 2

    def forward(self, x: Any) -> Tensor:
        return ops.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
