"""A graph as it is seen by what only looks at it: so that complaints and ledgers need no engine. Nothing runs here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

__all__ = ["Node", "Value"]

Array = Any


class Node(Protocol):
    """One operation: what `engine.Op` has, with the meaning that it has there."""

    @property
    def xp(self) -> Any: ...

    @property
    def saved(self) -> tuple[Any, ...]: ...

    @property
    def sources(self) -> Sequence[Any] | None: ...

    @property
    def leaves(self) -> Sequence[tuple[Any, Array, int]]: ...

    @property
    def reference(self) -> type | None: ...

    @property
    def kernel(self) -> str: ...

    @property
    def order(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Value(Protocol):
    """What an operation made, or a parameter: `Tensor`, with the meaning that it has there."""

    @property
    def node(self) -> Any: ...
