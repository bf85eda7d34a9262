"""A table of a model: layers, shapes, trained and frozen numbers, bytes."""

from __future__ import annotations

from typing import NamedTuple

from ..shown import shown
from ..tables import GLUE, table
from .module import Module

__all__ = ["Summary", "SummaryRow", "summary"]


class SummaryRow(NamedTuple):
    """One layer that owns parameters: its path, type, parameters' shapes, trained and frozen numbers, and bytes."""

    path: str
    layer: str
    shapes: dict[str, tuple[int, ...]]
    trained: int
    frozen: int
    nbytes: int


@shown
class Summary(NamedTuple):
    """The rows of a model and their sums. Printed as a table that ends with PEFT's line.

    Attributes
    ----------
    rows : tuple of SummaryRow
    trained, frozen : int
        Numbers that are trained, and that are not.
    nbytes : int
        Bytes of all parameters.
    """

    rows: tuple[SummaryRow, ...]
    trained: int
    frozen: int
    nbytes: int

    @property
    def trainable_line(self) -> str:
        """``trainable params: X || all params: Y || trainable%: Z``, exactly as PEFT prints it."""
        total = self.trained + self.frozen
        percent = 100 * self.trained / total if total else 0.0
        return f"trainable params: {self.trained:,d} || all params: {total:,d} || trainable%: {percent:.4f}"

    def __str__(self) -> str:
        cells = [("layer", "type", "parameters (shape)", "trained", "frozen", "bytes")]
        for row in self.rows:
            shapes = "  ".join(f"{name} {shape}".replace(" ", GLUE) for name, shape in row.shapes.items())
            cells.append((row.path or "(model)", row.layer, shapes, f"{row.trained:,d}", f"{row.frozen:,d}",
                          f"{row.nbytes:,d}"))
        cells.append(("total", "", "", f"{self.trained:,d}", f"{self.frozen:,d}", f"{self.nbytes:,d}"))
        lines = table(cells, left=range(3), wide=2)
        last = max(i for i, line in enumerate(lines) if line.startswith("total"))
        rule = next(line for line in lines if line and not line.strip("-"))
        return "\n".join([*lines[:last], rule, *lines[last:], self.trainable_line])


def summary(model: Module) -> Summary:
    """Count what a model holds and what of it is trained.

    A parameter shared by several layers is counted once, in the first.

    Examples
    --------
    >>> import numpy, minilora
    >>> layer = minilora.lora.Linear(1001, 1000, r=1, lora_alpha=1, bias=False, rng=numpy.random.default_rng(0))
    >>> print(minilora.summary(layer).trainable_line)
    trainable params: 2,001 || all params: 1,003,001 || trainable%: 0.1995
    """
    rows, seen = [], set()
    for path, module in model.named_modules():
        own = {}
        for name, parameter in module.own_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                own[name] = parameter
        if own:
            trained = sum(p.size for p in own.values() if p.trainable)
            frozen = sum(p.size for p in own.values() if not p.trainable)
            rows.append(SummaryRow(path, type(module).__name__, {name: p.shape for name, p in own.items()}, trained,
                                   frozen, sum(p.size * p.dtype.itemsize for p in own.values())))
    return Summary(tuple(rows), sum(row.trained for row in rows), sum(row.frozen for row in rows),
                   sum(row.nbytes for row in rows))
