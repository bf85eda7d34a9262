"""SavedModule: a module that some adapters replace by a copy of their own, trained as a whole (`modules_to_save`)."""

from __future__ import annotations

import copy
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

from ... import nn
from ...errors import ConfigError, StateError
from ...tensor import Tensor

if TYPE_CHECKING:
    from .rows import Rows

__all__ = ["SavedModule"]


class SavedModule(nn.Module):
    """A module with a whole copy for each adapter that trains it; the active adapter's is used, else the original.

    Parameters
    ----------
    original : nn.Module

    Attributes
    ----------
    original : nn.Module
    copies : dict of str to nn.Module
    active : str or None
        The adapter whose copy is used.

    Notes
    -----
    Attributes that it lacks are those of the module in use: ``model.head.weight`` goes on working.
    """

    def __init__(self, original: nn.Module) -> None:
        self.original, self.training = original, original.training
        self.copies: dict[str, nn.Module] = {}
        self.active: str | None = None
        self.rows: Rows | None = None
        self.off = False

    @property
    def current(self) -> nn.Module:
        """The module in use; in a mixed batch the original, and each row of a copy's adapter gets what the copy gives."""
        return self.original if self.active is None or self.off or self.rows is not None else self.copies[self.active]

    def add(self, name: str) -> None:
        """Copy the original for an adapter."""
        if name in self.copies:
            raise ConfigError(f"there is an adapter {name!r} already: choose another name")
        self.copies[name] = copy.deepcopy(self.original)  # with arrays of its own, which no optimizer knows

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("__call__", *args, **kwargs)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A method of the module in use. In a mixed batch of all modules that are concerned: each row is taken from one."""
        y = getattr(self.current, method)(*args, **kwargs)
        if self.rows is None or self.off or not self.copies.keys() & self.rows.places.keys():
            return y
        if not isinstance(y, Tensor) or not y.ndim:
            raise StateError("adapter_names: a module in modules_to_save must give one tensor with a first axis of rows, got "
                             f"{type(y).__name__}")
        return self.rows.chosen(y, {name: getattr(self.copies[name], method)(*args, **kwargs)
                                    for name in self.rows.places if name in self.copies})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("original", "copies", "active", "rows", "off"):
            raise AttributeError(name)  # while it is being made or copied
        value = getattr(self.current, name)
        return partial(self._call, name) if self.rows is not None and isinstance(value, MethodType) else value
