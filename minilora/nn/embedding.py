"""The embedding layer: a table whose rows are looked up."""

from __future__ import annotations

from typing import Any

import numpy

from .. import ops
from ..ops.embedding import check_padding
from ..tensor import Tensor
from .initial import first
from .linear import check_size
from .module import Module

__all__ = ["Embedding"]


class Embedding(Module):
    """Rows of a table, chosen by token ids.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Rows V and columns D of the table.
    padding_idx : int, optional
        An id whose row starts as zeros and gets no gradient.
    dtype : dtype
    rng : numpy.random.Generator or int, optional
        Draws the table, on the host, so that one seed gives one model on every device. The same int in two layers gives them
        equal numbers: in a model, pass one Generator to all.

    Attributes
    ----------
    weight : Parameter, shape (num_embeddings, embedding_dim)
        Drawn from the standard normal distribution, as PyTorch does.

    Raises
    ------
    ConfigError
        If a size is not an int >= 1, or padding_idx is not in [0, num_embeddings).

    Examples
    --------
    >>> import numpy, minilora
    >>> layer = minilora.nn.Embedding(10, 4, rng=numpy.random.default_rng(0))
    >>> layer([[1, 2, 3], [7, 8, 9]]).shape
    (2, 3, 4)
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, *, dtype: Any = "float32",
                 rng: numpy.random.Generator | int | None = None) -> None:
        check_size("num_embeddings", num_embeddings)
        check_size("embedding_dim", embedding_dim)
        check_padding(padding_idx, int(num_embeddings))
        self.num_embeddings, self.embedding_dim = int(num_embeddings), int(embedding_dim)
        self.padding_idx = None if padding_idx is None else int(padding_idx)
        shape = self.num_embeddings, self.embedding_dim

        def draw() -> numpy.ndarray:
            table = numpy.random.default_rng(rng).standard_normal(shape)
            if padding_idx is not None:
                table[padding_idx] = 0.0
            return table

        self.weight = first(shape, dtype, draw)

    def forward(self, ids: Any) -> Tensor:
        """Token ids (...), best given on the host, to vectors (..., D); see `ops.embedding`."""
        return ops.embedding(ids, self.weight, self.padding_idx)

    def logits(self, h: Any) -> Tensor:
        """The output head tied to this table: h (..., D) to h W^T (..., V)."""
        return ops.linear(h, self.weight)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"
