"""What merging did to the weights: gathered block by block, printed as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy

from ...shown import shown
from ...tables import table

__all__ = ["MergeReport", "Sums", "WeightReport"]


@shown
class WeightReport(NamedTuple):
    """What merging did to one weight, against the D of the arithmetic. Printed as a table.

    Attributes
    ----------
    shape : tuple of int
    dtype : str
    rounding : str
        ``"nearest"`` also for a stochastic merge into float32 or float64: the arithmetic has no digits below theirs.
    ratio : float
        ||D|| / ||W||.
    gain : float
        <W' - W, D> / <D, D>: how much of the update arrived. 1 if D = 0.
    unmoved : float
        The share of weights that did not move, of those whose D is not 0.
    relative_error : float
        ||W' - W - D|| / ||D||.
    max_error : float
        The largest |W' - W - D|.
    correction_bits : float
        What the way back takes, in bits for each weight.
    path : str
        Of the layer, inside a model.
    """

    shape: tuple[int, ...]
    dtype: str
    rounding: str
    ratio: float
    gain: float
    unmoved: float
    relative_error: float
    max_error: float
    correction_bits: float
    path: str = ""

    def __str__(self) -> str:
        return _table((self,))


@shown
class MergeReport(NamedTuple):
    """The reports of all weights that one call merged. Printed as a table.

    Attributes
    ----------
    rows : tuple of WeightReport
    """

    rows: tuple[WeightReport, ...]

    def __str__(self) -> str:
        worst = min(self.rows, key=lambda row: row.gain)
        lines = [_table(self.rows), f"lowest gain: {worst.gain:.4f} in {worst.path or '(model)'}"]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    @property
    def notes(self) -> list[str]:
        """A line for every layer in which rounding swallowed the updates of more than 1 % of the weights."""
        return [f"{row.path or '(model)'}: {row.unmoved:.1%} of the weights did not move, their updates being less than half a "
                f"unit in the last place of {row.dtype}; of the update as a whole {row.gain:.1%} arrived" for row in self.rows
                if row.unmoved > 0.01]


_HEAD = ("layer", "shape", "dtype", "rounding", "|D|/|W|", "gain", "unmoved", "error/|D|", "max error", "bits back")
_SHORT = {"error/|D|": "err/|D|", "max error": "largest", "bits back": "bits"}  # where there is little room


def _table(rows: tuple[WeightReport, ...]) -> str:
    cells = [_HEAD]
    for row in rows:
        cells.append((row.path or "(model)", " x ".join(map(str, row.shape)), row.dtype, row.rounding, f"{row.ratio:.1e}",
                      f"{row.gain:.4f}", f"{row.unmoved:.2%}", f"{row.relative_error:.1e}", f"{row.max_error:.1e}",
                      f"{row.correction_bits:.3f}"))
    return "\n".join(table(cells, left=range(4), short=_SHORT))


class Sums:
    """The sums behind a `WeightReport`, in float64. Where that is the dtype of the arithmetic too, each block is divided by its
    largest number first, so that no square overflows.
    """

    def __init__(self) -> None:
        self.moving = self.unmoved = 0  # weights with D != 0, and those of them that stayed
        self.max_error = 0.0
        self._updates: list[tuple[float, ...]] = []  # unit; <D, D>, <W' - W, D> and |W' - W - D|^2 over its square
        self._weights: list[tuple[float, ...]] = []  # unit; <W, W> over its square

    def add(self, before: numpy.ndarray, after: numpy.ndarray, d: numpy.ndarray, half: bool = False) -> None:
        """Take in a block of W, W' and D, in the dtype of the arithmetic. `half`: W' has 16 bits, so float32 is wide enough."""
        if half and self._add_half(before, after, d):
            return
        updated = d != 0
        w, step, d = (array.astype("float64", copy=False) for array in (before, after, d))
        step = step - w
        error = step - d
        self._count(updated, step, error)
        unit = largest = 1.0
        if before.dtype == "float64":
            unit, largest = _largest(d), _largest(w)
            d, step, error, w = d / unit, step / unit, error / unit, w / largest
        self._updates.append((unit, _dot(d, d), _dot(step, d), _dot(error, error)))
        self._weights.append((largest, _dot(w, w)))

    def _add_half(self, w: numpy.ndarray, after: numpy.ndarray, d: numpy.ndarray) -> bool:
        """The same in float32, at a third of the price; False if squares leave its range."""
        step = after - w
        error = step - d
        squares = [float((a * b).sum()) for a, b in ((d, d), (step, d), (error, error), (w, w))]  # sums in pairs: 1e-7
        if not (all(map(math.isfinite, squares)) and min(squares[0], squares[3]) > 2.0 ** -90):
            return False
        self._count(d != 0, step, error)
        self._updates.append((1.0, *squares[:3]))
        self._weights.append((1.0, squares[3]))
        return True

    def _count(self, updated: numpy.ndarray, step: numpy.ndarray, error: numpy.ndarray) -> None:
        self.moving += int(numpy.count_nonzero(updated))
        self.unmoved += int(numpy.count_nonzero(updated & (step == 0)))
        self.max_error = max(self.max_error, float(error.max(initial=0.0)), -float(error.min(initial=0.0)))

    def report(self, shape: tuple[int, ...], dtype: str, rounding: str, correction_bits: float) -> WeightReport:
        unit, dd, moved, error = _total(self._updates or [(1.0, 0.0, 0.0, 0.0)])
        largest, ww = _total(self._weights or [(1.0, 0.0)])
        ratio = unit / largest * math.sqrt(dd / ww) if ww else math.inf if dd else 0.0
        return WeightReport(shape, dtype, rounding, ratio, moved / dd if dd else 1.0,
                            self.unmoved / self.moving if self.moving else 0.0, math.sqrt(error / dd) if dd else 0.0,
                            self.max_error, correction_bits)


def _largest(a: numpy.ndarray) -> float:
    return max(float(a.max(initial=0.0)), -float(a.min(initial=0.0))) or 1.0


def _dot(a: numpy.ndarray, b: numpy.ndarray) -> float:
    return float(numpy.einsum("ij,ij", a, b))  # one pass without a temporary; no BLAS, so that the digits repeat


def _total(parts: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """The largest unit of the blocks that are not 0, and the sums over its square."""
    unit = max((part[0] for part in parts if part[1]), default=1.0)
    scales = [(part[0] / unit) ** 2 if part[1] else 0.0 for part in parts]
    return unit, *(sum(part[i] * scale for part, scale in zip(parts, scales)) for i in range(1, len(parts[0])))
