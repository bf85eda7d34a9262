"""DeBERTa-v2 and v3: post-norm layers whose attention counts how far apart two tokens stand."""

from __future__ import annotations

import math
from typing import Any

import numpy

from ... import backend, ops
from ...nn.attention import join_heads, split_heads
from ...nn.conv import Conv1d
from ...nn.embedding import Embedding
from ...nn.layers import Dropout
from ...nn.linear import Linear
from ...nn.module import Module
from ...nn.norm import LayerNorm
from ...ops.masks import truths
from ...tensor import Tensor
from ..activations import activate
from ..checks import check_positions, one_padding, token_ids, token_types
from ..group import Group, initialise
from ..model import Model
from .deberta_config import DebertaV2Config

__all__ = ["DebertaV2", "DebertaV2Layer"]

Rng = Any  # numpy.random.Generator, int or None


class DebertaV2Layer(Module):
    """x <- norm(x + attention(x)), then x <- norm(x + mlp(x)), as in BERT, with attention to contents and distances.

    Parameters
    ----------
    config : DebertaV2Config
    dtype : dtype
    rng : numpy.random.Generator or int, optional

    Attributes
    ----------
    attention : Group
        self, a Group of query_proj, key_proj and value_proj, each Linear (d, d), and of pos_key_proj (for c2p) and
        pos_query_proj (for p2c), which are None where there is no such term or the others are shared; output, a Group of
        dense, Linear (d, d), and LayerNorm.
    intermediate : Group
        dense, Linear (d, intermediate_size).
    output : Group
        dense, Linear (intermediate_size, d), and LayerNorm.
    """

    def __init__(self, config: DebertaV2Config, *, dtype: Any = "float32", rng: Rng = None) -> None:
        rng = numpy.random.default_rng(rng)
        d, inner = config.hidden_size, config.intermediate_size
        terms = config.pos_att_type if config.relative_attention else ()
        own = () if config.share_att_key else terms

        def linear(n: int, m: int) -> Linear:
            return Linear(n, m, dtype=dtype, rng=rng)

        def norm() -> LayerNorm:
            return LayerNorm(d, config.layer_norm_eps, dtype=dtype)

        self.num_heads, self.terms, self.shared = config.num_attention_heads, terms, config.share_att_key
        self.scale = 1.0 / math.sqrt(d // config.num_attention_heads * (1 + len(config.pos_att_type)))
        self.activation = config.hidden_act
        self.attention = Group(
            self=Group(query_proj=linear(d, d), key_proj=linear(d, d), value_proj=linear(d, d),
                       pos_key_proj=linear(d, d) if "c2p" in own else None,
                       pos_query_proj=linear(d, d) if "p2c" in own else None),
            output=Group(dense=linear(d, d), LayerNorm=norm()))
        self.intermediate = Group(dense=linear(d, inner))
        self.output = Group(dense=linear(inner, d), LayerNorm=norm())
        self.drop = Dropout(config.hidden_dropout_prob, rng=rng)

    def forward(self, x: Any, key_padding: Any = None, distances: Any = None, buckets: Any = None) -> Tensor:
        """x (..., T, d) to the same shape.

        Parameters
        ----------
        x : Tensor, shape (..., T, d)
        key_padding : array of bool, shape (..., T), optional
        distances : Tensor, shape (1, ..., n, d), optional
            A vector for each of n kinds of distances, with as many axes as x, or 3 where x has 2: a batch of one text, from
            which projections that treat the rows of a batch differently make one for every row. Without it attention is to
            contents alone.
        buckets : array of int, shape (2 T - 1,), optional
            The kind of each distance from -(T - 1) to T - 1.
        """
        attended, mlp = self.attention.output, self.output
        y = join_heads(self.attend(x, key_padding, distances, buckets))
        x = attended.LayerNorm(x + self.drop(attended.dense(y)))
        y = activate(self.activation, self.intermediate.dense(x))
        return mlp.LayerNorm(x + self.drop(mlp.dense(y)))  # type: ignore[no-any-return]

    def attend(self, x: Any, key_padding: Any, distances: Any, buckets: Any) -> Tensor:
        """Attention in every head: (..., H, T, hd)."""
        parts, H = self.attention.self, self.num_heads
        q, k, v = (split_heads(project(x), H) for project in (parts.query_proj, parts.key_proj, parts.value_proj))
        if not self.terms or distances is None:
            return ops.attention(q, k, v, key_padding=key_padding, scale=self.scale)
        distances = self.drop(distances)
        for_keys = parts.key_proj if self.shared else parts.pos_key_proj
        for_queries = parts.query_proj if self.shared else parts.pos_query_proj
        rk = beside(split_heads(for_keys(distances), H), q) if "c2p" in self.terms else None
        rq = beside(split_heads(for_queries(distances), H), q) if "p2c" in self.terms else None
        return ops.disentangled_attention(q, k, v, rk, rq, buckets, key_padding, self.scale)


class DebertaV2(Model):
    """DeBERTa-v2 or v3 as an encoder: a vector for every token. What transformers calls DebertaV2Model.

    Parameters
    ----------
    config : DebertaV2Config
    dtype : dtype
    rng : numpy.random.Generator or int, optional
        Draws the weights, on the host, so that one seed gives one model on every device.

    Attributes
    ----------
    embeddings : Group
        word_embeddings, Embedding (V, d); position_embeddings, Embedding (max_position_embeddings, d), or None;
        token_type_embeddings, Embedding (type_vocab_size, d), or None; LayerNorm.
    encoder : Group
        layer, list of DebertaV2Layer; rel_embeddings, Embedding (2 span, d) of distances, or None; LayerNorm, of those, or
        None; conv, a Group of conv, Conv1d (d, d), and LayerNorm, or None.

    Notes
    -----
    Parameters have the names that transformers gives a DebertaV2Model. Files of models with a head put ``deberta.`` in front of
    them. There is no dropout of attention probabilities.

    Only the rows of the table of distances that T tokens can need are normalised and projected: for a text of 32 tokens 63 of
    512, which is most of the work of a short text.

    Weights start from N(0, 0.02^2), biases at 0. Sources: He et al. 2021, arXiv 2006.03654; of v3, arXiv 2111.09543.

    Examples
    --------
    >>> import minilora
    >>> config = minilora.models.DebertaV2Config(
    ...     vocab_size=11, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
    ...     relative_attention=True, position_buckets=4, max_relative_positions=8, pos_att_type="p2c|c2p")
    >>> minilora.models.DebertaV2(config, rng=0)([[1, 2, 3]]).shape
    (1, 3, 4)
    """

    def __init__(self, config: DebertaV2Config, *, dtype: Any = "float32", rng: Rng = None) -> None:
        rng = numpy.random.default_rng(rng)
        d, eps, kernel = config.hidden_size, config.layer_norm_eps, config.conv_kernel_size
        made: dict[str, Any] = dict(dtype=dtype, rng=rng)

        def norm() -> LayerNorm:
            return LayerNorm(d, eps, dtype=dtype)

        def table(rows: int, wanted: bool, padding: int | None = None) -> Embedding | None:
            return Embedding(rows, d, padding, **made) if wanted else None

        self.config = config
        self.embeddings = Group(
            word_embeddings=table(config.vocab_size, True, config.pad_token_id),
            position_embeddings=table(config.max_position_embeddings, config.position_biased_input),
            token_type_embeddings=table(config.type_vocab_size, config.type_vocab_size > 0), LayerNorm=norm())
        self.drop = Dropout(config.hidden_dropout_prob, rng=rng)
        conv = None
        if kernel:
            conv = Group(conv=Conv1d(d, d, kernel, padding=kernel // 2, groups=config.conv_groups, **made), LayerNorm=norm())
        self.encoder = Group(
            layer=[DebertaV2Layer(config, **made) for _ in range(config.num_hidden_layers)],
            rel_embeddings=table(2 * config.span, config.relative_attention),
            LayerNorm=norm() if config.norm_rel_ebd == "layer_norm" else None, conv=conv)
        initialise(self, config.initializer_range, rng)

    def forward(self, ids: Any, token_type_ids: Any = None, key_padding: Any = None, position_ids: Any = None, *,
                attention_mask: Any = None) -> Tensor:
        """A vector for every token.

        Parameters
        ----------
        ids : array, Tensor, or nested lists of int, shape (..., T)
            Best given on the host: see `ops.embedding`.
        token_type_ids : the same, optional
            The segment of each token; 0 by default. Where the model has no vectors of segments, as most, it is not read.
        key_padding : array or nested lists of bool, or of 0 and 1, shape (..., T), optional
            True or 1 for tokens, False or 0 for padding, which no token then sees.
        attention_mask : the same, optional
            Another name of key_padding: that of transformers.
        position_ids : array or nested lists of int, shape (T,) or (..., T), optional
            0 to T - 1 by default: for the vectors of positions, where there are any. Distances are those of the places.

        Returns
        -------
        Tensor, shape (..., T, d)

        Raises
        ------
        OutOfRangeError
            If an id is out of range.
        ShapeError
            If the shapes do not fit, or there are too many tokens.
        ConfigError
            If both key_padding and attention_mask are given.
        """
        keep = truths(one_padding(key_padding, attention_mask))
        ids = token_ids(ids, self.config.vocab_size)
        x = embedded = self.drop(without_padding(self.embed(ids, token_type_ids, position_ids), keep))
        distances, buckets = self.distances(ids.shape)
        for i, layer in enumerate(self.encoder.layer):
            x = layer(x, keep, distances, buckets)
            if i == 0 and self.encoder.conv is not None:
                x = self.convolve(embedded, x, keep)
        return x  # type: ignore[no-any-return]

    def embed(self, ids: Any, token_type_ids: Any, position_ids: Any) -> Tensor:
        """The vectors of tokens, positions and segments, added and normalised."""
        parts, config = self.embeddings, self.config
        x = parts.word_embeddings(ids)
        if parts.position_embeddings is not None:
            x = x + parts.position_embeddings(
                check_positions(ids, position_ids, config.max_position_embeddings, "max_position_embeddings"))
        if parts.token_type_embeddings is not None:
            x = x + parts.token_type_embeddings(token_types(ids, token_type_ids, config.type_vocab_size))
        return parts.LayerNorm(x)  # type: ignore[no-any-return]

    def distances(self, shape: tuple[int, ...]) -> tuple[Tensor | None, Any]:
        """The vectors of the distances that texts (..., T) can have, (1, ..., n, d), and which of them each distance has."""
        if self.encoder.rel_embeddings is None:
            return None, None
        buckets: Any = self.config.buckets(shape[-1])
        first, last = int(buckets.min()), int(buckets.max())
        lead = (1,) * max(1, len(shape) - 1)
        table = self.encoder.rel_embeddings
        ids: Any = numpy.arange(first, last + 1).reshape(*lead, -1)
        if not table.weight.trainable or table.weight.device.recorded:  # else they are counted, on the host
            ids = backend.constant(ids, table.weight.device)
        rows = table(ids)
        return rows if self.encoder.LayerNorm is None else self.encoder.LayerNorm(rows), buckets - first

    def convolve(self, embedded: Any, x: Any, keep: Any) -> Tensor:
        """norm(x + act(convolution of the embeddings over time)), zeros where there is padding."""
        *lead, T, d = embedded.shape
        conv = self.encoder.conv
        y = conv.conv(ops.transpose(ops.reshape(embedded, (-1, T, d)), (0, 2, 1)))
        y = without_padding(ops.reshape(ops.transpose(y, (0, 2, 1)), (*lead, T, d)), keep)
        return without_padding(conv.LayerNorm(x + activate(self.config.conv_act, self.drop(y))), keep)


def beside(table: Tensor, q: Tensor) -> Tensor:
    """A table (1, H, n, hd) without its first axis where q (H, T, hd) has none."""
    return table if len(q.shape) > 3 else ops.reshape(table, table.shape[1:])


def without_padding(x: Any, keep: Any) -> Tensor:
    """x (..., T, d) with zeros for padding: where keep (..., T), if there is one, is false."""
    return x if keep is None else ops.where(keep[..., None], x, 0.0)
