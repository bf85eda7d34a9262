"""What models that predict the next token share: logits, and a loss that does not hold them."""

from __future__ import annotations

from typing import Any

from .. import ops
from ..errors import ShapeError
from ..nn.embedding import Embedding
from ..nn.linear import Linear
from ..nn.module import Module
from ..ops.indices import integers
from ..tensor import Tensor
from .checks import one_padding
from .model import Model

__all__ = ["CausalLM"]

IGNORED = -100  # a label that counts nothing


class CausalLM(Model):
    """A model that predicts the next token. A subclass defines `hidden` and `embedding`.

    Attributes
    ----------
    lm_head : Module or None
        Makes logits from hidden states. None where the logits are products with the embedding's own table (tied weights).
    """

    lm_head: Module | None = None

    def hidden(self, ids: Any, key_padding: Any = None) -> Tensor:
        """Ids (..., T) to the hidden states (..., T, d) that the logits are made from."""
        raise TypeError(f"{type(self).__name__} has no hidden: define hidden(self, ids, key_padding) in the subclass")

    @property
    def embedding(self) -> Embedding:
        """The embedding of the tokens."""
        raise TypeError(f"{type(self).__name__} has no embedding: define the property embedding in the subclass")

    @property
    def positions(self) -> int | None:
        """How many positions the model has; None where that is open."""
        return None

    def logits(self, h: Any) -> Tensor:
        """Hidden states (..., d) to logits (..., V)."""
        return self.embedding.logits(h) if self.lm_head is None else self.lm_head(h)

    def forward(self, ids: Any, labels: Any = None, key_padding: Any = None, *, attention_mask: Any = None,
                **more: Any) -> Tensor:
        """Logits; with labels, the loss.

        Parameters
        ----------
        ids : array, Tensor, or nested lists of int, shape (..., T)
            Best given on the host: see `ops.embedding`.
        labels : the same, optional
            See `loss`.
        key_padding : array or nested lists of bool, or of 0 and 1, shape (..., T), optional
            True or 1 for tokens, False or 0 for padding, which no token then sees.
        attention_mask : the same, optional
            Another name of key_padding: that of transformers.
        **more
            What else the model's `hidden` takes.

        Returns
        -------
        Tensor, shape (..., T, V), or () if labels are given

        Raises
        ------
        OutOfRangeError
            If an id or a label is not in [0, V).
        ShapeError
            If the shapes do not fit, there are too many tokens, or no label counts.
        ConfigError
            If both key_padding and attention_mask are given.
        """
        h = self.hidden(ids, key_padding=one_padding(key_padding, attention_mask), **more)
        if labels is not None:
            return self._loss(h, labels)
        return self.logits(h)

    def loss(self, ids: Any, labels: Any, key_padding: Any = None, **more: Any) -> Tensor:
        """Mean of -log p(next token), each predicted from the tokens before it.

        Parameters
        ----------
        ids, key_padding, **more
            As in `forward`.
        labels : array, Tensor, or nested lists of int, shape (..., T)
            As in transformers: **the ids themselves**, with -100 where a token (padding, a prompt) is not to count. They are
            shifted here: the output at t is compared with the label at t + 1, and the first label is not used.

        Returns
        -------
        Tensor, shape ()

        Notes
        -----
        Logits are made for some rows at a time and not kept (`ops.linear_cross_entropy`), unless the output head is something
        else than a plain layer, such as one with an adapter. To measure without training, call it within `no_grad`.
        """
        return self(ids, labels, key_padding, **more)  # type: ignore[no-any-return]  # as a call: errors then know their place

    def _loss(self, h: Tensor, labels: Any) -> Tensor:
        labels = integers("label", labels, self.embedding.num_embeddings, IGNORED)
        if labels.shape != h.shape[:-1]:
            raise ShapeError(f"expected labels of the shape of the ids, {h.shape[:-1]}, got {labels.shape}: give the ids "
                             "themselves; they are shifted here")
        if labels.shape[-1] < 2:
            raise ShapeError("a single token has no next one to predict: give two tokens or more")
        h, labels = h[..., :-1, :], labels[..., 1:]
        if self.lm_head is None and type(self.embedding) is Embedding:
            return ops.linear_cross_entropy(h, self.embedding.weight, labels, ignore_index=IGNORED)
        if type(self.lm_head) is Linear:
            return ops.linear_cross_entropy(h, self.lm_head.weight, labels, self.lm_head.bias, IGNORED)
        return ops.cross_entropy(self.logits(h), labels, IGNORED)

    def example(self, rows: int, length: int) -> dict[str, Any]:
        """As `Model.example`, with the ids as labels."""
        given = super().example(rows, length)
        return {**given, "labels": given["ids"]}
