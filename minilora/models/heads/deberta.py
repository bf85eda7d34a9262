"""DeBERTa's heads, with the names of transformers: classes of texts and of tokens, and masked tokens."""

from __future__ import annotations

from typing import Any

import numpy

from ...nn.layers import Dropout
from ...nn.linear import Linear
from ...nn.norm import LayerNorm
from ...tensor import Parameter, Tensor
from ..activations import activate
from ..bodies.deberta import DebertaV2
from ..bodies.deberta_config import DebertaV2Config
from ..group import Group, initialise
from .bert import zeros
from .classifier import TextClassifier, TokenClassifier
from .labels import Labels
from .masked import MaskedLM

__all__ = ["DebertaV2Classifier", "DebertaV2MaskedLM", "DebertaV2TokenClassifier"]

Rng = Any  # numpy.random.Generator, int or None


class DebertaV2Classifier(TextClassifier):
    """Classes of texts, from the first token: transformers' DebertaV2ForSequenceClassification.

    Parameters
    ----------
    config : DebertaV2Config
    labels : Labels
    dtype, rng
        As of `DebertaV2`.

    Attributes
    ----------
    deberta : DebertaV2
    pooler : Group
        dense, Linear (d, d): pooler_hidden_act of it is what is classified.
    classifier : Linear
        (d, n).
    """

    body_name = "deberta"

    def __init__(self, config: DebertaV2Config, labels: Labels, *, dtype: Any = "float32", rng: Rng = None) -> None:
        rng = numpy.random.default_rng(rng)
        super().__init__(DebertaV2(config, dtype=dtype, rng=rng))
        self.labels = labels
        self.drop_first = Dropout(config.pooler_dropout, rng=rng)
        self.pooler = Group(dense=Linear(config.hidden_size, config.hidden_size, dtype=dtype, rng=rng))
        self.drop = Dropout(config.hidden_dropout_prob if config.cls_dropout is None else config.cls_dropout, rng=rng)
        self.classifier = Linear(config.hidden_size, labels.count, dtype=dtype, rng=rng)
        initialise(self.pooler, config.initializer_range, rng)
        initialise(self.classifier, config.initializer_range, rng)

    def classes(self, h: Tensor, ids: Any, key_padding: Any) -> Tensor:
        pooled = activate(self.config.pooler_hidden_act, self.pooler.dense(self.drop_first(h[..., 0, :])))
        return self.classifier(self.drop(pooled))  # type: ignore[no-any-return]


class DebertaV2TokenClassifier(TokenClassifier):
    """Classes of tokens: transformers' DebertaV2ForTokenClassification.

    Parameters
    ----------
    config, labels, dtype, rng
        As of `DebertaV2Classifier`.

    Attributes
    ----------
    deberta : DebertaV2
    classifier : Linear
        (d, n).
    """

    body_name, head_name = "deberta", "classifier"

    def __init__(self, config: DebertaV2Config, labels: Labels, *, dtype: Any = "float32", rng: Rng = None) -> None:
        rng = numpy.random.default_rng(rng)
        super().__init__(DebertaV2(config, dtype=dtype, rng=rng), config.hidden_size, labels,
                         dropout=config.hidden_dropout_prob, dtype=dtype, rng=rng)


class DebertaV2MaskedLM(MaskedLM):
    """Masked tokens: transformers' DebertaV2ForMaskedLM, in both of its forms, which differ by names alone.

    Parameters
    ----------
    config, dtype, rng
        As of `DebertaV2`.

    Attributes
    ----------
    deberta : DebertaV2
    cls : Group or None
        If config.legacy: predictions, with transform: dense, Linear (d, d), and LayerNorm; and bias (V,).
    lm_predictions : Group or None
        If not: lm_head, with dense, Linear (d, d), LayerNorm, and bias (V,). The logits are products with the embedding's
        table in both.
    """

    body_name = "deberta"

    def __init__(self, config: DebertaV2Config, *, dtype: Any = "float32", rng: Rng = None) -> None:
        rng = numpy.random.default_rng(rng)
        super().__init__(DebertaV2(config, dtype=dtype, rng=rng))
        d, bias = config.hidden_size, zeros(config.vocab_size, dtype)
        parts: dict[str, Any] = dict(dense=Linear(d, d, dtype=dtype, rng=rng),
                                     LayerNorm=LayerNorm(d, config.layer_norm_eps, dtype=dtype))
        self.cls: Any = None
        self.lm_predictions: Any = None
        if config.legacy:
            self.cls = Group(predictions=Group(transform=Group(**parts), bias=bias))
            initialise(self.cls, config.initializer_range, rng)
        else:
            self.lm_predictions = Group(lm_head=Group(**parts, bias=bias))
            initialise(self.lm_predictions, config.initializer_range, rng)

    def transform(self, h: Tensor) -> Tensor:
        parts = self.lm_predictions.lm_head if self.cls is None else self.cls.predictions.transform
        return parts.LayerNorm(activate(self.config.hidden_act, parts.dense(h)))  # type: ignore[no-any-return]

    @property
    def output_bias(self) -> Parameter:
        parts = self.lm_predictions.lm_head if self.cls is None else self.cls.predictions
        return parts.bias  # type: ignore[no-any-return]
