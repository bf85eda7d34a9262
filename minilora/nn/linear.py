"""The linear layer."""

from __future__ import annotations

import math
from typing import Any

import numpy

from .. import ops
from ..settings import whole
from ..tensor import Parameter, Tensor
from .initial import first
from .module import Module

__all__ = ["Linear", "check_size", "uniform"]


def check_size(name: str, value: Any) -> None:
    """Raise `ConfigError` unless `value` is an int >= 1."""
    whole(name, value)


def uniform(rng: numpy.random.Generator | int | None, shape: tuple[int, ...], fan_in: int, dtype: Any) -> Parameter:
    """A parameter drawn from U(-1/sqrt(fan_in), 1/sqrt(fan_in)) on the host, then moved to the current device."""
    bound = 1.0 / math.sqrt(fan_in)
    return first(shape, dtype, lambda: numpy.random.default_rng(rng).uniform(-bound, bound, shape))


class Linear(Module):
    """y = x W^T + b on the last axis of x.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
        With False there is no b.
    dtype : dtype
    rng : numpy.random.Generator or int, optional
        Draws the initial weights; on the host, so that one seed gives one model on every device. The same int in two layers
        gives them equal numbers: in a model, pass one Generator to all.

    Attributes
    ----------
    weight : Parameter, shape (out_features, in_features)
    bias : Parameter, shape (out_features,), or None

    Raises
    ------
    ConfigError
        If a size is not an int >= 1.

    Notes
    -----
    Weight and bias are drawn from U(-1/sqrt(in), 1/sqrt(in)), as PyTorch does.

    Examples
    --------
    >>> import numpy, minilora
    >>> layer = minilora.nn.Linear(3, 2, rng=numpy.random.default_rng(0))
    >>> layer(minilora.tensor([[1.0, 2.0, 3.0]], dtype="float32")).shape
    (1, 2)
    """

    bias: Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, dtype: Any = "float32",
                 rng: numpy.random.Generator | int | None = None) -> None:
        check_size("in_features", in_features)
        check_size("out_features", out_features)
        self.in_features = int(in_features)
        self.out_features = int(out_features)
        rng = numpy.random.default_rng(rng)
        self.weight = uniform(rng, (self.out_features, self.in_features), self.in_features, dtype)
        self.bias = uniform(rng, (self.out_features,), self.in_features, dtype) if bias else None

    def forward(self, x: Any) -> Tensor:
        return ops.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
