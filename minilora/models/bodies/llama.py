"""The Llama family: pre-norm layers with RMSNorm, rotary positions, grouped heads and a gated MLP."""

from __future__ import annotations

from typing import Any

import numpy

from ... import ops
from ...nn.attention import join_heads, split_heads
from ...nn.embedding import Embedding
from ...nn.front import NO_PREFIX, Fronted, FrontSizes, Prefix
from ...nn.linear import Linear
from ...nn.module import Module
from ...nn.norm import RMSNorm
from ...nn.rotary import LONGEST, RotaryEmbedding
from ...tensor import Tensor
from ..activations import activate
from ..causal import CausalLM
from ..checks import one_padding, token_ids
from ..decoding.cache import Cache, LayerCache, extended
from ..group import Group, initialise
from ..model import Model
from ..reading import reading
from .llama_configs import RotaryDecoder

__all__ = ["Llama", "LlamaBody", "LlamaLayer"]


class LlamaLayer(Module):
    """x <- x + attention(norm(x)), then x <- x + mlp(norm(x)), with mlp(x) = down(act(gate(x)) up(x)).

    Parameters
    ----------
    config : LlamaConfig, MistralConfig, Qwen2Config or Qwen3Config
    rotary : RotaryEmbedding
        Of heads of hd numbers; one for all layers.
    index : int
        Which layer it is: it has the window of this place in `config.windows`.
    dtype : dtype
    rng : numpy.random.Generator or int, optional

    Attributes
    ----------
    input_layernorm, post_attention_layernorm : RMSNorm
    self_attn : Group
        q_proj, Linear (d, H hd); k_proj and v_proj, Linear (d, KV hd); o_proj, Linear (H hd, d); q_norm and k_norm, RMSNorm
        (hd) of every head, or None.
    mlp : Group
        gate_proj and up_proj, Linear (d, intermediate_size); down_proj, Linear (intermediate_size, d).

    Notes
    -----
    Sources: Touvron et al. 2023, arXiv 2302.13971, section 2.2; the gated MLP is that of Shazeer 2020, arXiv 2002.05202; the
    window that of Jiang et al. 2023, arXiv 2310.06825, section 2; norms of heads, Yang et al. 2025, arXiv 2505.09388.
    """

    def __init__(self, config: RotaryDecoder, rotary: RotaryEmbedding, index: int = 0, *, dtype: Any = "float32",
                 rng: numpy.random.Generator | int | None = None) -> None:
        d, inner, rng = config.hidden_size, config.intermediate_size, numpy.random.default_rng(rng)
        H, KV, hd = config.heads
        bias_qkv, bias_o, bias_mlp = config.biases

        def linear(n: int, m: int, bias: bool) -> Linear:
            return Linear(n, m, bias, dtype=dtype, rng=rng)

        def norm(n: int) -> RMSNorm:
            return RMSNorm(n, config.rms_norm_eps, dtype=dtype)

        self.num_heads, self.num_kv_heads, self.window, self.activation = H, KV, config.windows[index], config.hidden_act
        self.input_layernorm = norm(d)
        self.self_attn = Group(
            q_proj=linear(d, H * hd, bias_qkv), k_proj=linear(d, KV * hd, bias_qkv), v_proj=linear(d, KV * hd, bias_qkv),
            o_proj=linear(H * hd, d, bias_o),
            q_norm=norm(hd) if config.norm_heads else None, k_norm=norm(hd) if config.norm_heads else None)
        self.post_attention_layernorm = norm(d)
        self.mlp = Group(gate_proj=linear(d, inner, bias_mlp), up_proj=linear(d, inner, bias_mlp),
                         down_proj=linear(inner, d, bias_mlp))
        self.rotary = rotary

    def forward(self, x: Any, key_padding: Any = None, positions: Any = None, start: int = 0,
                past: LayerCache | None = None, prefix: Prefix = NO_PREFIX) -> Tensor:
        """x (..., T, d) to the same shape. Positions, if given, broadcast to (..., heads, T); else they begin with `start`."""
        attn, mlp, normed = self.self_attn, self.mlp, self.input_layernorm(x)
        q = self.rotary(split_heads(attn.q_proj(normed), self.num_heads, attn.q_norm), start, positions)
        k = self.rotary(split_heads(attn.k_proj(normed), self.num_kv_heads, attn.k_norm), start, positions)
        k, v = extended(past, k, split_heads(attn.v_proj(normed), self.num_kv_heads))
        y = ops.prefix_attention(q, k, v, *prefix, causal=True, key_padding=key_padding, window=self.window)
        x = x + attn.o_proj(join_heads(y))
        normed = self.post_attention_layernorm(x)
        gate = activate(self.activation, mlp.gate_proj(normed))
        return x + mlp.down_proj(ops.mul(gate, mlp.up_proj(normed)))  # type: ignore[no-any-return]


