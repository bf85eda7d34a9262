"""BERT's heads, with the names of transformers: classes of texts and of tokens, and masked tokens."""

from __future__ import annotations

from typing import Any

import numpy

from ...nn.initial import first
from ...nn.layers import Dropout
from ...nn.linear import Linear
from ...nn.norm import LayerNorm
from ...tensor import Parameter, Tensor
from ..activations import activate
from ..bodies.bert import Bert, BertConfig
from ..group import Group, initialise
from .classifier import TextClassifier, TokenClassifier
from .labels import Labels
from .masked import MaskedLM

__all__ = ["BertClassifier", "BertMaskedLM", "BertTokenClassifier"]

Rng = Any  # numpy.random.Generator, int or None


class BertClassifier(TextClassifier):
    """Classes of texts, from BERT's pooler: transformers' BertForSequenceClassification.

    Parameters
    ----------
    config : BertConfig
    labels : Labels
    dtype, rng
        As of `Bert`.

    Attributes
    ----------
    bert : Bert
    classifier : Linear
        (d, n), of the pooled vector.
    """

    body_name = "bert"

    def __init__(self, config: BertConfig, labels: Labels, *, dtype: Any = "float32", rng: Rng = None) -> None:
        rng = numpy.random.default_rng(rng)
        super().__init__(Bert(config, dtype=dtype, rng=rng))
        self.labels = labels
        self.drop = Dropout(config.head_dropout, rng=rng)
        self.classifier = Linear(config.hidden_size, labels.count, dtype=dtype, rng=rng)
        initialise(self.classifier, config.initializer_range, rng)

    def classes(self, h: Tensor, ids: Any, key_padding: Any) -> Tensor:
        return self.classifier(self.drop(self.body.pool(h)))  # type: ignore[no-any-return]


class BertTokenClassifier(TokenClassifier):
    """Classes of tokens: transformers' BertForTokenClassification.

    Parameters
    ----------
    config, labels, dtype, rng
        As of `BertClassifier`.

    Attributes
    ----------
    bert : Bert
        Without a pooler.
    classifier : Linear
        (d, n).
    """

    body_name, head_name = "bert", "classifier"

    def __init__(self, config: BertConfig, labels: Labels, *, dtype: Any = "float32", rng: Rng = None) -> None:
        rng = numpy.random.default_rng(rng)
        super().__init__(Bert(config, False, dtype=dtype, rng=rng), config.hidden_size, labels, dropout=config.head_dropout,
                         dtype=dtype, rng=rng)


class BertMaskedLM(MaskedLM):
    """Masked tokens: transformers' BertForMaskedLM.

    Parameters
    ----------
    config, dtype, rng
        As of `Bert`.

    Attributes
    ----------
    bert : Bert
        Without a pooler.
    cls : Group
        predictions, with transform: dense, Linear (d, d), and LayerNorm; and bias (V,). The logits are products with the
        embedding's table.
    """

    body_name = "bert"
    head_elsewhere = "cls.predictions.decoder"  # the tied head as transformers calls it, for files that name it

    def __init__(self, config: BertConfig, *, dtype: Any = "float32", rng: Rng = None) -> None:
        rng = numpy.random.default_rng(rng)
        super().__init__(Bert(config, False, dtype=dtype, rng=rng))
        d = config.hidden_size
        transform = Group(dense=Linear(d, d, dtype=dtype, rng=rng), LayerNorm=LayerNorm(d, config.layer_norm_eps, dtype=dtype))
        self.cls = Group(predictions=Group(transform=transform, bias=zeros(config.vocab_size, dtype)))
        initialise(self.cls, config.initializer_range, rng)

    def transform(self, h: Tensor) -> Tensor:
        parts = self.cls.predictions.transform
        return parts.LayerNorm(activate(self.config.hidden_act, parts.dense(h)))  # type: ignore[no-any-return]

    @property
    def output_bias(self) -> Parameter:
        return self.cls.predictions.bias  # type: ignore[no-any-return]


def zeros(n: int, dtype: Any) -> Parameter:
    """The bias of the logits, as it starts."""
    return first((n,), dtype, lambda: numpy.zeros(n))
