"""Layers without weights that change the shape of images.

>>> import minilora
>>> from minilora import nn
>>> nn.AvgPool2d(2)(minilora.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])).numpy().tolist()
[[[[3.0]]]]
"""

from __future__ import annotations

import math
import operator
from typing import Any

from .. import ops
from ..engine import shape_of
from ..errors import ShapeError
from ..ops.pool import pool_window
from ..ops.window import for_each_axis
from ..tensor import Tensor
from .module import Module

__all__ = ["AvgPool2d", "Flatten", "MaxPool2d", "Upsample"]


class MaxPool2d(Module):
    """The largest element under a window that moves over the images (N, C, height, width).

    Parameters
    ----------
    kernel_size : int or (int, int)
    stride : int or (int, int), optional
        By default the kernel's size: windows side by side.
    padding : int or (int, int)
        At most half of the kernel's size.

    Raises
    ------
    ConfigError
        If a setting is no int in its range.

    Examples
    --------
    >>> import minilora
    >>> minilora.nn.MaxPool2d(2)(minilora.tensor([[[[1.0, 5.0], [3.0, 4.0]]]])).data
    array([[[[5.]]]], dtype=float32)
    """

    def __init__(self, kernel_size: Any, stride: Any = None, padding: Any = 0) -> None:
        self.kernel_size, self.stride, self.padding, _ = pool_window(kernel_size, stride, padding)

    def forward(self, x: Any) -> Tensor:
        return ops.max_pool2d(x, self.kernel_size, self.stride, self.padding)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class AvgPool2d(MaxPool2d):
    """The mean under a window that moves over the images; zeros of the padding count. Parameters as of `MaxPool2d`."""

    def forward(self, x: Any) -> Tensor:
        return ops.avg_pool2d(x, self.kernel_size, self.stride, self.padding)


class Upsample(Module):
    """Every element of images (N, C, height, width) repeated `scale_factor` times along height and width ("nearest").

    Parameters
    ----------
    scale_factor : int or (int, int)
        By keyword only: the first parameter of PyTorch's layer is a size.

    Raises
    ------
    ConfigError
        If the factor is not an int >= 1.

    Examples
    --------
    >>> import minilora
    >>> minilora.nn.Upsample(scale_factor=2)(minilora.tensor([[[[1.0]]]])).shape
    (1, 1, 2, 2)
    """

    def __init__(self, *, scale_factor: Any) -> None:
        self.scale_factor = for_each_axis("scale_factor", scale_factor, 2, 1)

    def forward(self, x: Any) -> Tensor:
        return ops.upsample(x, self.scale_factor)

    def extra_repr(self) -> str:
        return f"scale_factor={self.scale_factor}"


class Flatten(Module):
    """The axes from `start_dim` to `end_dim`, both included, as one: (N, C, height, width) to (N, C height width).

    Raises
    ------
    ShapeError
        At the call, if the input has no such axes, or `end_dim` comes before `start_dim`.

    Examples
    --------
    >>> import numpy, minilora
    >>> minilora.nn.Flatten()(minilora.tensor(numpy.zeros((2, 3, 4, 4)))).shape
    (2, 48)
    """

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        self.start_dim, self.end_dim = operator.index(start_dim), operator.index(end_dim)

    def forward(self, x: Any) -> Tensor:
        shape = shape_of(x)
        n = len(shape)
        start, end = (d + n if d < 0 else d for d in (self.start_dim, self.end_dim))
        if not 0 <= start <= end < n:
            raise ShapeError(f"Flatten: the axes {self.start_dim} to {self.end_dim} are no range of the {n} axes of {shape}")
        return ops.reshape(x, (*shape[:start], math.prod(shape[start:end + 1]), *shape[end + 1:]))

    def extra_repr(self) -> str:
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"
