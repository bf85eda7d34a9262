"""Classes of texts and of tokens, from the hidden states of any body."""

from __future__ import annotations

from typing import Any

import numpy

from ... import backend, ops
from ...nn.layers import Dropout
from ...nn.linear import Linear
from ...nn.module import Module
from ...ops.indices import beside, integers
from ...tensor import Tensor
from ..checks import one_padding
from ..group import initialise
from ..model import Model
from .labels import IGNORED, Labels, loss_of_classes

__all__ = ["Headed", "LastTokenClassifier", "TextClassifier", "TokenClassifier"]


class Headed(Model):
    """A body under the name that transformers gives it. What stands on it, a subclass adds.

    Attributes
    ----------
    config : dataclass
        Of the body.
    body_name : str
        The attribute that holds the body; set in the class.
    """

    config: Any
    body_name: str

    def __init__(self, body: Module) -> None:
        self.config = body.config  # type: ignore[attr-defined]
        setattr(self, self.body_name, body)

    @property
    def body(self) -> Any:
        """What the head stands on."""
        return getattr(self, self.body_name)

    def hidden(self, ids: Any, key_padding: Any = None, **more: Any) -> Tensor:
        """Ids (..., T) to the hidden states (..., T, d) of the body."""
        return self.body(ids, key_padding=key_padding, **more)  # type: ignore[no-any-return]


class TextClassifier(Headed):
    """Classes of a text. A subclass defines `classes`.

    Attributes
    ----------
    labels : Labels
    """

    labels: Labels

    def classes(self, h: Tensor, ids: Any, key_padding: Any) -> Tensor:
        """Hidden states (..., T, d) to logits (..., n)."""
        raise TypeError(f"{type(self).__name__} has no classes: define classes(self, h, ids, key_padding) in the subclass")

    def example(self, rows: int, length: int) -> dict[str, Any]:
        """As `Model.example`, with the first class for every text; numbers where the loss takes numbers."""
        problem, n = self.labels.problem_type, self.labels.count
        chosen = problem == "single_label_classification" or problem is None and n > 1
        labels = numpy.zeros(rows, "int64") if chosen else numpy.zeros((rows, n), next(self.parameters()).dtype)
        return {**super().example(rows, length), "labels": labels}

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
        logits = self.classes(self.hidden(ids, key_padding, **more), ids, key_padding)
        return logits if labels is None else loss_of_classes(logits, labels, self.labels)


def _add_head(model: Any, name: str, labels: Labels, width: int, bias: bool, dropout: float, dtype: Any, rng: Any) -> None:
    """Dropout and a linear layer to the classes, under the name that transformers gives it."""
    model.labels = labels
    model.drop = Dropout(dropout, rng=rng)
    head = Linear(width, labels.count, bias, dtype=dtype, rng=rng)
    initialise(head, model.config.initializer_range, rng)
    setattr(model, name, head)


class LastTokenClassifier(TextClassifier):
    """Classes of a text by a decoder, from the hidden state of its last token: the only one that has seen all of it.

    Parameters
    ----------
    body : Module
        From ids to hidden states. Its `config` has `pad_token_id` and `initializer_range`.
    width : int
        Of the hidden states, d.
    labels : Labels
    dtype, rng
        Of the head.

    Attributes
    ----------
    score : Linear
        (d, n), without a bias.

    Notes
    -----
    The last token is the last one that is not `pad_token_id` of the config, as in transformers. Where the config has none, it
    is the last that the padding mask keeps; without a mask, the last of the row.
    """

    body_name = "model"
    score: Linear

    def __init__(self, body: Module, width: int, labels: Labels, *, dtype: Any = "float32",
                 rng: numpy.random.Generator | int | None = None) -> None:
        super().__init__(body)
        _add_head(self, "score", labels, width, False, 0.0, dtype, numpy.random.default_rng(rng))

    def classes(self, h: Tensor, ids: Any, key_padding: Any) -> Tensor:
        return self.score(last_rows(h, ids, self.config.pad_token_id, key_padding))  # type: ignore[no-any-return]


class TokenClassifier(Headed):
    """Classes of every token.

    Parameters
    ----------
    body, width, labels, dtype, rng
        As of `LastTokenClassifier`.
    dropout : float
        In training, of the hidden states.

    Attributes
    ----------
    head_name : str
        The attribute that holds the head, Linear (d, n); set in the class.
    """

    body_name = "model"
    head_name = "score"
    labels: Labels
    drop: Dropout

    def __init__(self, body: Module, width: int, labels: Labels, *, dropout: float = 0.0, dtype: Any = "float32",
                 rng: numpy.random.Generator | int | None = None) -> None:
        super().__init__(body)
        _add_head(self, self.head_name, labels, width, True, dropout, dtype, numpy.random.default_rng(rng))

    def example(self, rows: int, length: int) -> dict[str, Any]:
        """As `Model.example`, with the first class for every token."""
        return {**super().example(rows, length), "labels": numpy.zeros((rows, length), "int64")}

    def forward(self, ids: Any, labels: Any = None, key_padding: Any = None, *, attention_mask: Any = None,
                **more: Any) -> Tensor:
        """Logits (..., T, n); with labels (..., T), ints, -100 where a token is not to count, the loss: its mean.

        The other parameters are those of `TextClassifier.forward`.
        """
        h = self.hidden(ids, one_padding(key_padding, attention_mask), **more)
        logits = getattr(self, self.head_name)(self.drop(h))
        if labels is None:
            return logits  # type: ignore[no-any-return]
        return ops.cross_entropy(logits, integers("label", labels, self.labels.count, IGNORED), IGNORED)


def last_rows(h: Tensor, ids: Any, pad_token_id: int | None, key_padding: Any) -> Tensor:
    """The rows (..., d) of h (..., T, d) that belong to the last token of each text; see `LastTokenClassifier`."""
    if pad_token_id is None and key_padding is None:
        return h[..., -1, :]
    if pad_token_id is None:
        kept = (numpy.asarray(key_padding) if isinstance(key_padding, (list, tuple)) else key_padding) != 0
    else:
        kept = integers("token id", ids, 1 << 62) != pad_token_id
    T, d = h.shape[-2:]
    xp = backend.device_of(kept).xp  # where the ids are, on which numbers are counted up there
    last = (kept * xp.arange(T)).argmax(axis=-1).reshape(-1)
    rows = xp.arange(last.size) * T + last
    return ops.reshape(ops.reshape(h, (-1, d))[beside(h, rows)], (*h.shape[:-2], d))
