"""DistilBERT: BERT's layers under other names, without segments and without a pooler."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy

from ... import ops
from ...nn.attention import join_heads, split_heads
from ...nn.embedding import Embedding
from ...nn.layers import Dropout
from ...nn.linear import Linear
from ...nn.module import Module
from ...nn.norm import LayerNorm
from ...tensor import Tensor
from ..activations import activate, check_activation
from ..checks import check_config, check_multiple, check_pad, check_positions, one_padding, token_ids
from ..group import Group, initialise
from ..model import Model

__all__ = ["DistilBert", "DistilBertConfig", "DistilBertLayer"]

EPS = 1e-12  # of all norms: no field of config.json says otherwise


@dataclasses.dataclass(frozen=True)
class DistilBertConfig:
    """The shape of a DistilBERT, with the names and, dropout apart, the defaults of its config.json.

    Parameters
    ----------
    vocab_size, dim, n_layers, n_heads, hidden_dim : int
        V, d, layers, heads, width of the MLP. d is a multiple of the heads.
    max_position_embeddings : int
        The largest T.
    activation : str
        Of the MLP: gelu, the exact form, or gelu_new, gelu_pytorch_tanh, relu, silu, tanh.
    dropout, seq_classif_dropout : float
        Dropout in training, after the embeddings and the MLP, and before a classifier of texts. 0 here, 0.1 and 0.2 in the
        files.
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
    dim: int = 768
    n_layers: int = 6
    n_heads: int = 12
    hidden_dim: int = 3072
    max_position_embeddings: int = 512
    activation: str = "gelu"
    dropout: float = 0.0
    seq_classif_dropout: float = 0.0
    pad_token_id: int | None = 0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        check_config(self, ["vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "max_position_embeddings"],
                     ["initializer_range"], ["dropout", "seq_classif_dropout"])
        check_multiple(self, "dim", "n_heads")
        check_activation(self, "activation")
        check_pad(self)


class DistilBertLayer(Module):
    """x <- norm(x + attention(x)), then x <- norm(x + mlp(x)): the norm stands after the addition (post-norm).

    Parameters
    ----------
    config : DistilBertConfig
    dtype : dtype
    rng : numpy.random.Generator or int, optional

    Attributes
    ----------
    attention : Group
        q_lin, k_lin, v_lin and out_lin, each Linear (d, d).
    sa_layer_norm, output_layer_norm : LayerNorm
    ffn : Group
        lin1, Linear (d, hidden_dim); lin2, Linear (hidden_dim, d).
    """

    def __init__(self, config: DistilBertConfig, *, dtype: Any = "float32",
                 rng: numpy.random.Generator | int | None = None) -> None:
        made: dict[str, Any] = dict(dtype=dtype, rng=numpy.random.default_rng(rng))
        d, inner = config.dim, config.hidden_dim
        self.num_heads, self.activation = config.n_heads, config.activation
        self.attention = Group(**{name: Linear(d, d, **made) for name in ("q_lin", "k_lin", "v_lin", "out_lin")})
        self.sa_layer_norm = LayerNorm(d, EPS, dtype=dtype)
        self.ffn = Group(lin1=Linear(d, inner, **made), lin2=Linear(inner, d, **made))
        self.output_layer_norm = LayerNorm(d, EPS, dtype=dtype)
        self.drop = Dropout(config.dropout, rng=made["rng"])

    def forward(self, x: Any, key_padding: Any = None) -> Tensor:
        """x (..., T, d) to the same shape."""
        attn, ffn = self.attention, self.ffn
        q, k, v = (split_heads(project(x), self.num_heads) for project in (attn.q_lin, attn.k_lin, attn.v_lin))
        x = self.sa_layer_norm(x + attn.out_lin(join_heads(ops.attention(q, k, v, key_padding=key_padding))))
        y = ffn.lin2(activate(self.activation, ffn.lin1(x)))
        return self.output_layer_norm(x + self.drop(y))  # type: ignore[no-any-return]


class DistilBert(Model):
    """DistilBERT as an encoder: a vector for every token.

    Parameters
    ----------
    config : DistilBertConfig
    dtype : dtype
    rng : numpy.random.Generator or int, optional
        Draws the weights, on the host, so that one seed gives one model on every device.

    Attributes
    ----------
    embeddings : Group
        word_embeddings, Embedding (V, d); position_embeddings, Embedding (max_position_embeddings, d); LayerNorm.
    transformer : Group
        layer, list of DistilBertLayer.

    Notes
    -----
    Parameters have the names that transformers gives a DistilBertModel. There is no dropout of attention probabilities.
    Source: Sanh et al. 2019, arXiv 1910.01108.

    Examples
    --------
    >>> import minilora
    >>> config = minilora.models.DistilBertConfig(vocab_size=11, dim=4, n_layers=1, n_heads=2, hidden_dim=8)
    >>> minilora.models.DistilBert(config, rng=0)([[1, 2, 3]]).shape
    (1, 3, 4)
    """

    def __init__(self, config: DistilBertConfig, *, dtype: Any = "float32",
                 rng: numpy.random.Generator | int | None = None) -> None:
        rng = numpy.random.default_rng(rng)
        made: dict[str, Any] = dict(dtype=dtype, rng=rng)
        self.config = config
        self.embeddings = Group(
            word_embeddings=Embedding(config.vocab_size, config.dim, config.pad_token_id, **made),
            position_embeddings=Embedding(config.max_position_embeddings, config.dim, **made),
            LayerNorm=LayerNorm(config.dim, EPS, dtype=dtype))
        self.drop = Dropout(config.dropout, rng=rng)
        self.transformer = Group(layer=[DistilBertLayer(config, **made) for _ in range(config.n_layers)])
        initialise(self, config.initializer_range, rng)

    def forward(self, ids: Any, key_padding: Any = None, position_ids: Any = None, *, attention_mask: Any = None) -> Tensor:
        """A vector for every token (..., T, d); the parameters are those of `Bert.forward`, without segments."""
        key_padding = one_padding(key_padding, attention_mask)
        ids = token_ids(ids, self.config.vocab_size)
        positions = check_positions(ids, position_ids, self.config.max_position_embeddings, "max_position_embeddings")
        parts = self.embeddings
        x = self.drop(parts.LayerNorm(parts.word_embeddings(ids) + parts.position_embeddings(positions)))
        for layer in self.transformer.layer:
            x = layer(x, key_padding)
        return x  # type: ignore[no-any-return]
