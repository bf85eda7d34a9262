"""Normalising layers."""

from __future__ import annotations

from typing import Any

import numpy

from .. import ops
from ..engine import shape_of
from ..errors import ConfigError, ShapeError
from ..ops.norm import check_eps
from ..tensor import Parameter, Tensor
from .initial import first
from .linear import check_size
from .module import Module

__all__ = ["GroupNorm", "LayerNorm", "RMSNorm"]


def constant(value: float, n: int, dtype: Any) -> Parameter:
    """A parameter of n equal numbers on the current device."""
    return first((n,), dtype, lambda: numpy.full(n, value, dtype))


def one_axis(normalized_shape: Any) -> int:
    """The length of the last axis: D, or (D,) as PyTorch has it."""
    if isinstance(normalized_shape, (tuple, list)) and len(normalized_shape) == 1:
        normalized_shape = normalized_shape[0]
    if isinstance(normalized_shape, (tuple, list)):
        raise ConfigError(f"normalized_shape must be the length of the last axis, got {normalized_shape!r}: to normalise over "
                          "several axes, reshape them into one")
    check_size("normalized_shape", normalized_shape)
    return int(normalized_shape)


def check_width(x: Any, expected: int, axis: int = -1) -> None:
    """Raise `ShapeError` unless x is as long along `axis` as the layer; a layer without parameters would take any length."""
    shape = shape_of(x)
    if not -len(shape) <= axis < len(shape) or shape[axis] != expected:
        raise ShapeError(f"expected an input with {expected} values on axis {axis}, got shape {shape}. Is the input "
                         "transposed, or from another layer?")


class LayerNorm(Module):
    """Mean 0 and variance 1 along the last axis, then y = xhat w + b.

    Parameters
    ----------
    normalized_shape : int
        Length D of the last axis.
    eps : float
        Added to the variance. GPT-2 takes 1e-5, BERT 1e-12.
    elementwise_affine : bool
        With False there is neither w nor b.
    bias : bool
        With False there is no b.
    dtype : dtype

    Attributes
    ----------
    weight : Parameter, shape (D,), or None
        Starts as ones.
    bias : Parameter, shape (D,), or None
        Starts as zeros.

    Raises
    ------
    ConfigError
        If the size is not an int >= 1, or eps is negative or not finite.

    Examples
    --------
    >>> import minilora
    >>> layer = minilora.nn.LayerNorm(2, eps=0.0)
    >>> layer(minilora.tensor([[1.0, 3.0]], dtype="float32")).data
    array([[-1.,  1.]], dtype=float32)
    """

    weight: Parameter | None
    bias: Parameter | None

    def __init__(self, normalized_shape: int, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True, *,
                 dtype: Any = "float32") -> None:
        check_eps("LayerNorm", eps)
        self.normalized_shape = one_axis(normalized_shape)
        self.eps = float(eps)
        self.weight = constant(1.0, self.normalized_shape, dtype) if elementwise_affine else None
        self.bias = constant(0.0, self.normalized_shape, dtype) if elementwise_affine and bias else None

    def forward(self, x: Any) -> Tensor:
        check_width(x, self.normalized_shape)
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return (f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.weight is not None}, "
                f"bias={self.bias is not None}")


class RMSNorm(Module):
    """Mean square 1 along the last axis, then y = xhat w: the norm of Llama.

    Parameters
    ----------
    normalized_shape : int
        Length D of the last axis.
    eps : float
        Added to the mean square. Llama 1 takes 1e-6, Llama 2 and 3 take 1e-5; PyTorch's default is the dtype's epsilon.
    elementwise_affine : bool
        With False there is no w.
    dtype : dtype

    Attributes
    ----------
    weight : Parameter, shape (D,), or None
        Starts as ones.

    Raises
    ------
    ConfigError
        If the size is not an int >= 1, or eps is negative or not finite.

    Examples
    --------
    >>> import minilora
    >>> layer = minilora.nn.RMSNorm(2, eps=0.0)
    >>> layer(minilora.tensor([[1.0, 7.0]], dtype="float32")).data
    array([[0.2, 1.4]], dtype=float32)
    """

    weight: Parameter | None

    def __init__(self, normalized_shape: int, eps: float = 1e-6, elementwise_affine: bool = True, *,
                 dtype: Any = "float32") -> None:
        check_eps("RMSNorm", eps)
        self.normalized_shape = one_axis(normalized_shape)
        self.eps = float(eps)
        self.weight = constant(1.0, self.normalized_shape, dtype) if elementwise_affine else None

    def forward(self, x: Any) -> Tensor:
        check_width(x, self.normalized_shape)
        return ops.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.weight is not None}"


class GroupNorm(Module):
    """Mean 0 and variance 1 over each sample's groups of channels, then y = xhat w + b, channel by channel.

    Parameters
    ----------
    num_groups, num_channels : int
        The first divides the second.
    eps : float
    affine : bool
        With False there is neither w nor b.
    dtype : dtype

    Attributes
    ----------
    weight : Parameter, shape (num_channels,), or None
        Starts as ones.
    bias : Parameter, shape (num_channels,), or None
        Starts as zeros.

    Raises
    ------
    ConfigError
        If a size is not an int >= 1, `num_groups` does not divide `num_channels`, or eps is negative or not finite.

    Examples
    --------
    >>> import minilora
    >>> layer = minilora.nn.GroupNorm(1, 2, eps=0.0)
    >>> layer(minilora.tensor([[[1.0], [3.0]]], dtype="float32")).shape
    (1, 2, 1)
    """

    weight: Parameter | None
    bias: Parameter | None

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True, *,
                 dtype: Any = "float32") -> None:
        check_size("num_groups", num_groups)
        check_size("num_channels", num_channels)
        if num_channels % num_groups:
            raise ConfigError(f"num_channels {num_channels} is no multiple of num_groups {num_groups}")
        check_eps("GroupNorm", eps)
        self.num_groups, self.num_channels = int(num_groups), int(num_channels)
        self.eps = float(eps)
        self.weight = constant(1.0, self.num_channels, dtype) if affine else None
        self.bias = constant(0.0, self.num_channels, dtype) if affine else None

    def forward(self, x: Any) -> Tensor:
        check_width(x, self.num_channels, axis=1)
        return ops.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.weight is not None}"
