"""GPT-2: pre-norm blocks, learned positions, one projection for queries, keys and values, tied output."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy

from ... import ops
from ...nn.attention import join_heads, split_heads
from ...nn.embedding import Embedding
from ...nn.front import NO_PREFIX, Fronted, FrontSizes, Prefix
from ...nn.layers import Dropout
from ...nn.linear import Linear
from ...nn.module import Module
from ...nn.norm import LayerNorm
from ...tensor import Tensor
from ..activations import activate, check_activation
from ..causal import CausalLM
from ..checks import check_config, check_multiple, check_pad, check_tied, one_padding, token_ids
from ..decoding.cache import Cache, LayerCache
from ..group import Group, initialise
from ..model import Model
from ..reading import reading

__all__ = ["GPT2", "GPT2Block", "GPT2Body", "GPT2Config"]


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2, with the names and, dropout apart, the defaults of its config.json: the model of 124 million.

    Parameters
    ----------
    vocab_size, n_positions, n_embd, n_layer, n_head : int
        V, the largest T, d, blocks, heads. d is a multiple of n_head.
    n_inner : int, optional
        Width of the MLP; 4 d by default.
    activation_function : str
        Of the MLP: gelu_new, the tanh form, or gelu, gelu_pytorch_tanh, relu, silu, tanh.
    layer_norm_epsilon : float
    embd_pdrop, resid_pdrop, classifier_dropout : float
        Dropout in training, after the embeddings, before each residual addition, and before a token classifier. 0 here, 0.1 in
        the files.
    initializer_range : float
        Standard deviation of the initial weights.
    tie_word_embeddings : bool
        Make the logits with the embedding's table, without an lm_head.
    pad_token_id : int, optional
        For classes of texts: the last token that is another is the text's last.

    Raises
    ------
    ConfigError
        With one line for every field that is out of range.

    Examples
    --------
    >>> GPT2Config(n_embd=10, n_head=4)
    Traceback (most recent call last):
    minilora.errors.ConfigError: GPT2Config: n_embd must be a multiple of n_head, got 10 and 4
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    classifier_dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        sizes = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"]
        check_config(self, sizes + ["n_inner"] * (self.n_inner is not None), ["layer_norm_epsilon", "initializer_range"],
                     ["embd_pdrop", "resid_pdrop", "classifier_dropout"])
        check_multiple(self, "n_embd", "n_head")
        check_activation(self, "activation_function")
        check_tied(self)
        check_pad(self)


class GPT2Block(Module):
    """x <- x + attention(norm(x)), then x <- x + mlp(norm(x)): the norm stands before (pre-norm), x itself is never normed.

    Parameters
    ----------
    config : GPT2Config
    dtype : dtype
    rng : numpy.random.Generator or int, optional

    Attributes
    ----------
    ln_1, ln_2 : LayerNorm
    attn : Group
        c_attn, Linear (d, 3 d): queries, keys, values; c_proj, Linear (d, d).
    mlp : Group
        c_fc, Linear (d, n_inner); c_proj, Linear (n_inner, d).
    """

    def __init__(self, config: GPT2Config, *, dtype: Any = "float32", rng: numpy.random.Generator | int | None = None) -> None:
        rng = numpy.random.default_rng(rng)
        d, inner, eps = config.n_embd, config.n_inner or 4 * config.n_embd, config.layer_norm_epsilon
        made: dict[str, Any] = dict(dtype=dtype, rng=rng)
        self.num_heads, self.activation = config.n_head, config.activation_function
        self.ln_1 = LayerNorm(d, eps, dtype=dtype)
        self.attn = Group(c_attn=Linear(d, 3 * d, **made), c_proj=Linear(d, d, **made))
        self.ln_2 = LayerNorm(d, eps, dtype=dtype)
        self.mlp = Group(c_fc=Linear(d, inner, **made), c_proj=Linear(inner, d, **made))
        self.drop = Dropout(config.resid_pdrop, rng=rng)

    def forward(self, x: Any, key_padding: Any = None, past: LayerCache | None = None, prefix: Prefix = NO_PREFIX) -> Tensor:
        """x (..., T, d) to the same shape."""
        attn, mlp = self.attn, self.mlp
        qkv = attn.c_attn(self.ln_1(x))
        if past is None:
            y = ops.packed_prefix_attention(qkv, self.num_heads, *prefix[:2], causal=True, key_padding=key_padding)
        else:
            q, k, v = ops.split(split_heads(qkv, 3 * self.num_heads), 3, axis=-3)
            k, v = past.extend(k, v)
            y = join_heads(ops.prefix_attention(q, k, v, *prefix, causal=True, key_padding=key_padding))
        x = x + self.drop(attn.c_proj(y))
        return x + self.drop(mlp.c_proj(activate(self.activation, mlp.c_fc(self.ln_2(x)))))  # type: ignore[no-any-return]


class GPT2Body(Fronted, Model):
    """GPT-2 without a head: hidden states, after the last norm. The model that transformers calls GPT2Model.

    Parameters
    ----------
    config, dtype, rng
        As in `GPT2`.

    Attributes
    ----------
    wte, wpe, h, ln_f
        As in `GPT2`.
    """

    def __init__(self, config: GPT2Config, *, dtype: Any = "float32", rng: numpy.random.Generator | int | None = None) -> None:
        rng = numpy.random.default_rng(rng)
        self.config = config
        self.wte = Embedding(config.vocab_size, config.n_embd, dtype=dtype, rng=rng)
        self.wpe = Embedding(config.n_positions, config.n_embd, dtype=dtype, rng=rng)
        self.drop = Dropout(config.embd_pdrop, rng=rng)
        self.h = [GPT2Block(config, dtype=dtype, rng=rng) for _ in range(config.n_layer)]
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon, dtype=dtype)
        # 2 n_layer outputs are added up in the residual stream: its variance then does not grow with the depth.
        initialise(self, config.initializer_range, rng, config.initializer_range / math.sqrt(2 * config.n_layer))

    def forward(self, ids: Any, key_padding: Any = None, position_ids: Any = None, cache: Cache | None = None, *,
                attention_mask: Any = None) -> Tensor:
        """Ids (..., T) to hidden states (..., T, d); `attention_mask` is another name of key_padding."""
        return self.hidden(ids, one_padding(key_padding, attention_mask), position_ids, cache)

    @property
    def embedding(self) -> Embedding:
        return self.wte

    @property
    def positions(self) -> int:
        return self.config.n_positions - self.taken

    @property
    def front_sizes(self) -> FrontSizes:
        n, heads, d = self.config.n_layer, self.config.n_head, self.config.n_embd
        return FrontSizes(n, heads, d // heads, d)

    def hidden(self, ids: Any, key_padding: Any = None, position_ids: Any = None, cache: Cache | None = None) -> Tensor:
        """Ids (..., T) to hidden states (..., T, d), after the last norm.

        Parameters
        ----------
        ids, key_padding
            As in `forward`.
        position_ids : array or nested lists of int, shape (T,) or (..., T), optional
            0 to T - 1 by default, or with a cache the T after those it holds. A text that is padded at its left needs positions
            that count from its own start.
        cache : Cache, optional
            What was read before; ids and key_padding are those of the new tokens.
        """
        ids = token_ids(ids, self.config.vocab_size)
        with reading(cache, self, ids, key_padding) as now:
            positions = now.positions(position_ids, self.config.n_positions, "n_positions")
            x = self.drop(now.embedded(self.wte(ids)) + self.wpe(positions))
            for i, block in enumerate(self.h):
                x = block(x, now.key_padding, now.layer(i), now.prefix(i))
            return self.ln_f(now.tokens(x))  # type: ignore[no-any-return]


class GPT2(GPT2Body, CausalLM):
    """GPT-2 as a language model.

    Parameters
    ----------
    config : GPT2Config
    dtype : dtype
    rng : numpy.random.Generator or int, optional
        Draws the weights, on the host, so that one seed gives one model on every device.

    Attributes
    ----------
    wte : Embedding
        Tokens (V, d). The logits are products with this table, unless there is another head.
    wpe : Embedding
        Positions (n_positions, d).
    h : list of GPT2Block
    ln_f : LayerNorm
    lm_head : Linear or None
        (d, V), without a bias; None if tie_word_embeddings.

    Notes
    -----
    Parameters have the names of the published file; files that transformers saves put ``transformer.`` in front of them. **The
    file's matrices are (in, out), here they are (out, in)** as everywhere: those of c_attn, c_proj and c_fc are to be
    transposed. There is no dropout of attention probabilities.

    Weights start from N(0, 0.02^2), those of c_proj from N(0, 0.02^2 / (2 n_layer)), biases at 0.
    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.

    Examples
    --------
    >>> import minilora
    >>> config = minilora.nn.GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=2)
    >>> model = minilora.nn.GPT2(config, rng=0)
    >>> model([[1, 2, 3]]).shape, model.loss([[1, 2, 3]], [[1, 2, 3]]).shape
    ((1, 3, 11), ())
    """

    forward = CausalLM.forward  # type: ignore[assignment]  # logits, not hidden states
    # What transformers' GPT2LMHeadModel has in front of these paths, by what they start with: for files that name them.
    names_elsewhere = {"": "transformer.", "lm_head": "lm_head"}

    def __init__(self, config: GPT2Config, *, dtype: Any = "float32", rng: numpy.random.Generator | int | None = None) -> None:
        rng = numpy.random.default_rng(rng)
        super().__init__(config, dtype=dtype, rng=rng)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False, dtype=dtype, rng=rng)
            initialise(self.lm_head, config.initializer_range, rng)