class LlamaBody(Fronted, Model):
    """A model of the Llama family without a head: hidden states, after the last norm. What transformers calls LlamaModel.

    Parameters
    ----------
    config, dtype, rng
        As in `Llama`.

    Attributes
    ----------
    embed_tokens : Embedding
        Tokens (V, d).
    layers : list of LlamaLayer
    norm : RMSNorm
    rotary : RotaryEmbedding
        One for all layers.
    """

    def __init__(self, config: RotaryDecoder, *, dtype: Any = "float32",
                 rng: numpy.random.Generator | int | None = None) -> None:
        rng = numpy.random.default_rng(rng)
        self.config = config
        self.rotary = RotaryEmbedding(config.heads[2], config.rope_theta, config.rope_scaling, config.max_position_embeddings)
        padding = None if config.pad_token_id is None else config.pad_token_id % config.vocab_size
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, padding, dtype=dtype, rng=rng)
        self.layers = [LlamaLayer(config, self.rotary, i, dtype=dtype, rng=rng) for i in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        initialise(self, config.initializer_range, rng)

    def forward(self, ids: Any, key_padding: Any = None, position_ids: Any = None, cache: Cache | None = None, *,
                attention_mask: Any = None) -> Tensor:
        """Ids (..., T) to hidden states (..., T, d), after the last norm.

        Parameters
        ----------
        ids : array, Tensor, or nested lists of int, shape (..., T)
        key_padding : array or nested lists of bool, or of 0 and 1, shape (..., T), optional
            True or 1 for tokens, False or 0 for padding, which no token then sees.
        position_ids : array or nested lists of int, shape (T,) or (..., T), optional
            0 to T - 1 by default, or with a cache the T after those it holds. Only their differences count (and for frequencies
            of the kind dynamic, the largest: keys in a cache stay turned as they were).
        cache : Cache, optional
            What was read before; ids and key_padding are those of the new tokens.
        attention_mask : the same, optional
            Another name of key_padding: that of transformers.
        """
        key_padding = one_padding(key_padding, attention_mask)
        ids = token_ids(ids, self.config.vocab_size)
        positions = None
        with reading(cache, self, ids, key_padding) as now:
            if position_ids is not None or now.uneven:
                positions = now.positions(position_ids, LONGEST, "any")[..., None, :]  # the same for all heads
            x = now.embedded(self.embed_tokens(ids))
            for i, layer in enumerate(self.layers):
                x = layer(x, now.key_padding, positions, now.first, now.layer(i), now.prefix(i))
            return self.norm(now.tokens(x))  # type: ignore[no-any-return]

    @property
    def embedding(self) -> Embedding:
        return self.embed_tokens

    @property
    def front_sizes(self) -> FrontSizes:
        _, KV, hd = self.config.heads
        return FrontSizes(self.config.num_hidden_layers, KV, hd, self.config.hidden_size)


class Llama(CausalLM):
    """A model of the Llama family as a language model: Llama, Mistral, Qwen2 or Qwen3, as its config says.

    Parameters
    ----------
    config : LlamaConfig, MistralConfig, Qwen2Config or Qwen3Config
    dtype : dtype
    rng : numpy.random.Generator or int, optional
        Draws the weights, on the host, so that one seed gives one model on every device.

    Attributes
    ----------
    model : LlamaBody
        embed_tokens, Embedding (V, d); layers, list of LlamaLayer; norm, RMSNorm.
    lm_head : Linear or None
        (d, V), without a bias; None if tie_word_embeddings.

    Notes
    -----
    Parameters have the names of the published files. All weights start from N(0, 0.02^2), biases at 0. Positions count by their
    differences only: a text that is padded at its left needs a key_padding, and nothing else. There is no dropout.

    Examples
    --------
    >>> import minilora
    >>> config = minilora.nn.LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
    ...                                  num_attention_heads=4, num_key_value_heads=2)
    >>> model = minilora.nn.Llama(config, rng=0)
    >>> model([[1, 2, 3]]).shape, model.loss([[1, 2, 3]], [[1, 2, 3]]).shape
    ((1, 3, 11), ())
    """

    def __init__(self, config: RotaryDecoder, *, dtype: Any = "float32",
                 rng: numpy.random.Generator | int | None = None) -> None:
        rng = numpy.random.default_rng(rng)
        self.config = config
        self.model = LlamaBody(config, dtype=dtype, rng=rng)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, rng=rng)
            initialise(self.lm_head, config.initializer_range, rng)

    @property
    def embedding(self) -> Embedding:
        return self.model.embed_tokens

    def hidden(self, ids: Any, key_padding: Any = None, position_ids: Any = None, cache: Cache | None = None) -> Tensor:
        """Ids (..., T) to hidden states (..., T, d), after the last norm: see `LlamaBody.forward`."""
        return self.model(ids, key_padding, position_ids, cache)  # type: ignore[no-any-return]
