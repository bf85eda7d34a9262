"""What quantising a model came to, printed as a table."""

from __future__ import annotations

from typing import NamedTuple

from ..shown import shown
from ..tables import table

__all__ = ["Quantized", "QuantizedWeight"]


class QuantizedWeight(NamedTuple):
    """What became of one weight: its path, the kind it is held as now, shape, bytes before and after, ||Q - W|| / ||W||."""

    path: str
    kind: str
    shape: tuple[int, ...]
    before: int
    after: int
    error: float


@shown
class Quantized(NamedTuple):
    """What `quantize` or `dequantize` did. Printed as a table.

    Attributes
    ----------
    rows : tuple of QuantizedWeight
    left : tuple of (path, why)
        Linear layers that were left as they are.
    """

    rows: tuple[QuantizedWeight, ...]
    left: tuple[tuple[str, str], ...]

    @property
    def before(self) -> int:
        return sum(row.before for row in self.rows)

    @property
    def after(self) -> int:
        return sum(row.after for row in self.rows)

    @property
    def bits(self) -> float:
        """Bits a weight now, of the weights in `rows`."""
        return 8.0 * self.after / max(1, sum(row.shape[0] * row.shape[1] for row in self.rows))

    def __str__(self) -> str:
        cells = [("weight", "held as", "shape", "bytes before", "after", "error")]
        cells += [(row.path, row.kind, " x ".join(map(str, row.shape)), f"{row.before:,}", f"{row.after:,}", f"{row.error:.2%}")
                  for row in self.rows]
        lines = table(cells, left=range(3))
        lines.append(f"{len(self.rows)} weights: {self.before:,} bytes before, {self.after:,} now, "
                     f"{self.bits:.3f} bits a weight")
        return "\n".join([*lines, *(f"left: {path or '(model)'}: {why}" for path, why in self.left)])
