"""Options as whoever reads of them would type them: as arguments in Python, as flags on the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

__all__ = ["on_command_line", "option"]

_flags: ContextVar[bool] = ContextVar("minilora.flags", default=False)


@contextlib.contextmanager
def on_command_line() -> Iterator[None]:
    """Within this context, messages name flags."""
    token = _flags.set(True)
    try:
        yield
    finally:
        _flags.reset(token)


def option(argument: str, flags: str) -> str:
    """An option in a message: from Python the argument and the flags behind it, on the command line the flags alone.

    Examples
    --------
    >>> option("resume=True", "--resume")
    'resume=True (--resume)'
    >>> with on_command_line():
    ...     option("resume=True", "--resume")
    '--resume'
    """
    return flags if _flags.get() else f"{argument} ({flags})"
