"""Which row of a batch gets which of the named parts of a module: said by contexts, which belong to the thread and task.

Open contexts are a tuple in one `ContextVar`, which is never changed but exchanged. So two threads, or two asyncio tasks, run
one model with different mixes at the same time; what is started inside with a copy of the context (an asyncio task,
``contextvars.copy_context().run``) goes on with the contexts that it was started in; and a module, hence also its copy or its
pickle, knows nothing of all that. A generator has no context of its own: what it opened, its caller is in as long as it is
suspended inside, as with `no_grad`. Where no context is open, asking costs one look-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import numpy

from ..tensor import Parameter
from .module import Module

__all__ = ["ByRow", "Nobody", "Rows", "opened", "rows_of"]


class Rows(Protocol):
    """Who gets what: `names` one for each row, and `places` the rows of each name. No names: no row gets anything.

    `added` and `chosen` compute with it: an update of each row added, and each row taken from one of several outputs.
    """

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def places(self) -> Mapping[str, numpy.ndarray]: ...

    def added(self, y: Any, x: Any, updates: Mapping[str, Callable[[Any], Any]]) -> Any: ...

    def chosen(self, y: Any, others: Mapping[str, Any]) -> Any: ...


class Nobody:
    """In the place of other `Rows`: no row gets anything, however many there are."""

    names: tuple[str, ...] = ()
    places: Mapping[str, numpy.ndarray] = {}

    def added(self, y: Any, x: Any, updates: Mapping[str, Callable[[Any], Any]]) -> Any:
        return y

    def chosen(self, y: Any, others: Mapping[str, Any]) -> Any:
        return y


class ByRow(Module):
    """A module with named parts of which a context may give each row of a batch its own: whoever opens one asks for `names`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of its parts."""
        return ()

    def trained_apart(self) -> Iterable[Parameter]:
        """What it trains beside the base, and whoever freezes the rest of the model leaves as it is."""
        return ()


class _Open:
    """One open context: the modules it concerns, those of the model when it was opened; and who gets which part."""

    __slots__ = ("over", "places", "rows")

    def __init__(self, places: Iterable[Module], rows: Rows) -> None:
        self.places, self.rows, self.over = frozenset(places), rows, False


_open: ContextVar[tuple[_Open, ...]] = ContextVar("minilora.rows", default=())


def rows_of(place: Module) -> Rows | None:
    """Who gets which part of this module, here and now: by the innermost context that concerns it; None without one."""
    contexts = _open.get()
    if contexts:
        for context in reversed(contexts):
            if place in context.places and not context.over:
                return context.rows
    return None


@contextmanager
def opened(places: Iterable[Module], rows: Rows) -> Iterator[None]:
    """Within this context `rows` holds for these modules."""
    context = _Open(places, rows)
    try:
        _open.set((*_open.get(), context))
        yield
    finally:
        try:
            _close(context)
        except BaseException:  # interrupted: a context that nobody can leave any more would be the worse end
            _close(context)
            raise


def _close(context: _Open) -> None:
    """Take this context out of those that are open, wherever among them it stands: generators may end in any order."""
    contexts = _open.get()
    if context in contexts:
        _open.set(tuple(other for other in contexts if other is not context))
    else:
        context.over = True  # a generator that ends in another thread than it began in, where nothing can be taken out
