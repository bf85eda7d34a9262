"""BERT: post-norm layers that see the whole text, learned positions and segments."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy

from ... import ops
from ...errors import StateError
from ...nn.attention import join_heads, split_heads
from ...nn.embedding import Embedding
from ...nn.front import NO_PREFIX, Fronted, FrontSizes, Prefix
from ...nn.layers import Dropout
from ...nn.linear import Linear
from ...nn.module import Module
from ...nn.norm import LayerNorm
from ...tensor import Tensor
from ..activations import activate, check_activation
from ..checks import check_config, check_multiple, check_pad, check_positions, one_padding, token_ids, token_types
from ..group import Group, initialise
from ..model import Model
from ..reading import reading

__all__ = ["Bert", "BertConfig", "BertLayer"]


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT, with the names and, dropout apart, the defaults of its config.json: bert-base-uncased.

    Parameters
    ----------
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size : int
        V, d, layers, heads, width of the MLP. d is a multiple of the heads.
    max_position_embeddings, type_vocab_size : int
        The largest T, and the number of segments.
    hidden_act : str
        Of the MLP: gelu, the exact form, or gelu_new, gelu_pytorch_tanh, relu, silu, tanh.
    layer_norm_eps : float
    hidden_dropout_prob : float
        Dropout in training, after the embeddings and before each residual addition. 0 here, 0.1 in the files.
    classifier_dropout : float, optional
        Before a classifier; hidden_dropout_prob by default.
    pad_token_id : int, optional
        The id whose vector starts as zeros and is not trained.
    initializer_range : float
        Standard deviation of the initial weights.

    Raises
    ------
    ConfigError
        With one line for every field that is out of range.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.0
    classifier_dropout: float | None = None
    pad_token_id: int | None = 0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        sizes = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                 "max_position_embeddings", "type_vocab_size"]
        check_config(self, sizes, ["layer_norm_eps", "initializer_range"],
                     ["hidden_dropout_prob"] + ["classifier_dropout"] * (self.classifier_dropout is not None))
        check_multiple(self, "hidden_size", "num_attention_heads")
        check_activation(self, "hidden_act")
        check_pad(self)

    @property
    def head_dropout(self) -> float:
        """Before a classifier."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout


class BertLayer(Module):
    """x <- norm(x + attention(x)), then x <- norm(x + mlp(x)): the norm stands after the addition (post-norm).

    Parameters
    ----------
    config : BertConfig
    dtype : dtype
    rng : numpy.random.Generator or int, optional

    Attributes
    ----------
    attention : Group
        self, a Group of query, key and value, each Linear (d, d); output, a Group of dense, Linear (d, d), and LayerNorm.
    intermediate : Group
        dense, Linear (d, intermediate_size).
    output : Group
        dense, Linear (intermediate_size, d), and LayerNorm.
    """

    def __init__(self, config: BertConfig, *, dtype: Any = "float32", rng: numpy.random.Generator | int | None = None) -> None:
        rng = numpy.random.default_rng(rng)
        d, inner = config.hidden_size, config.intermediate_size

        def linear(n: int, m: int) -> Linear:
            return Linear(n, m, dtype=dtype, rng=rng)

        def norm() -> LayerNorm:
            return LayerNorm(d, config.layer_norm_eps, dtype=dtype)

        self.num_heads, self.activation = config.num_attention_heads, config.hidden_act
        self.attention = Group(self=Group(query=linear(d, d), key=linear(d, d), value=linear(d, d)),
                               output=Group(dense=linear(d, d), LayerNorm=norm()))
        self.intermediate = Group(dense=linear(d, inner))
        self.output = Group(dense=linear(inner, d), LayerNorm=norm())
        self.drop = Dropout(config.hidden_dropout_prob, rng=rng)

    def forward(self, x: Any, key_padding: Any = None, prefix: Prefix = NO_PREFIX) -> Tensor:
        """x (..., T, d) to the same shape."""
        inputs, attended, mlp = self.attention.self, self.attention.output, self.output
        q, k, v = (split_heads(project(x), self.num_heads) for project in (inputs.query, inputs.key, inputs.value))
        y = join_heads(ops.prefix_attention(q, k, v, *prefix, key_padding=key_padding))
        x = attended.LayerNorm(x + self.drop(attended.dense(y)))
        y = activate(self.activation, self.intermediate.dense(x))
        return mlp.LayerNorm(x + self.drop(mlp.dense(y)))  # type: ignore[no-any-return]


