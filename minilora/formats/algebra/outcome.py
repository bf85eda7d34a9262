"""What was done to an adapter, layer by layer, with the error that it costs. Printed as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...shown import shown
from ...tables import table
from ..adapters.faults import shortened
from ..adapters.saved import SavedAdapter

__all__ = ["Outcome", "Row", "energy_kept", "name_cell", "numbers_in"]


class Row(NamedTuple):
    """One layer.

    Attributes
    ----------
    path, kind : str
    before : tuple of int
        The ranks of the sources; 0 for one that does not have the layer.
    after : int
    norm : float
        ||D||_F of what was wanted.
    error : float
        How far the stored D is from it at most: what was cut, and the rounding of the factors.
    """

    path: str
    kind: str
    before: tuple[int, ...]
    after: int
    norm: float
    error: float

    @property
    def relative(self) -> float:
        """error / norm; 0 for a zero update."""
        return self.error / self.norm if self.norm else 0.0

    @property
    def energy(self) -> float:
        """The part of ||D||_F^2 that was kept, at least."""
        return energy_kept(self.relative)


def energy_kept(relative: float) -> float:
    return max(0.0, 1.0 - relative ** 2)


def name_cell(path: str) -> str:
    """A path for a table."""
    return shortened(path) or "(model)"


def numbers_in(adapter: SavedAdapter) -> int:
    """How many numbers A and B have."""
    return sum(int(update.A.size) + int(update.B.size) for update in adapter.updates.values())


@shown
@dataclass(frozen=True, eq=False)
class Outcome:
    """An adapter that was made of others, and what became of each layer.

    Attributes
    ----------
    adapter : SavedAdapter
    rows : tuple of Row
    what : str
        In words: "sum of 2 adapters".
    numbers_before : int
        How many numbers the sources had: A and B of the adapters, or the matrices that changed.
    notes : tuple of str
        What deserves a look.
    """

    adapter: SavedAdapter
    rows: tuple[Row, ...]
    what: str
    numbers_before: int
    notes: tuple[str, ...] = ()

    @property
    def norm(self) -> float:
        """The root of the sum of all ||D||_F^2."""
        return math.hypot(*(row.norm for row in self.rows))

    @property
    def error(self) -> float:
        """The root of the sum of the squared errors: at most so far from what was wanted, over all layers."""
        return math.hypot(*(row.error for row in self.rows))

    @property
    def energy(self) -> float:
        """The part of the norm squared that was kept, over all layers, at least."""
        return energy_kept(self.error / self.norm) if self.norm else 1.0

    @property
    def numbers(self) -> int:
        """How many numbers A and B have."""
        return numbers_in(self.adapter)

    def to_dict(self) -> dict[str, Any]:
        """The report, for JSON."""
        rows = [{"path": r.path, "kind": r.kind, "rank_before": list(r.before), "rank_after": r.after, "norm": r.norm,
                 "error": r.error, "relative_error": r.relative, "energy": r.energy} for r in self.rows]
        return {"what": self.what, "layers": rows, "norm": self.norm, "error": self.error, "energy": self.energy,
                "numbers": self.numbers, "numbers_before": self.numbers_before, "notes": list(self.notes)}

    def __str__(self) -> str:
        cells = [("layer", "rank", "", "|D|", "error", "energy kept")]
        for row in self.rows:
            before = "+".join(map(str, row.before)) if len(row.before) < 6 else f"{len(row.before)} adapters"
            cells.append((name_cell(row.path), before, f"-> {row.after}", f"{row.norm:.4g}", f"{row.relative:.2%}",
                          f"{row.energy:.6f}"))
        ranks = sorted({row.after for row in self.rows})
        said = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no layer"
        relative = self.error / self.norm if self.norm else 0.0
        last = (f"{len(self.rows)} layer{'' if len(self.rows) == 1 else 's'}, {said}, {self.numbers_before:,} -> "
                f"{self.numbers:,} numbers; error {relative:.3%} at most")
        return "\n".join([self.what, *table(cells, left=(0,)), last])
