"""TokenTable: the table of an embedding some of whose rows an adapter replaces (`trainable_token_indices`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from ... import backend, nn, ops
from ...errors import DTypeError, StateError
from ...stored import Stored
from ...tensor import Parameter, Tensor
from ..gradients.tokens import check_indices, token_embedding, token_head
from ..merging.holding import make_read_only
from .precision import in_dtype, trained_dtype

__all__ = ["TokenTable"]

Array = Any


class _Held:
    """A Parameter of another module, seen from one that does not own it: no state dict and no optimizer finds it here."""

    __slots__ = ("parameter",)

    def __init__(self, parameter: Parameter) -> None:
        self.parameter = parameter


class TokenTable(nn.Module):
    """What a `SavedModule` has for an adapter in the place of an embedding: the same table, k rows of which are its own.

    Parameters
    ----------
    base : nn.Embedding
        Its weight is shared, not copied; neither trained nor changed, unless this is merged.
    indices : sequence of int
        The rows that are replaced.
    rows : Parameter, shape (k, d), optional
        What they are replaced by; at first what they are.

    Attributes
    ----------
    rows : Parameter, shape (k, d)
        Beside a table in half precision float32, rounded when they are used.
    indices : tuple of int
    merged : bool

    Raises
    ------
    DTypeError
        If `base` is no embedding.
    ConfigError
        If an index is no row of it or comes twice.

    Examples
    --------
    >>> import minilora
    >>> table = TokenTable(minilora.nn.Embedding(10, 4, rng=0), [7, 2])
    >>> table([[1, 2, 7]]).shape, [name for name, p in table.named_parameters()]
    ((1, 3, 4), ['rows'])
    """

    def __init__(self, base: nn.Module, indices: Sequence[int], rows: Parameter | None = None) -> None:
        if not isinstance(base, nn.Embedding):
            raise DTypeError(f"trainable_token_indices: rows are replaced in an nn.Embedding, got {type(base).__name__}")
        self.num_embeddings, self.embedding_dim, self.padding_idx = base.num_embeddings, base.embedding_dim, base.padding_idx
        self.indices = check_indices(indices, base.num_embeddings)
        self.held, self.training = _Held(base.weight), base.training
        self.replaced: Array | None = None  # while merged: the rows of the table as they were
        if rows is None:
            rows = Parameter(base.weight.data[self._at()].astype(trained_dtype(base.weight.dtype)))
        self.rows = rows

    def _at(self) -> Array:
        """The indices where the table lies."""
        return backend.to_device(numpy.array(self.indices, "int64"), self.weight.device)

    @property
    def weight(self) -> Parameter:
        """The table (V, d) that is shared: without this adapter's rows, unless they are merged."""
        return self.held.parameter

    @property
    def merged(self) -> bool:
        """Whether the rows stand in the table at present."""
        return self.replaced is not None

    def forward(self, ids: Any) -> Tensor:
        if self.merged:
            return ops.embedding(ids, self.weight, self.padding_idx)  # the same op as the base's
        return token_embedding(ids, self.weight, in_dtype(self.rows, self.weight.dtype), self.indices, self.padding_idx)

    def logits(self, h: Any) -> Tensor:
        """The output head tied to this table: h (..., d) to the products with all rows, the replaced ones too."""
        if self.merged:
            return ops.linear(h, self.weight)
        return token_head(h, self.weight, in_dtype(self.rows, self.weight.dtype), self.indices)

    def swapped(self) -> Array:
        """A copy of the table with the rows in their places."""
        return self._table_with(self.rows.data)

    def _table_with(self, rows: Array) -> Array:
        table = self.weight.data
        if isinstance(table, Stored):
            return table.replaced(self._at(), rows)
        table = table.copy()
        table[self._at()] = rows.astype(table.dtype)
        return table

    def merge(self) -> None:
        """Put the rows into the table, which takes a second array; `unmerge` puts the original bits back."""
        if self.merged:
            raise StateError("merge: these rows are merged already. Call unmerge() first")
        table, replaced = self.swapped(), self.weight.data[self._at()]
        make_read_only(table)
        self.weight.data, self.replaced = table, replaced

    def unmerge(self) -> None:
        """Put the rows of before back into the table."""
        if self.replaced is None:
            raise StateError("unmerge: these rows are not merged. Call merge() first")
        self.weight.data, self.replaced = self._table_with(self.replaced), None

    def as_base(self) -> nn.Module:
        """A plain embedding that computes the same."""
        plain = nn.Embedding.__new__(nn.Embedding)
        plain.num_embeddings, plain.embedding_dim, plain.padding_idx = self.num_embeddings, self.embedding_dim, self.padding_idx
        plain.training = self.training
        plain.weight = self.weight if self.merged else Parameter(self.swapped(), trainable=False)
        return plain

    def holds_merged(self) -> bool:
        return self.merged

    def check_movable(self) -> None:
        if self.merged:
            raise StateError("the rows of this adapter are merged: the table holds them. Call lora.unmerge(model) first")

    def dtype_for(self, dtype: Any) -> Any:
        return trained_dtype(dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {len(self.indices)} rows replaced" + (", merged" * self.merged)
