"""RoBERTa's heads, with the names of transformers: classes of texts and of tokens, and masked tokens."""

from __future__ import annotations

from typing import Any

import numpy

from ... import ops
from ...nn.layers import Dropout
from ...nn.linear import Linear
from ...nn.norm import LayerNorm
from ...tensor import Parameter, Tensor
from ..bodies.roberta import Roberta, RobertaConfig
from ..group import Group, initialise
from .bert import zeros
from .classifier import TextClassifier, TokenClassifier
from .labels import Labels
from .masked import MaskedLM

__all__ = ["RobertaClassifier", "RobertaMaskedLM", "RobertaTokenClassifier"]

Rng = Any  # numpy.random.Generator, int or None


class RobertaClassifier(TextClassifier):
    """Classes of texts, from their first token <s>: transformers' RobertaForSequenceClassification.

    Parameters
    ----------
    config : RobertaConfig
    labels : Labels
    dtype, rng
        As of `Roberta`.

    Attributes
    ----------
    roberta : Roberta
        Without a pooler.
    classifier : Group
        dense, Linear (d, d), with tanh; out_proj, Linear (d, n).
    """

    body_name = "roberta"

    def __init__(self, config: RobertaConfig, labels: Labels, *, dtype: Any = "float32", rng: Rng = None) -> None:
        rng = numpy.random.default_rng(rng)
        super().__init__(Roberta(config, False, dtype=dtype, rng=rng))
        self.labels = labels
        d = config.hidden_size
        self.drop = Dropout(config.head_dropout, rng=rng)
        self.classifier = Group(dense=Linear(d, d, dtype=dtype, rng=rng),
                                out_proj=Linear(d, labels.count, dtype=dtype, rng=rng))
        initialise(self.classifier, config.initializer_range, rng)

    def classes(self, h: Tensor, ids: Any, key_padding: Any) -> Tensor:
        y = ops.tanh(self.classifier.dense(self.drop(h[..., 0, :])))
        return self.classifier.out_proj(self.drop(y))  # type: ignore[no-any-return]


class RobertaTokenClassifier(TokenClassifier):
    """Classes of tokens: transformers' RobertaForTokenClassification.

    Parameters
    ----------
    config, labels, dtype, rng
        As of `RobertaClassifier`.

    Attributes
    ----------
    roberta : Roberta
        Without a pooler.
    classifier : Linear
        (d, n).
    """

    body_name, head_name = "roberta", "classifier"

    def __init__(self, config: RobertaConfig, labels: Labels, *, dtype: Any = "float32", rng: Rng = None) -> None:
        rng = numpy.random.default_rng(rng)
        super().__init__(Roberta(config, False, dtype=dtype, rng=rng), config.hidden_size, labels, dropout=config.head_dropout,
                         dtype=dtype, rng=rng)


class RobertaMaskedLM(MaskedLM):
    """Masked tokens: transformers' RobertaForMaskedLM.

    Parameters
    ----------
    config, dtype, rng
        As of `Roberta`.

    Attributes
    ----------
    roberta : Roberta
        Without a pooler.
    lm_head : Group
        dense, Linear (d, d), with the exact gelu whatever hidden_act is; layer_norm; and bias (V,). The logits are products
        with the embedding's table.
    """

    body_name = "roberta"
    head_elsewhere = "lm_head.decoder"  # the tied head as transformers calls it, for files that name it

    def __init__(self, config: RobertaConfig, *, dtype: Any = "float32", rng: Rng = None) -> None:
        rng = numpy.random.default_rng(rng)
        super().__init__(Roberta(config, False, dtype=dtype, rng=rng))
        d = config.hidden_size
        self.lm_head = Group(dense=Linear(d, d, dtype=dtype, rng=rng),
                             layer_norm=LayerNorm(d, config.layer_norm_eps, dtype=dtype), bias=zeros(config.vocab_size, dtype))
        initialise(self.lm_head, config.initializer_range, rng)

    def transform(self, h: Tensor) -> Tensor:
        return self.lm_head.layer_norm(ops.gelu(self.lm_head.dense(h), "none"))  # type: ignore[no-any-return]

    @property
    def output_bias(self) -> Parameter:
        return self.lm_head.bias  # type: ignore[no-any-return]
