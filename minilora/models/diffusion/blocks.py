"""What the network is made of: residual blocks, attention over places, and the vector that tells the step."""

from __future__ import annotations

import math
from typing import Any

import numpy

from ... import ops
from ...nn.attention import join_heads, split_heads
from ...nn.conv import Conv2d
from ...nn.linear import Linear
from ...nn.module import Module
from ...nn.norm import GroupNorm
from ...tensor import Tensor, tensor
from ..group import zeroed

__all__ = ["PlaceAttention", "ResnetBlock", "TimestepEmbedding", "sinusoids"]

LONGEST = 10000.0  # steps: the slowest wave turns once in 2 pi times so many


def sinusoids(t: numpy.ndarray, width: int, dtype: Any) -> numpy.ndarray:
    """Steps (N,) as waves (N, width): cos(t f_i) and behind them sin(t f_i), f_i = 10000^(-2 i / width), i < width / 2.

    On the host in float64, then rounded: t f_i goes up to 1000, where float32 has lost digits of the angle. `width` is even.

    Source: Ho, Jain and Abbeel 2020, arXiv 2006.11239, appendix B, after Vaswani et al. 2017; in diffusers' order.
    """
    half = width // 2
    angles = numpy.asarray(t, "float64")[:, None] * numpy.exp(-math.log(LONGEST) / half * numpy.arange(half))
    return numpy.concatenate([numpy.cos(angles), numpy.sin(angles)], axis=1).astype(dtype)


class TimestepEmbedding(Module):
    """The vector of a step: linear_2(silu(linear_1(sinusoids(t)))).

    Parameters
    ----------
    width, inner : int
        Of the waves, and of the vector.
    dtype, rng
        As in `UNet`.
    """

    def __init__(self, width: int, inner: int, *, dtype: Any, rng: numpy.random.Generator) -> None:
        self.linear_1 = Linear(width, inner, dtype=dtype, rng=rng)
        self.linear_2 = Linear(inner, inner, dtype=dtype, rng=rng)
        self.width = width

    def forward(self, t: numpy.ndarray, dtype: Any) -> Tensor:
        """Steps (N,) on the host to (N, inner)."""
        return self.linear_2(ops.silu(self.linear_1(tensor(sinusoids(t, self.width, dtype)))))  # type: ignore[no-any-return]


class ResnetBlock(Module):
    """y = shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + time_emb_proj(e)))), e the step's vector, after a SiLU.

    The shortcut is x itself, or a 1 x 1 convolution where the channels change.

    Parameters
    ----------
    into, out, inner : int
        Channels of x and y, and length of e.
    groups, eps
        Of the norms.
    dtype, rng
        As in `UNet`.

    Attributes
    ----------
    norm1, conv1, time_emb_proj, norm2, conv2
    conv_shortcut : Conv2d or None
    """

    conv_shortcut: Conv2d | None

    def __init__(self, into: int, out: int, inner: int, groups: int, eps: float, *, dtype: Any,
                 rng: numpy.random.Generator) -> None:
        made: dict[str, Any] = dict(dtype=dtype, rng=rng)
        self.norm1 = GroupNorm(groups, into, eps, dtype=dtype)
        self.conv1 = Conv2d(into, out, 3, padding=1, **made)
        self.time_emb_proj = Linear(inner, out, **made)
        self.norm2 = GroupNorm(groups, out, eps, dtype=dtype)
        self.conv2 = zeroed(Conv2d(out, out, 3, padding=1, **made))
        self.conv_shortcut = Conv2d(into, out, 1, **made) if into != out else None

    def forward(self, x: Any, e: Any) -> Tensor:
        """x (N, into, height, width) and e (N, inner) to (N, out, height, width)."""
        h = self.conv1(ops.silu(self.norm1(x)))
        told = self.time_emb_proj(e)
        h = self.conv2(ops.silu(self.norm2(h + ops.reshape(told, (*told.shape, 1, 1)))))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h  # type: ignore[no-any-return]


class PlaceAttention(Module):
    """y = x + to_out(attention over the places of group_norm(x)): every place of an image sees every other.

    Parameters
    ----------
    channels, head_dim : int
        The second divides the first.
    groups, eps
        Of the norm.
    dtype, rng
        As in `UNet`.

    Attributes
    ----------
    group_norm, to_q, to_k, to_v
    to_out : list with one Linear
    """

    def __init__(self, channels: int, head_dim: int, groups: int, eps: float, *, dtype: Any, rng: numpy.random.Generator) -> None:
        made: dict[str, Any] = dict(dtype=dtype, rng=rng)
        self.num_heads = channels // head_dim
        self.group_norm = GroupNorm(groups, channels, eps, dtype=dtype)
        self.to_q, self.to_k, self.to_v = (Linear(channels, channels, **made) for _ in range(3))
        self.to_out = [zeroed(Linear(channels, channels, **made))]

    def forward(self, x: Any) -> Tensor:
        """(N, channels, height, width) to the same shape."""
        n, channels, height, width = x.shape
        places = ops.transpose(ops.reshape(self.group_norm(x), (n, channels, height * width)), (0, 2, 1))
        q, k, v = (split_heads(layer(places), self.num_heads) for layer in (self.to_q, self.to_k, self.to_v))
        y = self.to_out[0](join_heads(ops.attention(q, k, v)))
        return x + ops.reshape(ops.transpose(y, (0, 2, 1)), x.shape)  # type: ignore[no-any-return]
