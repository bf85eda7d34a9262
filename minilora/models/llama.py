"""Llama: pre-norm layers with RMSNorm, rotary positions, grouped heads and a gated MLP."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy

from .. import ops
from ..errors import ConfigError
from ..nn.attention import LONGEST, RotaryEmbedding, join_heads, split_heads
from ..nn.embedding import Embedding
from ..nn.linear import Linear
from ..nn.module import Module
from ..nn.norm import RMSNorm
from ..tensor import Tensor
from .cache import Cache, LayerCache, extended, reading
from .causal import CausalLM
from .checks import check_config, check_multiple, check_positions, token_ids
from .group import Group, initialise

__all__ = ["Llama", "LlamaConfig", "LlamaLayer"]


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama, with the names and defaults of its config.json: the first model of 7 billion.

    Parameters
    ----------
    vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads : int
        V, d, width of the MLP, layers, heads.
    num_key_value_heads : int, optional
        Heads of keys and values, of which num_attention_heads is a multiple; num_attention_heads by default.
    head_dim : int, optional
        Even; hidden_size / num_attention_heads by default.
    rms_norm_eps : float
    rope_theta : float
        Base of the rotary frequencies.
    tie_word_embeddings : bool
        Make the logits with the embedding's table, without an lm_head.
    initializer_range : float
        Standard deviation of the initial weights.

    Raises
    ------
    ConfigError
        With one line for every field that is out of range.

    Examples
    --------
    >>> config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    >>> config.heads
    (4, 2, 16)
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        sizes += [name for name in ("num_key_value_heads", "head_dim") if getattr(self, name) is not None]
        check_config(self, sizes, ["rms_norm_eps", "rope_theta", "initializer_range"])
        if self.num_key_value_heads is not None:
            check_multiple(self, "num_attention_heads", "num_key_value_heads")
        if self.head_dim is None:
            check_multiple(self, "hidden_size", "num_attention_heads")
        if self.heads[2] % 2:
            raise ConfigError(f"LlamaConfig: head_dim must be even, got {self.heads[2]}: rotary positions turn its halves as "
                              "pairs")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ConfigError(f"LlamaConfig: tie_word_embeddings must be True or False, got {self.tie_word_embeddings!r}")

    @property
    def heads(self) -> tuple[int, int, int]:
        """H heads of queries, KV heads of keys and values, and hd, the numbers of a head."""
        H = self.num_attention_heads
        return H, self.num_key_value_heads or H, self.head_dim or self.hidden_size // H


class LlamaLayer(Module):
    """x <- x + attention(norm(x)), then x <- x + mlp(norm(x)), with mlp(x) = down(silu(gate(x)) up(x)). No biases.

    Parameters
    ----------
    config : LlamaConfig
    rotary : RotaryEmbedding
        Of heads of hd numbers; one for all layers.
    dtype : dtype
    rng : numpy.random.Generator or int, optional

    Attributes
    ----------
    input_layernorm, post_attention_layernorm : RMSNorm
    self_attn : Group
        q_proj, Linear (d, H hd); k_proj and v_proj, Linear (d, KV hd); o_proj, Linear (H hd, d).
    mlp : Group
        gate_proj and up_proj, Linear (d, intermediate_size); down_proj, Linear (intermediate_size, d).

    Notes
    -----
    Sources: Touvron et al. 2023, arXiv 2302.13971, section 2.2; the gated MLP is that of Shazeer 2020, arXiv 2002.05202.
    """

    def __init__(self, config: LlamaConfig, rotary: RotaryEmbedding, *, dtype: Any = "float32",
                 rng: numpy.random.Generator | int | None = None) -> None:
        d, inner = config.hidden_size, config.intermediate_size
        H, KV, hd = config.heads
        made: dict[str, Any] = dict(bias=False, dtype=dtype, rng=numpy.random.default_rng(rng))
        self.num_heads, self.num_kv_heads = H, KV
        self.input_layernorm = RMSNorm(d, config.rms_norm_eps, dtype=dtype)
        self.self_attn = Group(
            q_proj=Linear(d, H * hd, **made), k_proj=Linear(d, KV * hd, **made), v_proj=Linear(d, KV * hd, **made),
            o_proj=Linear(H * hd, d, **made))
        self.post_attention_layernorm = RMSNorm(d, config.rms_norm_eps, dtype=dtype)
        self.mlp = Group(gate_proj=Linear(d, inner, **made), up_proj=Linear(d, inner, **made),
                         down_proj=Linear(inner, d, **made))
        self.rotary = rotary

    def forward(self, x: Any, key_padding: Any = None, positions: Any = None, start: int = 0,
                past: LayerCache | None = None) -> Tensor:
        """x (..., T, d) to the same shape. Positions, if given, broadcast to (..., heads, T); else they begin with `start`."""
        attn, mlp, normed = self.self_attn, self.mlp, self.input_layernorm(x)
        q = self.rotary(split_heads(attn.q_proj(normed), self.num_heads), start, positions)
        k = self.rotary(split_heads(attn.k_proj(normed), self.num_kv_heads), start, positions)
        k, v = extended(past, k, split_heads(attn.v_proj(normed), self.num_kv_heads))
        x = x + attn.o_proj(join_heads(ops.attention(q, k, v, causal=True, key_padding=key_padding)))
        normed = self.post_attention_layernorm(x)
        return x + mlp.down_proj(ops.mul(ops.silu(mlp.gate_proj(normed)), mlp.up_proj(normed)))  # type: ignore[no-any-return]


class Llama(CausalLM):
    """Llama as a language model.

    Parameters
    ----------
    config : LlamaConfig
    dtype : dtype
    rng : numpy.random.Generator or int, optional
        Draws the weights, on the host, so that one seed gives one model on every device.

    Attributes
    ----------
    model : Group
        embed_tokens, Embedding (V, d); layers, list of LlamaLayer; norm, RMSNorm.
    lm_head : Linear or None
        (d, V), without a bias; None if tie_word_embeddings.
    rotary : RotaryEmbedding
        One for all layers. Models for long contexts change its `frequencies` before the first call.

    Notes
    -----
    Parameters have the names of the published files. All weights start from N(0, 0.02^2). Positions count by their differences
    only: a text that is padded at its left needs a key_padding, and nothing else.

    Examples
    --------
    >>> import minilora
    >>> config = minilora.nn.LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
    ...                                  num_attention_heads=4, num_key_value_heads=2)
    >>> model = minilora.nn.Llama(config, rng=0)
    >>> model([[1, 2, 3]]).shape, model.loss([[1, 2, 3]], [[1, 2, 3]]).shape
    ((1, 3, 11), ())
    """

    def __init__(self, config: LlamaConfig, *, dtype: Any = "float32", rng: numpy.random.Generator | int | None = None) -> None:
        rng = numpy.random.default_rng(rng)
        self.config = config
        self.rotary = RotaryEmbedding(config.heads[2], config.rope_theta)
        self.model = Group(
            embed_tokens=Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rng=rng),
            layers=[LlamaLayer(config, self.rotary, dtype=dtype, rng=rng) for _ in range(config.num_hidden_layers)],
            norm=RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype))
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, rng=rng)
        initialise(self, config.initializer_range, rng)

    @property
    def embedding(self) -> Embedding:
        return self.model.embed_tokens  # type: ignore[no-any-return]

    def hidden(self, ids: Any, key_padding: Any = None, position_ids: Any = None, cache: Cache | None = None) -> Tensor:
        """Ids (..., T) to hidden states (..., T, d), after the last norm.

        Parameters
        ----------
        ids, key_padding
            As in `forward`.
        position_ids : array or nested lists of int, shape (T,) or (..., T), optional
            0 to T - 1 by default, or with a cache the T after those it holds. Only their differences count.
        cache : Cache, optional
            What was read before; ids and key_padding are those of the new tokens.
        """
        ids = token_ids(ids, self.config.vocab_size)
        positions = None
        if position_ids is not None:
            positions = check_positions(ids, position_ids, LONGEST, "any")[..., None, :]  # the same for all heads
        with reading(cache, self, ids, key_padding) as now:
            x = self.model.embed_tokens(ids)
            for i, layer in enumerate(self.model.layers):
                x = layer(x, now.key_padding, positions, now.start, now.layer(i))
            return self.model.norm(x)  # type: ignore[no-any-return]
