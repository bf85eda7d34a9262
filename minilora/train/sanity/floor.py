"""What no model can learn of some rows: equal inputs with different answers.

Rows with equal inputs get equal outputs, whatever the weights are. Of n such targets, c_k of class k, the least cross-entropy
is sum_k c_k ln(n / c_k), reached by p_k = c_k / n; the least sum of squares is that around their mean. A decoder sees of a row
what is in front of a token: there the texts in front must be equal.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy

from ... import backend
from ...tensor import Tensor
from .passes import Seen

__all__ = ["Floor", "floor_of"]

IGNORED = -100
Array = Any


class Floor(NamedTuple):
    """The least loss that some rows can have.

    Attributes
    ----------
    loss : float
        A mean over their targets; 0 where the answers cannot be found among the inputs.
    rows : tuple of (int, int)
        Two of them that are equal, with different answers, for each group of such.
    tokens : bool
        Whether a decoder's texts are meant.
    """

    loss: float = 0.0
    rows: tuple[tuple[int, int], ...] = ()
    tokens: bool = False


def floor_of(inputs: Mapping[str, Any], look: Seen, decoder: bool) -> Floor:
    """The least loss of a batch, from its inputs and what a pass with it compared."""
    arrays = {name: host(value) for name, value in inputs.items()}
    name = answers_in(arrays, look)
    if name is None or len(look.goals) != 1:
        return Floor()
    answers = arrays.pop(name)
    groups: dict[Any, list[tuple[int, Any]]] = defaultdict(list)
    for key, row, answer in (in_front(arrays, answers) if decoder else whole_rows(arrays, answers)):
        groups[key].append((row, answer))
    least = least_surprise if look.goals[0].kind == "classes" else least_squares
    count = sum(map(len, groups.values()))
    total = sum(least([answer for _, answer in members]) for members in groups.values())
    torn = tuple(pair for members in groups.values() if (pair := different(members)))
    return Floor(total / count if count else 0.0, torn, decoder)


def host(value: Any) -> Array:
    """A value as a host array; anything that is none as one without axes."""
    data = value.data if isinstance(value, Tensor) else value
    return numpy.asarray(backend.to_host(data) if hasattr(data, "dtype") else data)


def answers_in(arrays: Mapping[str, Array], look: Seen) -> str | None:
    """The name of the input that holds what is wanted."""
    if "labels" in arrays:
        return "labels"
    wanted = numpy.ravel(backend.to_host(look.goals[0].wanted)) if look.goals else numpy.empty(0)
    return next((name for name, array in arrays.items() if array.size == wanted.size and (numpy.ravel(array) == wanted).all()),
                None)


def in_front(arrays: Mapping[str, Array], labels: Array) -> Iterator[tuple[Any, int, Any]]:
    """For each token that is to be predicted: what stands in front of it, its row, and the token."""
    ids = arrays["ids"]
    for row, place in numpy.argwhere(labels[:, 1:] != IGNORED).tolist():
        yield ids[row, :place + 1].tobytes(), row, int(labels[row, place + 1])


def whole_rows(arrays: Mapping[str, Array], answers: Array) -> Iterator[tuple[Any, int, Any]]:
    """For each answer: all inputs of its row with the place in it, the row, and the answer."""
    shared = [array for array in arrays.values() if array.ndim and len(array) == len(answers)]
    for row in range(len(answers)):
        key = tuple(array[row].tobytes() for array in shared)
        for place, answer in enumerate(numpy.ravel(answers[row]).tolist()):
            if not (answers.dtype.kind in "iu" and answer == IGNORED):
                yield (key, place), row, answer


def least_surprise(answers: list[Any]) -> float:
    return sum(count * math.log(len(answers) / count) for count in Counter(answers).values())


def least_squares(answers: list[Any]) -> float:
    return float(((numpy.array(answers) - numpy.mean(answers)) ** 2).sum())


def different(members: list[tuple[int, Any]]) -> tuple[int, int] | None:
    """Two rows of a group with different answers."""
    first, answer = members[0]
    return next(((first, row) for row, other in members[1:] if other != answer), None)
