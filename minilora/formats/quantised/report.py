"""What making a base in 4 bits came to: bits a weight and errors, by group of layers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ...lora.adapters.inventory import pattern_of
from ...shown import shown
from ...tables import table

__all__ = ["Group", "QuantisedReport", "QuantisedRow"]


class QuantisedRow(NamedTuple):
    """One weight: bytes in the file before and now, bytes of codes and scales, sums of squares of its errors and numbers."""

    name: str
    shape: tuple[int, ...]
    before: int
    nbytes: int
    held: int
    wrong: float
    whole: float


class Group(NamedTuple):
    """Weights whose names differ by numbers alone.

    Attributes
    ----------
    name : str
    layers, numbers, nbytes : int
        How many weights these are, and how many numbers and bytes they have.
    bits : float
        Bits a weight: of codes and scales, which is what is held in memory. In the file each weight has 1.3 kB of words and
        maps besides.
    error : float
        ||Q - W|| / ||W||.
    """

    name: str
    layers: int
    numbers: int
    nbytes: int
    bits: float
    error: float


@shown
class QuantisedReport(NamedTuple):
    """What `quantize_files` did. Printed as a table.

    Attributes
    ----------
    base, out, kind : str
    double : bool
    rows : tuple of QuantisedRow
    copied : int
        How many tensors are as they were.
    before, nbytes : int
        Of the files of weights; of a rehearsal nothing is written, and `nbytes` is 0.
    notes : tuple of str
    seconds : float
    checked : tuple
        What a check of the folder gave.
    """

    base: str
    out: str
    kind: str
    double: bool
    rows: tuple[QuantisedRow, ...]
    copied: int
    before: int
    nbytes: int
    notes: tuple[str, ...]
    seconds: float
    checked: tuple[Any, ...] = ()

    @property
    def groups(self) -> list[Group]:
        """The weights by their names without numbers, in the order of the files."""
        found: dict[str, list[QuantisedRow]] = {}
        for row in self.rows:
            found.setdefault(pattern_of(row.name), []).append(row)
        return [_group(name, rows) for name, rows in found.items()]

    def __str__(self) -> str:
        every = [*self.groups, _group("all", list(self.rows))]
        head = ("weights", "n", "numbers", "bits a weight", "|Q - W|/|W|")
        cells = [(g.name, str(g.layers), f"{g.numbers:,}", f"{g.bits:.3f}", f"{g.error:.2%}") for g in every]
        size = f"; {self.before:,} bytes before, {self.nbytes:,} now" if self.nbytes else ""
        lines = [*table([head, *cells], left={0}),
                 f"{self.kind}{', scales in 8 bits' if self.double else ''}; tensors as they were: {self.copied}{size}"]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def as_dict(self) -> dict[str, Any]:
        """The report as values for JSON."""
        plain = {name: value for name, value in self._asdict().items() if name not in ("rows", "checked")}
        total = _group("all", list(self.rows))
        return {**plain, "bits": total.bits, "error": total.error, "groups": [group._asdict() for group in self.groups],
                "weights": [{"name": row.name, "shape": list(row.shape), "bytes": row.nbytes,
                             "error": _error([row])} for row in self.rows]}


def _group(name: str, rows: list[QuantisedRow]) -> Group:
    numbers, held = sum(math.prod(row.shape) for row in rows), sum(row.held for row in rows)
    return Group(name, len(rows), numbers, sum(row.nbytes for row in rows), 8 * held / max(1, numbers), _error(rows))


def _error(rows: list[QuantisedRow]) -> float:
    whole = sum(row.whole for row in rows)
    return math.sqrt(sum(row.wrong for row in rows) / whole) if whole else 0.0
