"""What a layer answers when it is to be merged. Which adapters it has, and what they are, is its own affair."""

from __future__ import annotations

from typing import Any, Protocol

from ...tensor import Parameter
from .arithmetic import Update
from .way_back import WayBack

__all__ = ["Mergeable"]

Array = Any


class Mergeable(Protocol):
    """A layer with a weight that can take up an update.

    Attributes
    ----------
    weight : Parameter
    bias : Parameter or None
    way_back : WayBack or None
        While merged, what `transaction.unmerge_layers` needs.
    has_update : bool
        Whether there is anything to merge.
    running : bool
        Whether a context is open whose end would not know of a merge inside.
    """

    weight: Parameter
    bias: Parameter | None
    way_back: WayBack | None

    @property
    def has_update(self) -> bool: ...

    @property
    def running(self) -> bool: ...

    def matrix(self, weight: Array) -> Array:
        """The stored weight as a matrix: a view."""

    def stored_update(self) -> Update:
        """The update of `matrix(weight)`, on the host; `StateError` if there is none or it is not finite."""

    def changes_bias(self) -> bool:
        """Whether the update has a part that goes into the bias."""

    def updated_bias(self) -> Array | None:
        """The bias with that part, on its device; None without one. `StateError` if there is no bias to take it up."""
