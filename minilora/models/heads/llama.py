"""Classifiers on the Llama family."""

from __future__ import annotations

from typing import Any

import numpy

from ..bodies.llama import LlamaBody
from ..bodies.llama_configs import RotaryDecoder
from .classifier import LastTokenClassifier, TokenClassifier
from .labels import Labels

__all__ = ["LlamaClassifier", "LlamaTokenClassifier"]


class LlamaClassifier(LastTokenClassifier):
    """Classes of texts, by their last tokens: transformers' LlamaForSequenceClassification, and those of the other members.

    Parameters
    ----------
    config : LlamaConfig, MistralConfig, Qwen2Config or Qwen3Config
    labels : Labels
    dtype, rng
        As of `Llama`.

    Attributes
    ----------
    model : LlamaBody
    score : Linear
        (d, n), without a bias.
    """

    def __init__(self, config: RotaryDecoder, labels: Labels, *, dtype: Any = "float32",
                 rng: numpy.random.Generator | int | None = None) -> None:
        rng = numpy.random.default_rng(rng)
        super().__init__(LlamaBody(config, dtype=dtype, rng=rng), config.hidden_size, labels, dtype=dtype, rng=rng)


class LlamaTokenClassifier(TokenClassifier):
    """Classes of tokens: transformers' LlamaForTokenClassification, and those of the other members.

    Parameters
    ----------
    config, labels, dtype, rng
        As of `LlamaClassifier`.

    Attributes
    ----------
    model : LlamaBody
    score : Linear
        (d, n).
    """

    def __init__(self, config: RotaryDecoder, labels: Labels, *, dtype: Any = "float32",
                 rng: numpy.random.Generator | int | None = None) -> None:
        rng = numpy.random.default_rng(rng)
        super().__init__(LlamaBody(config, dtype=dtype, rng=rng), config.hidden_size, labels,
                         dropout=config.classifier_dropout, dtype=dtype, rng=rng)
