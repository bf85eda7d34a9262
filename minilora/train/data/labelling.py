"""The classes of rows with labels, and what is to be learned of rows that have a label or a score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from .problems import Problems, short
from .rows import Row

__all__ = ["answers_of", "known_labels", "names_of"]


def names_of(rows: Sequence[Row], given: Sequence[str] | None, problems: Problems) -> tuple[str, ...]:
    """The names of the classes in order: those given; the texts of training rows, sorted; or numbers up to theirs."""
    texts = sum(isinstance(row.fields["label"], str) for row in rows)
    usual = str if 2 * texts >= len(rows) else int
    for row in rows:
        if type(row.fields["label"]) is not usual:
            what = "text, where most are numbers" if usual is int else "number, where most are texts"
            problems.add(row.path, row.line, f"the label {short(row.fields['label'])} is a {what}")
    if given is not None:
        return tuple(given)
    found: set[Any] = {row.fields["label"] for row in rows if type(row.fields["label"]) is usual}
    return tuple(sorted(found)) if usual is str else tuple(map(str, range(max(found) + 1)))


def known_labels(rows: Sequence[Row], names: tuple[str, ...], all_of_them: bool) -> dict[Any, int]:
    """The number of each label, text or number, that training rows have; or of all that the model has."""
    numbers: dict[Any, int] = {**{name: i for i, name in enumerate(names)}, **{i: i for i in range(len(names))}}
    seen = numbers.keys() if all_of_them else {row.fields["label"] for row in rows}
    return {label: i for label, i in numbers.items() if label in seen}


def answers_of(form: str, rows: Sequence[Row], known: dict[Any, int] | None, problems: Problems) -> Any:
    """Classes (int64) or scores (float32) of rows, (n,); None for rows of other forms. A class that is none is a fault."""
    if form == "score":
        return numpy.array([row.fields["score"] for row in rows], "float32")
    if known is None:
        return None
    for row in rows:
        if row.fields["label"] not in known:
            names = ", ".join(map(short, list(known)[:5])) + (" ..." if len(known) > 5 else "")
            problems.add(row.path, row.line, f"the label {short(row.fields['label'])} is not one of those that the training "
                         f"rows, or the model, have: {names}")
    return numpy.array([known.get(row.fields["label"], -1) for row in rows], "int64")
