"""SavedModule: a module that some adapters replace by a copy of their own, trained as a whole (`modules_to_save`)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from types import MethodType
from typing import Any

from ... import nn
from ...errors import ConfigError, StateError
from ...nn.by_row import rows_of
from ...stored import dense
from ...tensor import Tensor

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

    @property
    def current(self) -> nn.Module:
        """The module in use; within a context the original, and each row of a copy's adapter gets what the copy gives."""
        return self.original if self.active is None or rows_of(self) is not None else self.copies[self.active]

    def as_base(self) -> nn.Module:
        return self.current.as_base()

    def add(self, name: str) -> None:
        """Copy the original for an adapter."""
        own = copy.deepcopy(self.original)  # with arrays of its own, which no optimizer knows
        for p in own.parameters():
            p.data = dense(p.data)  # what is held in low precision could not be trained
        self.take(name, own)

    def take(self, name: str, own: nn.Module) -> None:
        """Take in what is to be in the original's place for an adapter."""
        if name in self.copies:
            raise ConfigError(f"there is an adapter {name!r} already: choose another name")
        self.copies = {**self.copies, name: own.train(self.training)}  # a new dict: another thread may be reading this one

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("__call__", *args, **kwargs)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A method of the module in use. In a mixed batch of all modules that are concerned: each row is taken from one."""
        rows = rows_of(self)
        y = getattr(self.current, method)(*args, **kwargs)
        if rows is None or not self.copies.keys() & rows.places.keys():
            return y
        if not isinstance(y, Tensor) or not y.ndim:
            raise StateError("adapter_names: a module in modules_to_save must give one tensor with a first axis of rows, got "
                             f"{type(y).__name__}")
        return rows.chosen(y, {name: getattr(self.copies[name], method)(*args, **kwargs)
                               for name in rows.places if name in self.copies})

    # Python looks for these in the class, not in `__getattr__`. What is taken out of a module computes without the rows of
    # its adapter, so within a mixed batch that is refused.

    def _opened(self) -> Any:
        rows = rows_of(self)
        if rows is not None and self.copies.keys() & rows.places.keys():
            raise StateError("adapter_names: the model takes a module in modules_to_save apart (by an index or a loop), so "
                             "that a mixed batch cannot give each row its copy: call the module as a whole, or activate one "
                             "adapter")
        return self.current

    def __getitem__(self, index: Any) -> Any:
        return self._opened()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._opened())

    def __len__(self) -> int:
        return len(self._opened())

    def __contains__(self, item: Any) -> bool:
        return item in self._opened()

    def __bool__(self) -> bool:
        return bool(self.current)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("original", "copies", "active"):
            raise AttributeError(name)  # while it is being made or copied
        value = getattr(self.current, name)
        return partial(self._call, name) if isinstance(value, MethodType) and rows_of(self) is not None else value
