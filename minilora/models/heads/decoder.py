"""Classifiers on a decoder: of a text, by its last token, and of every token."""

from __future__ import annotations

from typing import Any

import numpy

from ... import ops
from ...nn.layers import Dropout
from ...nn.linear import Linear
from ...nn.module import Module
from ...ops.indices import beside, integers
from ...tensor import Tensor
from ..checks import one_padding
from ..group import initialise
from .labels import IGNORED, Labels, loss_of_classes

__all__ = ["LastTokenClassifier", "TokenClassifier"]


class _Classifier(Module):
    """A body under the name that transformers gives it, and a linear layer from its hidden states to classes.

    Attributes
    ----------
    config : dataclass
        Of the body.
    labels : Labels
    body_name, head_name : str
        The attributes that hold the two; set in the class.
    """

    config: Any
    body_name: str
    head_name: str

    def __init__(self, body: Module, width: int, labels: Labels, *, bias: bool, dropout: float = 0.0, dtype: Any = "float32",
                 rng: numpy.random.Generator | int | None = None) -> None:
        rng = numpy.random.default_rng(rng)
        self.config, self.labels = getattr(body, "config"), labels
        setattr(self, self.body_name, body)
        head = Linear(width, labels.count, bias, dtype=dtype, rng=rng)
        initialise(head, self.config.initializer_range, rng)
        self.drop = Dropout(dropout, rng=rng)
        setattr(self, self.head_name, head)

    def hidden(self, ids: Any, key_padding: Any = None, **more: Any) -> Tensor:
        """Ids (..., T) to the hidden states (..., T, d) of the body."""
        return getattr(self, self.body_name)(ids, key_padding=key_padding, **more)  # type: ignore[no-any-return]

    def _classes(self, h: Tensor) -> Tensor:
        return getattr(self, self.head_name)(self.drop(h))  # type: ignore[no-any-return]


class LastTokenClassifier(_Classifier):
    """Classes of a text, from the hidden state of its last token: the only one that has seen all of it.

    Notes
    -----
    The last token is the last one that is not `pad_token_id` of the config, as in transformers. Where the config has none, it
    is the last that the padding mask keeps; without a mask, the last of the row.
    """

    body_name = "model"
    head_name = "score"

    def forward(self, ids: Any, labels: Any = None, key_padding: Any = None, *, attention_mask: Any = None,
                **more: Any) -> Tensor:
        """Logits; with labels, the loss.

        Parameters
        ----------
        ids : array, Tensor, or nested lists of int, shape (..., T)
        labels : array, Tensor, or nested lists, optional
            See `loss_of_classes`.
        key_padding : array or nested lists of bool, or of 0 and 1, shape (..., T), optional
            True or 1 for tokens, False or 0 for padding, which no token then sees.
        attention_mask : the same, optional
            Another name of key_padding: that of transformers.
        **more
            What else the body takes.

        Returns
        -------
        Tensor, shape (..., n), or () if labels are given
        """
        key_padding = one_padding(key_padding, attention_mask)
        h = self.hidden(ids, key_padding, **more)
        logits = self._classes(last_rows(h, ids, self.config.pad_token_id, key_padding))
        return logits if labels is None else loss_of_classes(logits, labels, self.labels)


class TokenClassifier(_Classifier):
    """Classes of every token."""

    body_name = "model"
    head_name = "score"

    def forward(self, ids: Any, labels: Any = None, key_padding: Any = None, *, attention_mask: Any = None,
                **more: Any) -> Tensor:
        """Logits (..., T, n); with labels (..., T), ints, -100 where a token is not to count, the loss: its mean.

        The other parameters are those of `LastTokenClassifier`.
        """
        logits = self._classes(self.hidden(ids, one_padding(key_padding, attention_mask), **more))
        return logits if labels is None else ops.cross_entropy(
            logits, integers("label", labels, self.labels.count, IGNORED), IGNORED)


def last_rows(h: Tensor, ids: Any, pad_token_id: int | None, key_padding: Any) -> Tensor:
    """The rows (..., d) of h (..., T, d) that belong to the last token of each text; see `LastTokenClassifier`."""
    if pad_token_id is None and key_padding is None:
        return h[..., -1, :]
    if pad_token_id is None:
        kept = _array(key_padding) != 0
    else:
        kept = integers("token id", ids, 2 ** 62) != pad_token_id
    T, d = h.shape[-2:]
    last = (kept * beside(kept, numpy.arange(T))).argmax(axis=-1).reshape(-1)
    rows = beside(last, numpy.arange(last.size) * T) + last
    return ops.reshape(ops.reshape(h, (-1, d))[beside(h, rows)], (*h.shape[:-2], d))


def _array(values: Any) -> Any:
    values = values.data if isinstance(values, Tensor) else values
    return numpy.asarray(values) if isinstance(values, (list, tuple)) else values
