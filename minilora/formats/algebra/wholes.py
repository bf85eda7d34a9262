"""What an adapter replaces as a whole: saved modules, biases of the base, rows of embeddings.

A replaced array W_i is no update of its own: the update is W_i - W_0, and W_0 is the base's, which is not at hand. A weighted
sum can be had without it where the weights add up to 1, since W_0 + sum w_i (W_i - W_0) is sum w_i W_i then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy

from ...errors import ConfigError
from ...flags import option
from ..adapters.faults import Faults
from ..adapters.saved import SavedAdapter, TokenRows

__all__ = ["SAVED", "Wholes", "parts_of", "together"]

Array = Any
SAVED = ("same", "average", "drop")


class Wholes(NamedTuple):
    """The fields of a `SavedAdapter` that are no updates."""

    saved: Mapping[str, Array]
    biases: Mapping[str, Array]
    tokens: Mapping[str, TokenRows]


def parts_of(adapter: SavedAdapter) -> dict[tuple[str, str], Array]:
    """All replaced arrays, by the field and the path; the path of rows says which."""
    rows = {("tokens", f"{path} {list(token.indices)}"): token.rows for path, token in adapter.tokens.items()}
    return {**{("saved", path): array for path, array in adapter.saved.items()},
            **{("biases", path): array for path, array in adapter.biases.items()}, **rows}


def together(adapters: Sequence[SavedAdapter], weights: Sequence[float], names: Sequence[str],
             saved: str | int) -> tuple[Wholes, list[str]]:
    """The replaced arrays of a combination, and notes.

    Parameters
    ----------
    saved : "same", "average", "drop" or int
        Keep what is the same in all of them, and refuse the rest; the weighted sum, for weights that add up to 1; leave all
        out; or take those of this adapter, counted from 0.

    Raises
    ------
    FormatError
        With one line for every array that this way does not settle.
    ConfigError
        If there is no such way, or no such adapter.
    """
    if saved not in SAVED and not (type(saved) is int and 0 <= saved < len(adapters)):
        raise ConfigError(f"saved must be one of {', '.join(map(repr, SAVED))}, or the number of an adapter below "
                          f"{len(adapters)}, got {saved!r}")
    every = [parts_of(adapter) for adapter in adapters]
    paths = sorted(set().union(*every))
    if not paths or saved == "drop":
        return Wholes({}, {}, {}), [f"left out: {path} ({field})" for field, path in paths]
    if isinstance(saved, int):
        source = adapters[saved]
        return (Wholes(source.saved, source.biases, source.tokens),
                [f"whole modules, biases and rows are those of {names[saved]}"])
    if saved == "average" and abs(sum(weights) - 1) > 1e-9:
        raise ConfigError(f"saved='average': the weights {', '.join(f'{w:g}' for w in weights)} add up to {sum(weights):g}, "
                          "and only for 1 is the sum of whole modules one of their changes: the base is not at hand")
    faults = Faults()
    for field, path in paths:
        have = [part[field, path] for part in every if (field, path) in part]
        lacking = [name for name, part in zip(names, every) if (field, path) not in part]
        if lacking:
            faults.add(path, f"{field}: not in {', '.join(lacking)}")
        elif len({array.shape for array in have}) > 1:
            faults.add(path, f"{field}: shapes {', '.join(str(array.shape) for array in have)}")
        elif saved == "same" and not all(numpy.array_equal(have[0], array) for array in have[1:]):
            faults.add(path, f"{field}: other numbers in each")
    faults.refuse("the adapters replace parts of the base as a whole, and not all by the same",
                  option("saved='average'", "--saved average") + " takes the weighted sum where the weights add up to 1, "
                  + option("saved=0", "--saved 0") + " those of the first adapter, " + option("saved='drop'", "--saved drop")
                  + " none")
    if saved == "same":
        first, what = adapters[0], f"{len(paths)} array{'s' if len(paths) > 1 else ''}"
        kept = f"kept as they are, the same in all: {what} that stand for the base's" if len(adapters) > 1 else \
            f"kept as they are, whatever the weight: {what} that stand for the base's"
        return Wholes(first.saved, first.biases, first.tokens), [kept]
    return _average(adapters, every, weights), [f"weighted sum of {len(paths)} arrays that stand for the base's"]


def _average(adapters: Sequence[SavedAdapter], every: Sequence[Mapping[tuple[str, str], Array]],
             weights: Sequence[float]) -> Wholes:
    found: dict[str, dict[str, Any]] = {"saved": {}, "biases": {}, "tokens": {}}
    for field, path in every[0]:
        arrays = [part[field, path] for part in every]
        total = sum(array.astype("float64") * weight for array, weight in zip(arrays, weights))
        found[field][path] = numpy.asarray(total).astype(arrays[0].dtype)
    tokens = {path: TokenRows(token.indices, found["tokens"][f"{path} {list(token.indices)}"])
              for path, token in adapters[0].tokens.items()}
    return Wholes(found["saved"], found["biases"], tokens)
