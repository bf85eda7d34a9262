"""What stands in front of the tokens of a model: vectors before the first token, or keys and values before those of each layer.

A model that allows it is `Fronted`: at every call it asks the module in its attribute `front`, if there is one, and puts what
it gets, a `Front`, in its places. It knows nothing of where that comes from, and who makes it only the model's sizes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..tensor import Tensor
from .module import Module

__all__ = ["Front", "FrontSizes", "Fronted", "Prefix", "NOTHING", "NO_PREFIX"]

Array = Any
Prefix = tuple[tuple[Tensor, ...], Any, int]  # for one layer: prefixes, runs and gap, as `ops.prefix_attention` takes them

NO_PREFIX: Prefix = ((), None, 0)


class Front(NamedTuple):
    """What stands in front of the tokens of one call.

    Attributes
    ----------
    offset : int, or array (B, 1) of int on the host
        The position of each text's first token: how many vectors, or keys, stand before it.
    prefixes : tuple of Tensor, shape (2 layers, KV, N, hd) each
        Keys, at the indices 2 l, and values, at 2 l + 1, of layer l.
    runs : sequence of (slice, int), or None
        Which texts have which of them.
    prompt : Tensor, shape (n, d), or None
        Vectors that go in as embedded tokens do.
    index : array (n,) or (B, n) of int on the host, or None
        Which of them stand before the tokens of each text.
    seen : array (B, n) of bool on the host, or None
        False where a text has fewer of them; None if all have as many.
    """

    offset: Any = 0
    prefixes: tuple[Tensor, ...] = ()
    runs: Any = None
    prompt: Tensor | None = None
    index: Array = None
    seen: Array = None


NOTHING = Front()


class FrontSizes(NamedTuple):
    """Of a model: its layers, the key and value heads of each and the numbers of a head, and d, the numbers of a token."""

    layers: int
    heads: int
    head_dim: int
    width: int


class Fronted(Module):
    """A model in front of whose tokens something may stand.

    Attributes
    ----------
    front : Module or None
        ``front(lead, first)`` gives a `Front` for texts of the leading axes `lead`; `first` is False where a cache holds what
        went before. ``front.longest()`` is how many positions it takes.
    """

    front: Any = None

    @property
    def front_sizes(self) -> FrontSizes:
        """What must fit."""
        raise TypeError(f"{type(self).__name__} has no front_sizes: define the property in the subclass")

    @property
    def taken(self) -> int:
        """Positions that are not the tokens' now."""
        return 0 if self.front is None else int(self.front.longest())
