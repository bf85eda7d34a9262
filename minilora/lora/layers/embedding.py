"""Embedding with a low-rank update, and the output head that is tied to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from ... import nn, ops
from ...errors import StateError
from ...nn.by_row import rows_of
from ...tensor import Tensor
from ..gradients.dora import dora_scale
from ..gradients.embedding import lora_embedding, lora_head
from .adapter import Adapter
from .base import AdaptedLayer
from .precision import in_dtype
from .start import new_adapter

if TYPE_CHECKING:
    from ..merging.arithmetic import Update

__all__ = ["Embedding"]


class Embedding(AdaptedLayer, nn.Embedding):
    """y = W[ids] + s A[:, ids]^T B^T: a table with a low-rank update, without a table-sized array.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        V and d.
    r, lora_alpha
        As in `Linear`.
    padding_idx : int, optional
        An id whose row gets no gradient.
    dtype, rng
        As in `Linear`.
    **options
        use_rslora, use_dora, exact, and init_lora_weights, True or "gaussian", as in `adapt`.

    Attributes
    ----------
    weight : Parameter, shape (V, d), frozen
    lora_A : Parameter, shape (r, V)
        Starts at 0: of an embedding it is A that does, as in loralib and PEFT. Then B's gradient is 0 at first and A moves.
    lora_B : Parameter, shape (d, r)
        From N(0, 1).

    Raises
    ------
    ConfigError
        For a setting outside its range, or an option that needs a layer whose B starts at 0 (lora_bias, "pissa" ...).

    Notes
    -----
    The dropout of a config has no effect here, as in PEFT: ids cannot be dropped.

    Examples
    --------
    >>> import minilora
    >>> layer = minilora.lora.Embedding(10, 4, r=2, rng=0)
    >>> layer([[1, 2, 3]]).shape
    (1, 3, 4)
    """

    adapts = nn.Embedding

    rows_are_outputs = False
    zero = "lora_A"
    bias = None
    makes_logits = False  # whether it is known that `logits` is in use
    OWN = AdaptedLayer.OWN | {"makes_logits"}

    def __init__(self, num_embeddings: int, embedding_dim: int, r: int = 8, lora_alpha: float = 8,
                 padding_idx: int | None = None, *, dtype: Any = "float32",
                 rng: numpy.random.Generator | int | None = None, **options: Any) -> None:
        rng = numpy.random.default_rng(rng)
        self.adopt(nn.Embedding(num_embeddings, embedding_dim, padding_idx, dtype=dtype, rng=rng).requires_grad(False))
        self.begin(new_adapter(self, r, lora_alpha, 0.0, rng=rng, **options))

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, self.num_embeddings), (self.embedding_dim, r)

    def frozen(self, x: Any, bias: bool = True) -> Tensor:
        return ops.embedding(x, self.weight, self.padding_idx)

    def fused(self, x: Any, A: Any, B: Any, s: float, bias: bool = True) -> Tensor:
        return lora_embedding(x, self.weight, A, B, s, self.padding_idx)

    def down(self, x: Any, A: Any) -> Tensor:
        return ops.embedding(x, A.T, self.padding_idx)

    def up(self, z: Any, B: Any) -> Tensor:
        return ops.linear(z, B)

    def dropped(self, x: Any, adapter: Adapter) -> Any:
        return x

    def as_matrices(self, W: Any, A: Any, B: Any) -> tuple[Any, Any, Any, int]:
        return W.T, A, B, 1

    def stored(self, A: Any, B: Any) -> tuple[Any, Any]:
        return B.T, A.T

    def rho(self, adapter: Adapter) -> Tensor:
        if self.padding_idx is None or not adapter.exact:
            return super().rho(adapter)
        # The lengths run over all rows, that of padding too: its column of A counts as a constant, so that it gets no gradient.
        ids = self.weight.device.xp.arange(self.num_embeddings)
        kept = (ids != self.padding_idx).astype(adapter.dtype)
        A, B = adapter.factors()
        A = A * kept + A.data * (1.0 - kept)
        return dora_scale(in_dtype(self.weight, adapter.dtype).T, A, B, adapter.magnitude, adapter.scaling, exact=True)

    def logits(self, h: Any) -> Tensor:
        """The tied output head: h (..., d) times the adapted table, h W^T + s (h B) A."""
        if self.merged:
            self.refuse_merged_use()
            return super().logits(h)
        self.makes_logits = True
        rows, active = rows_of(self), self.active
        apart = [name for name, adapter in self.adapters.items() if not adapter.in_head]
        if rows is None and len(active) == 1 and not apart:
            (name, weight), = active.items()
            adapter = self.adapters[name]
            if adapter.magnitude is None and adapter.dtype == self.weight.dtype:
                return lora_head(h, self.weight, *adapter.factors(), adapter.scaling * weight)
        return self.with_updates(super().logits(h), h, self._head_update, rows, apart)

    def stored_update(self) -> Update:
        apart = [name for name in self.active if not self.adapters[name].in_head]
        if apart and self.makes_logits:
            raise StateError(f"merge: adapter {apart[0]!r} does not take part in the logits, which are made from the same "
                             "table; merged it would. Leave it beside the table, or give the model a head of its own")
        return super().stored_update()

    def _head_update(self, h: Any, adapter: Adapter, factor: float) -> Tensor:
        A, B = adapter.factors()
        wide = in_dtype(h, adapter.dtype)
        if adapter.magnitude is None:
            return ops.linear(ops.linear(wide, B.T) * (factor * adapter.scaling), A.T)
        # The table is (W + s B A) with its columns stretched by rho; stretching h instead gives the same logits.
        stretched = lora_head(wide * self.rho(adapter), in_dtype(self.weight, adapter.dtype), A, B, adapter.scaling)
        return (stretched - in_dtype(super().logits(h), adapter.dtype)) * factor
