"""Masked language models: which token stood there, from all the others."""

from __future__ import annotations

from typing import Any

import numpy

from ... import ops
from ...errors import ShapeError
from ...nn.embedding import Embedding
from ...ops.indices import beside, integers
from ...tensor import Parameter, Tensor
from ..checks import one_padding
from .classifier import Headed
from .labels import IGNORED

__all__ = ["MaskedLM"]


class MaskedLM(Headed):
    """A body whose hidden states become logits of tokens, by the embedding's own table. A subclass defines two things more."""

    def transform(self, h: Tensor) -> Tensor:
        """Hidden states (..., d) to what is multiplied with the table, (..., d)."""
        raise TypeError(f"{type(self).__name__} has no transform: define transform(self, h) in the subclass")

    @property
    def output_bias(self) -> Parameter:
        """What is added to the logits, (V,)."""
        raise TypeError(f"{type(self).__name__} has no output_bias: define the property in the subclass")

    @property
    def embedding(self) -> Embedding:
        """The embedding of the tokens, whose table makes the logits."""
        return self.body.embeddings.word_embeddings  # type: ignore[no-any-return]

    def example(self, rows: int, length: int) -> dict[str, Any]:
        """As `Model.example`, with the ids as labels, each of which counts: more than a share that is masked."""
        given = super().example(rows, length)
        return {**given, "labels": given["ids"]}

    def forward(self, ids: Any, labels: Any = None, key_padding: Any = None, *, attention_mask: Any = None,
                **more: Any) -> Tensor:
        """Logits; with labels, the loss.

        Parameters
        ----------
        ids : array, Tensor, or nested lists of int, shape (..., T)
        labels : the same, optional
            The tokens that stood there, -100 where nothing was masked: such places are not computed.
        key_padding : array or nested lists of bool, or of 0 and 1, shape (..., T), optional
            True or 1 for tokens, False or 0 for padding, which no token then sees.
        attention_mask : the same, optional
            Another name of key_padding: that of transformers.
        **more
            What else the body takes.

        Returns
        -------
        Tensor, shape (..., T, V), or () if labels are given: the mean of -log p over the labels that count
        """
        h = self.hidden(ids, one_padding(key_padding, attention_mask), **more)
        if labels is None:
            return self._logits(self.transform(h))
        labels = integers("label", labels, self.embedding.num_embeddings, IGNORED)
        if labels.shape != h.shape[:-1]:
            raise ShapeError(f"expected labels of the shape of the ids, {h.shape[:-1]}, got {labels.shape}")
        h, labels = ops.reshape(h, (-1, h.shape[-1])), labels.reshape(-1)
        if isinstance(labels, numpy.ndarray) and (labels != IGNORED).any():  # on a GPU nobody waits for their number
            counted = numpy.flatnonzero(labels != IGNORED)
            h, labels = h[beside(h, counted)], labels[counted]
        h = self.transform(h)
        if type(self.embedding) is Embedding:
            return ops.linear_cross_entropy(h, self.embedding.weight, labels, self.output_bias, IGNORED)
        return ops.cross_entropy(self._logits(h), labels, IGNORED)

    def _logits(self, h: Tensor) -> Tensor:
        if type(self.embedding) is Embedding:
            return ops.linear(h, self.embedding.weight, self.output_bias)
        return self.embedding.logits(h) + self.output_bias
