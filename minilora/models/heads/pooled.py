"""Tokens pooled into one vector for a text, and classes of texts from it."""

from __future__ import annotations

from typing import Any

import numpy

from ... import backend, ops
from ...errors import ConfigError
from ...nn.layers import Dropout
from ...nn.linear import Linear
from ...settings import whole
from ...tensor import Tensor
from ..group import initialise
from .classifier import TextClassifier
from .labels import Labels

__all__ = ["POOLINGS", "SentenceClassifier", "check_pooling", "pooled", "width_of"]

POOLINGS = ("mean", "cls")
WIDTHS = ("hidden_size", "dim", "n_embd")  # what families call d
DROPOUTS = ("head_dropout", "seq_classif_dropout", "hidden_dropout_prob")  # and the dropout before a classifier


def check_pooling(pooling: Any) -> None:
    """`ConfigError` unless it is one of `POOLINGS`."""
    if pooling not in POOLINGS:
        raise ConfigError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")


def width_of(config: Any) -> int:
    """d, the length of a vector."""
    return next(int(getattr(config, name)) for name in WIDTHS if hasattr(config, name))


def pooled(h: Tensor, key_padding: Any, how: str) -> Tensor:
    """One vector for a text: v = sum_t m_t h_t / sum_t m_t, or that of the first token.

    Parameters
    ----------
    h : Tensor, shape (..., T, d)
    key_padding : array or nested lists of bool, or of 0 and 1, shape (..., T), optional
        m: 1 for tokens, 0 for padding. A text without a token has the vector 0.
    how : {"mean", "cls"}

    Returns
    -------
    Tensor, shape (..., d)
    """
    if how == "cls":
        return h[..., 0, :]
    if key_padding is None:
        return ops.mean(h, axis=-2)
    mask = key_padding if hasattr(key_padding, "dtype") else numpy.asarray(key_padding)
    if isinstance(mask, numpy.ndarray):
        mask = backend.to_device(mask, h.device)
    m = (mask != 0)[..., None].astype(h.dtype)
    count = m.sum(axis=-2, keepdims=True)
    return ops.sum(h * Tensor(m / (count + (count == 0))), axis=-2)


class SentenceClassifier(TextClassifier):
    """Classes of texts, from the vector that a sentence encoder has for them: the tokens pooled, and a linear layer.

    What `SentenceEncoder` was trained to is the mean over the tokens; BERT's own classifier (`BertClassifier`) stands on the
    first token, and on a pooler, which sentence encoders do not use and do not train.

    Parameters
    ----------
    model : Module
        The encoder, from ids (..., T) to hidden states (..., T, d), such as `Bert`. It needs no pooler.
    labels : Labels, int, or sequence of str
    pooling : {"mean", "cls"}
    max_tokens : int, optional
        What the encoder was trained to read; for those who cut texts, nothing is cut here.
    dtype : dtype, optional
        Of the classifier; the encoder's by default.
    rng : numpy.random.Generator or int, optional

    Attributes
    ----------
    model : Module
    classifier : Linear
        (d, n). Vectors come to it as they are, not of length 1.
    labels : Labels
    pooling, max_tokens
        As given.

    Raises
    ------
    ConfigError
        If a setting is out of range.

    Notes
    -----
    Saved, the encoder is a folder of sentence-transformers with the module Dense behind the pooling. An adapter of it is a
    PEFT folder for the encoder alone, transformers' BertModel, with `classifier` among modules_to_save.

    Examples
    --------
    >>> import minilora
    >>> config = minilora.nn.BertConfig(vocab_size=11, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
    ...                                 intermediate_size=8, max_position_embeddings=8)
    >>> model = minilora.models.SentenceClassifier(minilora.nn.Bert(config, False, rng=0), ["bad", "good"], rng=1)
    >>> model([[1, 2, 3], [4, 5, 0]], attention_mask=[[1, 1, 1], [1, 1, 0]]).shape
    (2, 2)
    """

    body_name = "model"
    names_elsewhere = {"model.": ""}

    def __init__(self, model: Any, labels: Any = 2, pooling: str = "mean", max_tokens: int | None = None, *, dtype: Any = None,
                 rng: numpy.random.Generator | int | None = None) -> None:
        check_pooling(pooling)
        super().__init__(model)
        rng = numpy.random.default_rng(rng)
        self.labels = labels if isinstance(labels, Labels) else Labels(labels)
        self.pooling, self.max_tokens = pooling, None if max_tokens is None else whole("max_tokens", max_tokens)
        self.drop = Dropout(next((getattr(self.config, name) for name in DROPOUTS if hasattr(self.config, name)), 0.0), rng=rng)
        self.classifier = Linear(width_of(self.config), self.labels.count, dtype=dtype or next(iter(model.parameters())).dtype,
                                 rng=rng)
        initialise(self.classifier, self.config.initializer_range, rng)

    def classes(self, h: Tensor, ids: Any, key_padding: Any) -> Tensor:
        return self.classifier(self.drop(pooled(h, key_padding, self.pooling)))  # type: ignore[no-any-return]
