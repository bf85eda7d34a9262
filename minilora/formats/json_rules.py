"""Rules of JSON that is read here, which Python's parser lets pass: no name twice in an object, and no NaN."""

from __future__ import annotations

from typing import Any

__all__ = ["TwiceError", "no_number", "once"]


class TwiceError(ValueError):
    """A name that an object has twice: which of the two counts depends on the program that reads it.

    Attributes
    ----------
    name : str
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"the name {name!r} is there twice")
        self.name = name


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of an object's pairs; `TwiceError` if a name comes twice. For ``json.loads(..., object_pairs_hook=once)``."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise TwiceError(name)
        found[name] = value
    return found


def no_number(word: str) -> Any:
    """Refuse NaN and the infinities, which JSON has not. For ``json.loads(..., parse_constant=no_number)``."""
    raise ValueError(f"{word} is no number of JSON")
