"""Which of the contexts `mixed` and `disabled` are open, and for which layers: a matter of the thread and task, not of a layer.

Open contexts are a tuple in one `ContextVar`, which is never changed but exchanged. So two threads, or two asyncio tasks, run
one model with different mixes at the same time; what is started inside with a copy of the context (an asyncio task,
``contextvars.copy_context().run``) goes on with the contexts that it was started in; and a layer, hence also its copy or its
pickle, knows nothing of all that. A generator has no context of its own: what it opened, its caller is in as long as it is
suspended inside, as with `no_grad`. Where no context is open, asking costs one look-up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from ... import nn

if TYPE_CHECKING:
    from .rows import Nobody, Rows

__all__ = ["opened", "rows_of"]


class _Open:
    """One open context: the layers it concerns, those of the model when it was opened; and who gets which adapter."""

    __slots__ = ("over", "places", "rows")

    def __init__(self, places: Iterable[nn.Module], rows: Rows | Nobody) -> None:
        self.places, self.rows, self.over = frozenset(places), rows, False


_open: ContextVar[tuple[_Open, ...]] = ContextVar("minilora.lora.open", default=())


def rows_of(place: nn.Module) -> Rows | Nobody | None:
    """Who gets which adapter of this layer, here and now: by the innermost context that concerns it; None without one."""
    contexts = _open.get()
    if contexts:
        for context in reversed(contexts):
            if place in context.places and not context.over:
                return context.rows
    return None


@contextmanager
def opened(places: Iterable[nn.Module], rows: Rows | Nobody) -> Iterator[None]:
    """Within this context `rows` holds for these layers."""
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
