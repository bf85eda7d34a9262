"""Attention layers. The mathematics is in `ops.attention` and `ops.packed_attention`."""

from __future__ import annotations

from typing import Any

import numpy

from .. import ops
from ..errors import ConfigError, ShapeError
from ..ops.packed_attention import check_heads
from ..tensor import Tensor
from .linear import Linear, check_size
from .module import Module
from .rotary import RotaryEmbedding

__all__ = ["MultiheadAttention", "SimpleAttention"]


def split_heads(x: Any, num_heads: int, norm: Module | None = None) -> Tensor:
    """(..., T, heads hd) as (..., heads, T, hd): a view of the same memory. `norm`, if there is one, is done in every head."""
    if len(x.shape) < 2:
        raise ShapeError(f"attention: expected (..., T, {x.shape[-1]}), got {x.shape}: one token needs its axis too")
    *lead, T, width = x.shape
    n = len(lead)
    heads = ops.reshape(x, (*lead, T, num_heads, width // num_heads))
    return ops.transpose(heads if norm is None else norm(heads), (*range(n), n + 1, n, n + 2))


def join_heads(x: Any) -> Tensor:
    """(..., heads, T, hd) as (..., T, heads hd): the inverse of `split_heads`."""
    *lead, heads, T, hd = x.shape
    n = len(lead)
    return ops.reshape(ops.transpose(x, (*range(n), n + 1, n, n + 2)), (*lead, T, heads * hd))


class SimpleAttention(Module):
    """Single-head attention without a mask: softmax(Q K^T / sqrt(embed_size)) V, then a linear layer.

    Parameters
    ----------
    embed_size : int
    dtype : dtype
    rng : numpy.random.Generator or int, optional
        Draws the weights of all projections, one after the other. The same int in two layers gives them equal numbers: in a
        model, pass one Generator to all.

    Attributes
    ----------
    values, keys, queries : Linear
        (embed_size, embed_size), without bias.
    fc_out : Linear
        (embed_size, embed_size), with bias.

    Raises
    ------
    ConfigError
        If embed_size is not an int >= 1.

    Examples
    --------
    >>> import numpy, minilora
    >>> layer = minilora.nn.SimpleAttention(6, rng=0)
    >>> x = minilora.tensor(numpy.ones((2, 5, 6), "float32"))
    >>> layer(x, x, x[:, :3]).shape
    (2, 3, 6)
    """

    def __init__(self, embed_size: int, *, dtype: Any = "float32", rng: numpy.random.Generator | int | None = None) -> None:
        check_size("embed_size", embed_size)
        rng = numpy.random.default_rng(rng)
        self.values = Linear(embed_size, embed_size, bias=False, dtype=dtype, rng=rng)
        self.keys = Linear(embed_size, embed_size, bias=False, dtype=dtype, rng=rng)
        self.queries = Linear(embed_size, embed_size, bias=False, dtype=dtype, rng=rng)
        self.fc_out = Linear(embed_size, embed_size, dtype=dtype, rng=rng)

    def forward(self, values: Any, keys: Any, query: Any) -> Tensor:
        """values and keys (..., S, embed_size), query (..., T, embed_size). Gives (..., T, embed_size)."""
        v, k, q = self.values(values), self.keys(keys), self.queries(query)
        y = ops.attention(split_heads(q, 1), split_heads(k, 1), split_heads(v, 1))
        return self.fc_out(join_heads(y))  # type: ignore[no-any-return]


class MultiheadAttention(Module):
    """Attention in several heads: project to queries, keys and values, attend in every head, join the heads, project.

    Parameters
    ----------
    embed_dim : int
        A multiple of num_heads.
    num_heads : int
    num_kv_heads : int, optional
        Heads of keys and values, of which num_heads is a multiple; num_heads by default.
    bias : bool
        Whether the projections have one.
    causal : bool
        Let no position see a later one.
    packed : bool
        One projection qkv_proj in the place of q_proj, k_proj and v_proj: one product, and one gradient. For self-attention.
    rotary : RotaryEmbedding, optional
        Turns queries and keys by their positions. Not with `packed`.
    dtype : dtype
    rng : numpy.random.Generator or int, optional
        Draws the weights of all projections, one after the other. The same int in two layers gives them equal numbers: in a
        model, pass one Generator to all.

    Attributes
    ----------
    q_proj : Linear
        (embed_dim, embed_dim).
    k_proj, v_proj : Linear
        (embed_dim, num_kv_heads hd) with hd = embed_dim / num_heads.
    qkv_proj : Linear
        (embed_dim, (num_heads + 2 num_kv_heads) hd): queries, keys, values. In the place of the three, if `packed`.
    out_proj : Linear
        (embed_dim, embed_dim).

    Raises
    ------
    ConfigError
        If a size is not an int >= 1, the numbers of heads do not divide, or `rotary` does not fit.

    Notes
    -----
    There is no dropout of the attention probabilities.

    Examples
    --------
    >>> import numpy, minilora
    >>> layer = minilora.nn.MultiheadAttention(8, num_heads=4, num_kv_heads=2, causal=True, rng=0)
    >>> layer(minilora.tensor(numpy.ones((2, 5, 8), "float32"))).shape
    (2, 5, 8)
    """

    q_proj: Module
    k_proj: Module
    v_proj: Module
    qkv_proj: Module
    out_proj: Module

    def __init__(self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, bias: bool = True,
                 causal: bool = False, *, packed: bool = False, rotary: RotaryEmbedding | None = None,
                 dtype: Any = "float32", rng: numpy.random.Generator | int | None = None) -> None:
        check_size("embed_dim", embed_dim)
        self.num_heads, self.num_kv_heads = check_heads(num_heads, num_kv_heads)
        if embed_dim % num_heads:
            raise ConfigError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        hd = embed_dim // num_heads
        if rotary is not None and packed:
            raise ConfigError("rotary turns queries and keys apart from values: with it take packed=False")
        if rotary is not None and 2 * len(rotary.frequencies) != hd:
            raise ConfigError(f"rotary turns heads of {2 * len(rotary.frequencies)} numbers, here a head has embed_dim / "
                              f"num_heads = {hd}")
        self.causal, self.packed = bool(causal), bool(packed)
        rng = numpy.random.default_rng(rng)
        kv = self.num_kv_heads * hd
        widths = {"qkv_proj": embed_dim + 2 * kv} if packed else {"q_proj": embed_dim, "k_proj": kv, "v_proj": kv}
        for name, width in {**widths, "out_proj": embed_dim}.items():
            setattr(self, name, Linear(embed_dim, width, bias, dtype=dtype, rng=rng))
        self.rotary = rotary

    def forward(self, query: Any, key: Any = None, value: Any = None, *, key_padding: Any = None, mask: Any = None) -> Tensor:
        """Attend from `query` to `key` and `value`: by default to itself.

        Parameters
        ----------
        query : Tensor, shape (..., T, embed_dim)
        key, value : Tensor, shape (..., S, embed_dim), optional
            `query` and `key` by default.
        key_padding : array or nested lists of bool, or of 0 and 1, shape (..., S), optional
            True where a key may be attended.
        mask : array, optional
            Broadcasts to (..., num_heads, T, S); see `ops.attention`.

        Returns
        -------
        Tensor, shape (..., T, embed_dim)

        Raises
        ------
        ShapeError
            If a shape does not fit.
        ConfigError
            If `key` or `value` is given to a packed layer.
        """
        if self.packed:
            if key is not None or value is not None:
                raise ConfigError("packed attention attends to its own input only: for other keys take packed=False")
            y = ops.packed_attention(self.qkv_proj(query), self.num_heads, self.num_kv_heads, self.causal, key_padding, mask)
            return self.out_proj(y)  # type: ignore[no-any-return]
        key = query if key is None else key
        value = key if value is None else value
        q = split_heads(self.q_proj(query), self.num_heads)
        k = split_heads(self.k_proj(key), self.num_kv_heads)
        v = split_heads(self.v_proj(value), self.num_kv_heads)
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        return self.out_proj(join_heads(ops.attention(q, k, v, self.causal, key_padding, mask)))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        kv = f", num_kv_heads={self.num_kv_heads}" if self.num_kv_heads != self.num_heads else ""
        return f"num_heads={self.num_heads}{kv}, causal={self.causal}"
