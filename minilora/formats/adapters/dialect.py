"""What a dialect must answer: is this file yours, what does it say, and how would you write it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .saved import SavedAdapter

__all__ = ["Dialect", "Source", "Written"]

Array = Any


class Source(NamedTuple):
    """What was found at a path. Nothing in it has been interpreted yet.

    Attributes
    ----------
    path : Path
        For messages.
    tensors : mapping of str to array
        Lazy: an array is mapped when it is asked for. Names and shapes cost nothing.
    metadata : mapping of str to str
    config : mapping, or None
        The JSON object of the config file beside it, if there is one.
    """

    path: Path
    tensors: Mapping[str, Array]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None


class Written(NamedTuple):
    """What is to be written: one file of tensors, its metadata, and a config file where the dialect has one.

    Attributes
    ----------
    tensors : dict of str to array
    metadata : dict of str to str
    config : dict, or None
        Written as JSON, with sorted keys.
    names : (str, str)
        File names of tensors and config inside a folder.
    notes : tuple of str
        What the writer had to do that deserves a look: scalings folded into B, an option that was left at its default ...
    pack : callable, or None
        Writes the file of tensors to a path, for dialects whose file is no safetensors file; None for the others.
    """

    tensors: dict[str, Array]
    metadata: dict[str, str]
    config: dict[str, Any] | None
    names: tuple[str, str]
    notes: tuple[str, ...] = ()
    pack: Callable[[Path], None] | None = None


class Dialect(Protocol):
    """One way to write adapters down. `name` is what `dialect=` says."""

    name: str

    def recognise(self, source: Source) -> bool:
        """Whether keys, shapes of keys or config are those of this dialect. Two dialects that both say yes are an error."""

    def read(self, source: Source, **options: Any) -> SavedAdapter:
        """What the file says. `FormatError` with all that is not understood; nothing is guessed."""

    def write(self, adapter: SavedAdapter, **options: Any) -> Written:
        """The same adapter in this dialect. `FormatError` where the dialect cannot say it; nothing is left out silently."""
