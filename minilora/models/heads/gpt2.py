"""GPT-2's classifiers."""

from __future__ import annotations

from typing import Any

import numpy

from ..bodies.gpt2 import GPT2Body, GPT2Config
from .classifier import LastTokenClassifier, TokenClassifier
from .labels import Labels

__all__ = ["GPT2Classifier", "GPT2TokenClassifier"]


class GPT2Classifier(LastTokenClassifier):
    """Classes of texts: transformers' GPT2ForSequenceClassification.

    Parameters
    ----------
    config : GPT2Config
    labels : Labels
    dtype, rng
        As of `GPT2`.

    Attributes
    ----------
    transformer : GPT2Body
    score : Linear
        (d, n), without a bias.
    """

    body_name = "transformer"

    def __init__(self, config: GPT2Config, labels: Labels, *, dtype: Any = "float32",
                 rng: numpy.random.Generator | int | None = None) -> None:
        rng = numpy.random.default_rng(rng)
        super().__init__(GPT2Body(config, dtype=dtype, rng=rng), config.n_embd, labels, dtype=dtype, rng=rng)


class GPT2TokenClassifier(TokenClassifier):
    """Classes of tokens: transformers' GPT2ForTokenClassification.

    Parameters
    ----------
    config, labels, dtype, rng
        As of `GPT2Classifier`.

    Attributes
    ----------
    transformer : GPT2Body
    classifier : Linear
        (d, n).
    """

    body_name = "transformer"
    head_name = "classifier"

    def __init__(self, config: GPT2Config, labels: Labels, *, dtype: Any = "float32",
                 rng: numpy.random.Generator | int | None = None) -> None:
        rng = numpy.random.default_rng(rng)
        super().__init__(GPT2Body(config, dtype=dtype, rng=rng), config.n_embd, labels, dropout=config.classifier_dropout,
                         dtype=dtype, rng=rng)
