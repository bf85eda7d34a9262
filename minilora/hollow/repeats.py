"""What repeats itself in a rehearsal is run once, and counted as often as it comes: equal steps of a walk, equal calls.

Both rest on this: what a step takes is a matter of shapes, strides, dtypes and settings, and of no number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy

from .array import Hollow, protocol
from .meter import Meter, current

__all__ = ["fewer", "remembered"]

Key = tuple[Any, ...]
MOST = 1 << 12  # calls that are remembered
UNSEEN = ("xp", "sources", "saved", "leaves", "gathered", "lent", "retained", "order", "shape", "kinds", "kernel")

_calls: dict[Key, tuple[Any, ...]] = {}


def fewer(places: Sequence[Any]) -> Iterator[Any]:
    """Those of the places of a walk that differ; see `ops.few`.

    A step finds what the one before it has left in variables: so a place is run if no place of its lengths has come after one
    of the lengths of its predecessor. The first two are run, for the first may begin what the others add to, and the last,
    whose end the array may cut off. FLOPs of the others are those of a place of their lengths.
    """
    keys = [lengths(place) for place in places]
    meter, run = current(), chosen(keys)
    flops: dict[Key, dict[tuple[str, str], int]] = {}
    for i, place in enumerate(places):
        if i in run:
            before = dict(meter.flops)
            yield place
            flops[keys[i]] = difference(meter.flops, before)
        else:
            count(meter, flops[keys[i]])


def chosen(keys: Sequence[Key]) -> set[int]:
    """Which places of these lengths are run."""
    last = len(keys) - 1
    seen: set[tuple[Key, Key]] = set()
    found = {0, 1, last}
    for i in range(1, len(keys)):
        pair = keys[i - 1], keys[i]
        if pair not in seen or i == last:
            found |= {i - 1, i}  # after its own predecessor, or after one like it
        seen.add(pair)
    return found


def lengths(place: Any) -> Key:
    """The lengths of the slices of a place."""
    if isinstance(place, slice):
        return (place.stop - place.start,)
    return tuple(lengths(part) for part in place) if isinstance(place, tuple) else ()


def remembered(op: Any, half: Callable[..., Any], *arrays: Any) -> Any:
    """What a part of an operation gives, which writes into its arrays or returns new ones; run for the first of equal calls."""
    meter, key = current(), (half.__name__, *key_of(op, arrays))
    if key not in _calls:
        return learned(op, half, arrays, key)
    growth, flops, kernel, memories, results = _calls[key]
    roots = [Hollow(nbytes // dtype.itemsize, dtype) for nbytes, dtype in memories]
    meter.pass_by(growth - sum(nbytes for nbytes, _ in memories))
    count(meter, flops)
    op.kernel = kernel
    if results is None:
        return None
    return tuple(roots[i].seen(shape, strides, dtype) for i, shape, strides, dtype in results)


def learned(op: Any, half: Callable[..., Any], arrays: Sequence[Any], key: Key) -> Any:
    """Run the call, and write down what it took."""
    meter = current()
    live, peak, at, flops = meter.live, meter.peak, meter.at_peak, dict(meter.flops)
    meter.peak = live
    given = half(*arrays)
    growth = meter.peak - live
    if meter.peak <= peak:
        meter.peak, meter.at_peak = peak, at
    made = given if isinstance(given, tuple) else ()
    memories = list({id(array.memory): array.memory for array in made}.values())
    if meter.live - live == sum(memory.nbytes for memory in memories) and all(array.base is not None for array in made):
        if len(_calls) >= MOST:
            _calls.clear()
        results = [(memories.index(array.memory), array.shape, array.strides, array.dtype) for array in made]
        _calls[key] = (growth, difference(meter.flops, flops), op.kernel, [(m.nbytes, made[0].dtype) for m in memories],
                       None if given is None else results)
    return given


def difference(flops: dict[tuple[str, str], int], before: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    return {kind: n - before.get(kind, 0) for kind, n in flops.items() if n != before.get(kind, 0)}


def count(meter: Meter, flops: dict[tuple[str, str], int]) -> None:
    for kind, n in flops.items():
        meter.flops[kind] = meter.flops.get(kind, 0) + n


def key_of(op: Any, arrays: Sequence[Any]) -> Key:
    """What a call depends on: its operation with its settings, what is multiplied in it, and its arrays."""
    meter, places = current(), dict[int, int]()
    settings = tuple((name, seen(value, places)) for name, value in sorted(vars(op).items()) if name not in UNSEEN)
    return type(op), settings, meter.within, meter.kinds, tuple(seen(array, places) for array in arrays)


def seen(value: Any, places: dict[int, int]) -> Any:
    """All of a value that a rehearsal can see; of arrays also which of them share memory."""
    if isinstance(value, Hollow):
        return value.shape, value.strides, value.dtype, value.role, places.setdefault(id(value.memory), len(places))
    if isinstance(value, numpy.ndarray):
        return value.shape, value.strides, value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(seen(part, places) for part in value)
    return value if isinstance(value, (int, float, str, type(None))) else ("object", id(value))


protocol["fewer"] = fewer
