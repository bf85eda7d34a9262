"""Form: what a kind of layer defines: how it multiplies by A and B, and how its weight and its update look as matrices.

D = s B A is seen from two sides:

                     as_update: D by output      stored: D as the weight lies (`matrix`)
    Linear           (out, in)   A, B            (out, in)   A, B
    fan_in_fan_out   (out, in)   A, B            (in, out)   B^T, A^T
    Embedding        (d, V)      A, B            (V, d)      B^T, A^T
    convolutions     (out, n)    A, block B      (out, n)    A, block B     n = in / groups x kernel; a block for each group
    MergedLinear     (out, in)   A, block B      (out, in)   A, block B     a block for each enabled slot
    Projected        (out, in)   A W, B          (out, in)   A W, B
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...tensor import Tensor
from .mergeable import MergeableLayer, missing

if TYPE_CHECKING:
    from .adapter import Adapter

__all__ = ["Form"]

Array = Any


class Form(MergeableLayer):
    """The part of `base.AdaptedLayer` in which the kinds of layers differ. A kind defines what raises here."""

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of lora_A and lora_B."""
        raise missing(self, "factor_shapes")

    def frozen(self, x: Any, bias: bool = True) -> Tensor:
        """The base layer's output."""
        raise missing(self, "frozen")

    def fused(self, x: Any, A: Any, B: Any, s: float, bias: bool = True) -> Tensor:
        """frozen(x, bias) + s up(down(x, A), B), in one operation."""
        raise missing(self, "fused")

    def down(self, x: Any, A: Any) -> Tensor:
        """A applied to the input."""
        raise missing(self, "down")

    def up(self, z: Any, B: Any) -> Tensor:
        """B applied to what `down` gave."""
        raise missing(self, "up")

    def low_rank(self, x: Any, A: Any, B: Any, s: float) -> Tensor:
        """s up(down(x, A), B)."""
        return self.up(self.down(x, A) * s, B)

    def by_output(self, vector: Any) -> Any:
        """A vector (out,) in the shape in which it goes with the output."""
        return vector

    def as_matrices(self, W: Any, A: Any, B: Any) -> tuple[Any, Any, Any, int]:
        """(W, A, B, groups) as matrices (out, n), (r, n), (out, r / groups), from tensors or from arrays; all are views."""
        return W, A, B, 1

    def stored(self, A: Array, B: Array) -> tuple[Array, Array]:
        """The factors of D as the weight is stored: `matrix(weight)` + s B A. From host arrays."""
        return A, B

    def matrix(self, weight: Array) -> Array:
        """The stored weight as a matrix: a view."""
        return weight

    def bias_update(self, adapter: Adapter) -> Array | None:
        """What merging this adapter adds to the bias, over the scaling; None for nothing."""
        return None if adapter.lora_bias is None else adapter.lora_bias.data

    def as_update(self, A: Array, B: Array) -> tuple[Array, Array]:
        """A (r, n) and B (out, r) of D as a matrix (out, n)."""
        return A, B

    def from_update(self, A: Array, B: Array) -> tuple[Array, Array]:
        """lora_A and lora_B for factors of D as a matrix: the inverse of `as_update`."""
        return A, B

    def rank_for(self, r: int) -> int:
        """The rank of an adapter whose D has factors of rank r."""
        return r

    rows_are_outputs = True  # of matrix(weight)
    zero = "lora_B"  # which of the two starts at 0
    takes_more = True  # adapters than one
    begins_quantised = False  # whether a start may choose the base too (`loftq`)
    only_factors = False  # whether its adapters consist of A and B alone
