"""DistilBERT's heads, with the names of transformers: classes of texts and of tokens, and masked tokens."""

from __future__ import annotations

from typing import Any

import numpy

from ... import ops
from ...nn.layers import Dropout
from ...nn.linear import Linear
from ...nn.norm import LayerNorm
from ...tensor import Parameter, Tensor
from ..activations import activate
from ..bodies.distilbert import EPS, DistilBert, DistilBertConfig
from ..group import Group, initialise
from .bert import zeros
from .classifier import TextClassifier, TokenClassifier
from .labels import Labels
from .masked import MaskedLM

__all__ = ["DistilBertClassifier", "DistilBertMaskedLM", "DistilBertTokenClassifier"]

Rng = Any  # numpy.random.Generator, int or None


class DistilBertClassifier(TextClassifier):
    """Classes of texts, from their first token: transformers' DistilBertForSequenceClassification.

    Parameters
    ----------
    config : DistilBertConfig
    labels : Labels
    dtype, rng
        As of `DistilBert`.

    Attributes
    ----------
    distilbert : DistilBert
    pre_classifier : Linear
        (d, d), with relu.
    classifier : Linear
        (d, n).
    """

    body_name = "distilbert"

    def __init__(self, config: DistilBertConfig, labels: Labels, *, dtype: Any = "float32", rng: Rng = None) -> None:
        rng = numpy.random.default_rng(rng)
        super().__init__(DistilBert(config, dtype=dtype, rng=rng))
        self.labels = labels
        self.pre_classifier = Linear(config.dim, config.dim, dtype=dtype, rng=rng)
        self.classifier = Linear(config.dim, labels.count, dtype=dtype, rng=rng)
        self.drop = Dropout(config.seq_classif_dropout, rng=rng)
        for layer in (self.pre_classifier, self.classifier):
            initialise(layer, config.initializer_range, rng)

    def classes(self, h: Tensor, ids: Any, key_padding: Any) -> Tensor:
        return self.classifier(self.drop(ops.relu(self.pre_classifier(h[..., 0, :]))))  # type: ignore[no-any-return]


class DistilBertTokenClassifier(TokenClassifier):
    """Classes of tokens: transformers' DistilBertForTokenClassification.

    Parameters
    ----------
    config, labels, dtype, rng
        As of `DistilBertClassifier`.

    Attributes
    ----------
    distilbert : DistilBert
    classifier : Linear
        (d, n).
    """

    body_name, head_name = "distilbert", "classifier"

    def __init__(self, config: DistilBertConfig, labels: Labels, *, dtype: Any = "float32", rng: Rng = None) -> None:
        rng = numpy.random.default_rng(rng)
        super().__init__(DistilBert(config, dtype=dtype, rng=rng), config.dim, labels, dropout=config.dropout, dtype=dtype,
                         rng=rng)


class DistilBertMaskedLM(MaskedLM):
    """Masked tokens: transformers' DistilBertForMaskedLM.

    Parameters
    ----------
    config, dtype, rng
        As of `DistilBert`.

    Attributes
    ----------
    distilbert : DistilBert
    vocab_transform : Linear
        (d, d), with the activation of the config.
    vocab_layer_norm : LayerNorm
    vocab_projector : Group
        bias (V,). The logits are products with the embedding's table.
    """

    body_name = "distilbert"
    head_elsewhere = "vocab_projector"  # the tied head as transformers calls it, for files that name it

    def __init__(self, config: DistilBertConfig, *, dtype: Any = "float32", rng: Rng = None) -> None:
        rng = numpy.random.default_rng(rng)
        super().__init__(DistilBert(config, dtype=dtype, rng=rng))
        self.vocab_transform = Linear(config.dim, config.dim, dtype=dtype, rng=rng)
        self.vocab_layer_norm = LayerNorm(config.dim, EPS, dtype=dtype)
        self.vocab_projector = Group(bias=zeros(config.vocab_size, dtype))
        initialise(self.vocab_transform, config.initializer_range, rng)

    def transform(self, h: Tensor) -> Tensor:
        return self.vocab_layer_norm(activate(self.config.activation, self.vocab_transform(h)))  # type: ignore[no-any-return]

    @property
    def output_bias(self) -> Parameter:
        return self.vocab_projector.bias  # type: ignore[no-any-return]
