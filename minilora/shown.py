"""Reports that show themselves: in a REPL or a notebook as they are printed, and on a terminal as wide as that is."""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any, TypeVar

from .terminal import columns_of, fitting, room, wrapped

__all__ = ["shown", "tersely"]

T = TypeVar("T")


def shown(cls: type[T]) -> type[T]:
    """Decorate a class whose ``__str__`` is a table or a few lines: its ``__repr__`` is the same text.

    Where that goes to a terminal (stdout leads to one), tables are made to fit it and long lines are broken, as within
    `terminal.fitting`; elsewhere every line is as long as it is. Fields, equality and the rest of the class stay.
    """
    text: Any = cls.__str__

    @functools.wraps(text)
    def fitted(self: Any) -> str:
        columns = room() or columns_of(sys.stdout)
        if columns is None:
            return str(text(self))
        with fitting(columns):
            return wrapped(text(self), columns)

    for name in ("__str__", "__repr__"):
        setattr(cls, name, fitted)
    return cls


def tersely(cls: type[T]) -> type[T]:
    """Decorate a dataclass of settings: its ``__repr__`` is the call that makes it, with what differs from the defaults."""
    def written(self: Any) -> str:
        changed = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if field.init and not (value is default or (type(value) is type(default) and value == default)):
                changed.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(changed)})"

    cls.__repr__ = written  # type: ignore[method-assign]
    return cls
