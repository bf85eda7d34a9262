"""Conv1d and Conv2d with low-rank updates: a pair of convolutions beside the frozen one."""

from __future__ import annotations

import math
from typing import Any

import numpy

from ... import backend, nn, ops
from ...errors import ConfigError, ShapeError
from ...tensor import Tensor
from ..gradients.convolution import lora_conv1d, lora_conv2d
from .base import AdaptedLayer
from .start import new_adapter

__all__ = ["Conv1d", "Conv2d"]


class _Conv(AdaptedLayer):
    """What adapted convolutions over any number of spatial axes share."""

    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, ...]
    base: type[nn.Module]

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Any, r: int = 8, lora_alpha: float = 8,
                 lora_dropout: float = 0.0, *, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
                 bias: bool = True, dtype: Any = "float32", rng: numpy.random.Generator | int | None = None,
                 **options: Any) -> None:
        rng = numpy.random.default_rng(rng)
        base: Any = self.base
        self.adopt(base(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, dtype=dtype,
                        rng=rng).requires_grad(False))
        self.begin(new_adapter(self, r, lora_alpha, lora_dropout, rng=rng, **options))

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if r % self.groups:
            raise ConfigError(f"r={r}: this convolution has {self.groups} groups, each with a pair of rank r / groups: r must "
                              "be a multiple of that")
        return (r, *self.weight.shape[1:]), (self.out_channels, r // self.groups, *[1] * len(self.kernel_size))

    def by_output(self, vector: Any) -> Any:
        return vector.reshape(vector.shape[0], *[1] * len(self.kernel_size))

    def as_matrices(self, W: Any, A: Any, B: Any) -> tuple[Any, Any, Any, int]:
        n = math.prod(W.shape[1:])
        return W.reshape(W.shape[0], n), A.reshape(A.shape[0], n), B.reshape(B.shape[0], B.shape[1]), self.groups

    def as_update(self, A: Any, B: Any) -> tuple[Any, Any]:
        A, B = A.reshape(len(A), -1), B.reshape(len(B), -1)
        if self.groups == 1:
            return A, B
        outs = len(B) // self.groups
        whole = backend.device_of(B).xp.zeros((self.groups, outs, self.groups, B.shape[1]), dtype=B.dtype)
        for g in range(self.groups):  # the outputs of a group read its own part of z
            whole[g, :, g] = B[g * outs:(g + 1) * outs]
        return A, whole.reshape(len(B), len(A))

    def from_update(self, A: Any, B: Any) -> tuple[Any, Any]:
        shapes = self.factor_shapes(len(A))
        if (len(B), A.shape[1]) != (self.out_channels, math.prod(shapes[0][1:])):
            raise ShapeError(f"expected D {(self.out_channels, math.prod(shapes[0][1:]))}, got {(len(B), A.shape[1])}")
        B = B if self.groups == 1 else _blocks(B, self.groups)
        return A.reshape(len(A), *shapes[0][1:]), B.reshape(len(B), *shapes[1][1:])

    stored = as_update

    def matrix(self, weight: Any) -> Any:
        return weight.reshape(weight.shape[0], -1)


def _blocks(B: Any, groups: int) -> Any:
    """The diagonal blocks of B (out, r), one below the other, (out, r / groups); `ConfigError` if there is more than they."""
    outs, ranks = len(B) // groups, B.shape[1] // groups
    parts = B.reshape(groups, outs, groups, ranks)
    blocks = backend.device_of(B).xp.concatenate([parts[g, :, g] for g in range(groups)])
    if int((B != 0).sum()) != int((blocks != 0).sum()):
        raise ConfigError(f"the update mixes the {groups} groups of this convolution: B must be 0 outside of its diagonal "
                          f"blocks of {outs} x {ranks}")
    return blocks


class Conv1d(_Conv, nn.Conv1d):
    """Convolution over one axis with a low-rank pair beside it: A with the base's kernel and r channels, B of length 1.

    Parameters
    ----------
    in_channels, out_channels, kernel_size
        As in `nn.Conv1d`.
    r, lora_alpha, lora_dropout
        As in `Linear`. With groups, r is a multiple of their number: each group has its own pair, of rank r / groups.
    stride, padding, dilation, groups, bias
        Of the base, and of A; as in `nn.Conv1d`.
    dtype, rng, **options
        As in `Linear`.

    Attributes
    ----------
    weight : Parameter, shape (out_channels, in_channels / groups, kernel_size), frozen
    lora_A : Parameter, shape (r, in_channels / groups, kernel_size)
    lora_B : Parameter, shape (out_channels, r / groups, 1)

    Examples
    --------
    >>> import numpy, minilora
    >>> layer = minilora.lora.Conv1d(3, 8, 5, r=2, padding=2, rng=0)
    >>> layer(minilora.tensor(numpy.zeros((4, 3, 20), "float32"))).shape
    (4, 8, 20)
    """

    adapts = nn.Conv1d

    base = nn.Conv1d

    def frozen(self, x: Any, bias: bool = True) -> Tensor:
        return ops.conv1d(x, self.weight, self.bias if bias else None, **self._settings())

    def fused(self, x: Any, A: Any, B: Any, s: float, bias: bool = True) -> Tensor:
        return lora_conv1d(x, self.weight, self.bias if bias else None, A, B, s, **self._settings())

    def down(self, x: Any, A: Any) -> Tensor:
        return ops.conv1d(x, A, None, **self._settings())

    def up(self, z: Any, B: Any) -> Tensor:
        return ops.conv1d(z, B, None, groups=self.groups)


class Conv2d(_Conv, nn.Conv2d):
    """Convolution over two axes with a low-rank pair beside it: A with the base's kernel and r channels, B of size 1 x 1.

    Parameters and attributes as in `Conv1d`, with pairs for the two axes; lora_B is (out_channels, r / groups, 1, 1).

    Examples
    --------
    >>> import minilora
    >>> minilora.lora.Conv2d(3, 8, 3, r=2, padding=1, rng=0).lora_A.shape
    (2, 3, 3, 3)
    """

    adapts = nn.Conv2d

    base = nn.Conv2d

    def frozen(self, x: Any, bias: bool = True) -> Tensor:
        return ops.conv2d(x, self.weight, self.bias if bias else None, **self._settings())

    def fused(self, x: Any, A: Any, B: Any, s: float, bias: bool = True) -> Tensor:
        return lora_conv2d(x, self.weight, self.bias if bias else None, A, B, s, **self._settings())

    def down(self, x: Any, A: Any) -> Tensor:
        return ops.conv2d(x, A, None, **self._settings())

    def up(self, z: Any, B: Any) -> Tensor:
        return ops.conv2d(z, B, None, groups=self.groups)
