"""Types for annotations: what goes into operations, tensors and parameters. Editors and mypy read them; nothing runs here.

Examples
--------
>>> import minilora
>>> from minilora.typing import TensorLike
>>> def half(x: TensorLike) -> minilora.Tensor:
...     return minilora.ops.mul(x, 0.5)
>>> half(minilora.tensor([1.0, 3.0]))
Tensor([0.5 1.5], dtype=float32)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Union

__all__ = ["Array", "Integers", "Numbers", "Operand", "PerAxis", "TensorLike"]


class Array(Protocol):
    """A raw array of any device. CuPy has no types to import, so an array is what has these three; text has none of them."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    @property
    def ndim(self) -> int: ...


TensorLike = Array
"""An input of an operation: a tensor, which has these three too, or a raw array, which is a constant."""

Operand = Union[TensorLike, float]
"""An input of an operator: also a number, Python's or NumPy's, which takes the dtype of the other side."""

Integers = Union[TensorLike, int, Sequence[int], Sequence[Sequence[int]], Sequence[Sequence[Sequence[int]]]]
"""Labels, token ids or a mask: also as nested lists."""

PerAxis = Union[int, Sequence[int]]
"""A setting of a window: one int for all axes, or one for each."""

_Row = Sequence[Operand]
Numbers = Union[Operand, _Row, Sequence[_Row], Sequence[Sequence[_Row]], Sequence[Sequence[Sequence[_Row]]]]
"""What makes an array: a number, an array or a tensor, or lists of them, up to four deep."""
