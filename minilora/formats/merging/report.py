"""What merging files did: tensor by tensor, and what deserves a look."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ...lora.merging.report import MergeReport, WeightReport
from ...shown import shown

__all__ = ["FilesReport"]

LISTED = 12  # rows of the table: the tensors with the lowest gain
# half a unit in the last place
ROUNDED = {"float16": "2^-11", "bfloat16": "2^-8", "float32": "2^-24", "float64": "2^-24"}  # the last is computed in float32
CODES = ("nf4", "fp4")  # there nearly all that moves, moves by a whole step: the gain tells
UNMOVED = 0.01  # the share from which on a loss is told


@shown
class FilesReport(NamedTuple):
    """What `merge_files` did. Printed as a table.

    Attributes
    ----------
    base, out : str
    adapters : mapping of str to float
        Each with its weight.
    dtype : str or None
        What all tensors of floating-point numbers were converted to.
    rounding : str
    seed : int
    rows : tuple of WeightReport
        One for each tensor with an update, in the order of the files.
    replaced : tuple of str
        Tensors that others took the place of, in all or some of their rows.
    copied, converted : int
        How many tensors stayed, and how many only changed their dtype.
    nbytes, patch_nbytes : int
        Of the files of weights, and of the patch (0: there is none).
    fingerprints : mapping of str to str
        What is known of the base, by adapter.
    forced : mapping of str to str
        Why an adapter is of another base, where that was overruled.
    notes : tuple of str
    seconds : float
    dequantized : str or None
        The dtype to which a base in 4 bits was decoded.
    """

    base: str
    out: str
    adapters: Mapping[str, float]
    dtype: str | None
    rounding: str
    seed: int
    rows: tuple[WeightReport, ...]
    replaced: tuple[str, ...]
    copied: int
    converted: int
    nbytes: int
    patch_nbytes: int
    fingerprints: Mapping[str, str]
    forced: Mapping[str, str]
    notes: tuple[str, ...]
    seconds: float
    dequantized: str | None = None

    def _arrived(self) -> str:
        if not self.rows:
            return ""
        return (f"; of every update at least {min(row.gain for row in self.rows):.2%} arrived, beside noise of at most "
                f"{max(row.relative_error for row in self.rows):.1e} of it")

    @property
    def warnings(self) -> list[str]:
        """What was lost, with numbers and what helps."""
        lost = [row for row in self.rows if row.unmoved > UNMOVED and row.dtype not in CODES]
        if not lost:
            return []
        worst = min(lost, key=lambda row: row.gain)
        cures = ["--dtype float32 keeps the update to the last digits (a file twice as large)", "or leave the adapter beside"]
        if self.rounding == "nearest":
            cures.insert(0, "--rounding stochastic keeps it on average, in the same dtype")
        return [f"rounding to {worst.dtype} swallowed a part of the update in {len(lost)} of {len(self.rows)} tensors; most in "
                f"{worst.path}: {worst.unmoved:.1%} of its weights did not move, and {worst.gain:.1%} of the update arrived "
                f"(||D|| / ||W|| = {worst.ratio:.1e}). Cures: {'; '.join(cures)}"]

    def __str__(self) -> str:
        lines = []
        if self.rows:
            shown = sorted(self.rows, key=lambda row: row.gain)[:LISTED]
            table = str(MergeReport(tuple(row for row in self.rows if row in shown))).split("\nlowest gain")[0]
            lines += [table, *([f"... and {len(self.rows) - len(shown)} more, with higher gains"]
                               if len(self.rows) > len(shown) else [])]
        counts = {"merged": len(self.rows), "replaced": len(self.replaced), f"converted to {self.dtype}": self.converted,
                  "copied": self.copied}
        told = ", ".join(f"{what}: {count}" for what, count in counts.items() if count)
        size = f"{self.nbytes / 1e9:.2f} GB" if self.nbytes >= 1e8 else f"{self.nbytes:,} bytes"
        patch = f", patch {self.patch_nbytes / max(1, self.nbytes):.1%} of that" if self.patch_nbytes else ""
        lines += [f"tensors {told}; {size}{patch}"]
        if self.dequantized is not None:
            lines.append(f"decoded from 4 bits to {self.dequantized}: rounding changes a number by at most "
                         f"{ROUNDED[self.dequantized]} of it{self._arrived()}")
        lines += [f"fingerprint of {label}: {words}" for label, words in self.fingerprints.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])

    def as_dict(self) -> dict[str, Any]:
        """The report as values for JSON."""
        plain = {name: value for name, value in self._asdict().items() if name != "rows"}
        return {**plain, "adapters": dict(self.adapters), "fingerprints": dict(self.fingerprints), "forced": dict(self.forced),
                "tensors": [{**row._asdict(), "shape": list(row.shape)} for row in self.rows], "warnings": self.warnings}
