"""GPU: the steps that cannot be recorded, in words: a replay would not do what they do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy

from ... import replay
from ...errors import StateError
from ...tensor import Tensor
from .block import on_device

__all__ = ["plain_parts", "refuse_changes", "refuse_numbers", "refuse_written"]


def refuse_changes(recording: replay.Recording) -> None:
    """Raise `StateError` if the step itself has changed what it reads from Python: a replay would not do that."""
    changes = recording.changes()
    if changes:
        more = f", and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise StateError(f"record: the step itself changes {', '.join(changes[:3])}{more}. A replay repeats launches without "
                         "Python, and would not change it again. Do that outside of the step, with what it gives back; or "
                         "call the step itself, without record. Nothing else has changed")


def plain_parts(result: Any) -> dict[str, Any]:
    """What a result holds besides tensors and arrays of the device, by its place."""
    return {place: part for place, part in places_in(result, "result") if not isinstance(part, Tensor) and not on_device(part)}


def refuse_numbers(result: Any, earlier: dict[str, Any]) -> None:
    """Raise `StateError` if the step gives back numbers of Python, or an object that it made: a replay would give it again."""
    parts = plain_parts(result)
    wrong = [f"{place}, a {type(part).__name__}" for place, part in parts.items()
             if isinstance(part, (float, numpy.generic, numpy.ndarray))
             or not (place in earlier and replay.same((part,), (earlier[place],)))]
    if wrong:
        raise StateError(f"record: the step gives back {', '.join(wrong[:3])}: a replay would give the same again, whatever it "
                         "is then. Let it give tensors and arrays of the device, in tuples, lists and dicts, and read other "
                         "numbers outside of the step")


def refuse_written(arguments: Sequence[int]) -> None:
    """Raise `StateError` if the step writes into its arguments, of which a replay has copies."""
    if arguments:
        raise StateError(f"record: the step itself writes into {len(arguments)} of the arrays that it gets. A replay writes "
                         "into copies, which nobody sees: let the step return what it makes, or write into an array that is "
                         "no argument")


def places_in(value: Any, place: str) -> Iterable[tuple[str, Any]]:
    """(place, part) of all that is in tuples, lists and dicts."""
    if isinstance(value, (tuple, list, dict)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places_in(part, f"{place}[{key!r}]")
    else:
        yield place, value