class Bert(Fronted, Model):
    """BERT as an encoder: a vector for every token, and one for the text.

    Parameters
    ----------
    config : BertConfig
    add_pooling_layer : bool
        Whether there is a `pooler`.
    dtype : dtype
    rng : numpy.random.Generator or int, optional
        Draws the weights, on the host, so that one seed gives one model on every device.

    Attributes
    ----------
    embeddings : Group
        word_embeddings, Embedding (V, d); position_embeddings, Embedding (max_position_embeddings, d);
        token_type_embeddings, Embedding (type_vocab_size, d); LayerNorm.
    encoder : Group
        layer, list of BertLayer.
    pooler : Group or None
        dense, Linear (d, d).

    Notes
    -----
    Parameters have the names that transformers gives a BertModel. Files of models with a head put ``bert.`` in front of them;
    older ones call a LayerNorm's weight and bias gamma and beta. There is no dropout of attention probabilities.

    Weights start from N(0, 0.02^2), biases at 0. Source: Devlin et al. 2018, arXiv 1810.04805, section 3.

    Examples
    --------
    >>> import minilora
    >>> config = minilora.nn.BertConfig(vocab_size=11, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
    ...                                 intermediate_size=8, max_position_embeddings=8)
    >>> model = minilora.nn.Bert(config, rng=0)
    >>> h = model([[1, 2, 3]])
    >>> h.shape, model.pool(h).shape
    ((1, 3, 4), (1, 4))
    """

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True, *, dtype: Any = "float32",
                 rng: numpy.random.Generator | int | None = None) -> None:
        rng = numpy.random.default_rng(rng)
        d = config.hidden_size
        made: dict[str, Any] = dict(dtype=dtype, rng=rng)
        self.config = config
        self.embeddings = Group(
            word_embeddings=Embedding(config.vocab_size, d, config.pad_token_id, **made),
            position_embeddings=Embedding(config.max_position_embeddings, d, **made),
            token_type_embeddings=Embedding(config.type_vocab_size, d, **made),
            LayerNorm=LayerNorm(d, config.layer_norm_eps, dtype=dtype))
        self.drop = Dropout(config.hidden_dropout_prob, rng=rng)
        self.encoder = Group(layer=[BertLayer(config, **made) for _ in range(config.num_hidden_layers)])
        self.pooler = Group(dense=Linear(d, d, **made)) if add_pooling_layer else None
        initialise(self, config.initializer_range, rng)

    def forward(self, ids: Any, token_type_ids: Any = None, key_padding: Any = None, position_ids: Any = None, *,
                attention_mask: Any = None) -> Tensor:
        """A vector for every token.

        Parameters
        ----------
        ids : array, Tensor, or nested lists of int, shape (..., T)
            Best given on the host: see `ops.embedding`.
        token_type_ids : the same, optional
            The segment of each token; 0 by default.
        key_padding : array or nested lists of bool, or of 0 and 1, shape (..., T), optional
            True or 1 for tokens, False or 0 for padding, which no token then sees.
        attention_mask : the same, optional
            Another name of key_padding: that of transformers.
        position_ids : array or nested lists of int, shape (T,) or (..., T), optional
            0 to T - 1 by default.

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
        key_padding = one_padding(key_padding, attention_mask)
        config, parts = self.config, self.embeddings
        ids = token_ids(ids, config.vocab_size)
        segments = token_types(ids, token_type_ids, config.type_vocab_size)
        with reading(None, self, ids, key_padding) as now:
            positions = now.after(self.positions(ids, position_ids), self.first_position)
            if token_type_ids is not None:
                segments = now.with_prompt(segments, numpy.zeros(now.rows, "int64"))
            x = now.embedded(parts.word_embeddings(ids))
            x = x + parts.position_embeddings(positions) + parts.token_type_embeddings(segments)
            x = self.drop(parts.LayerNorm(x))
            for i, layer in enumerate(self.encoder.layer):
                x = layer(x, now.key_padding, now.prefix(i))
            return now.tokens(x)

    def positions(self, ids: Any, position_ids: Any = None) -> Any:
        """Rows of the table of positions for ids (..., T): those that were given, or those of the model."""
        return check_positions(ids, position_ids, self.config.max_position_embeddings - self.taken, "max_position_embeddings")

    @property
    def first_position(self) -> int:
        """Where positions begin."""
        return 0

    @property
    def embedding(self) -> Embedding:
        return self.embeddings.word_embeddings  # type: ignore[no-any-return]

    @property
    def front_sizes(self) -> FrontSizes:
        n, heads, d = self.config.num_hidden_layers, self.config.num_attention_heads, self.config.hidden_size
        return FrontSizes(n, heads, d // heads, d)

    def pool(self, h: Tensor) -> Tensor:
        """One vector for a text: tanh of a linear layer of its first token. h (..., T, d), from `forward`, to (..., d).

        Raises
        ------
        StateError
            If the model was made without a pooler.
        """
        if self.pooler is None:
            raise StateError("pool: this model was made with add_pooling_layer=False, so that it has no pooler")
        return ops.tanh(self.pooler.dense(h[..., 0, :]))
