"""The adapters of a model as a table: which there are, which take part, and whether they are merged."""

from __future__ import annotations

from typing import NamedTuple

from ... import nn
from ...shown import shown
from ..layers.places import layers_of, saved_of
from ...tables import table
from .switching import trained_numbers

__all__ = ["Status", "StatusRow", "status"]


class StatusRow(NamedTuple):
    """One layer: its path and type, its adapters as name -> r, the active ones with their weights, and if it is merged."""

    path: str
    layer: str
    adapters: dict[str, int]
    active: dict[str, float]
    merged: bool


@shown
class Status(NamedTuple):
    """The LoRA layers of a model and the modules trained as a whole. Printed as a table.

    Attributes
    ----------
    rows : tuple of StatusRow
    trained, total : int
        Numbers of the model that are trained, and all.
    """

    rows: tuple[StatusRow, ...]
    trained: int
    total: int

    def __str__(self) -> str:
        cells = [("layer", "type", "adapters", "active", "merged")]
        for row in self.rows:
            adapters = ", ".join(f"{name} (r={r})" if r else name for name, r in row.adapters.items())
            active = ", ".join(name if w == 1 else f"{w:g} x {name}" for name, w in row.active.items())
            cells.append((row.path or "(model)", row.layer, adapters or "-", active or "-", "yes" if row.merged else "no"))
        return "\n".join([*table(cells, left=range(5)), f"trained: {self.trained:,} of {self.total:,} numbers"])


def status(model: nn.Module) -> Status:
    """The adapters of a model, layer by layer: which there are, which are active, and whether they are merged."""
    rows = [StatusRow(path, type(layer).__name__, {name: adapter.r for name, adapter in layer.adapters.items()},
                      dict(layer.active), layer.merged) for path, layer in layers_of(model).items()]
    rows += [StatusRow(path, type(wrapper.original).__name__, dict.fromkeys(wrapper.copies, 0),
                       {wrapper.active: 1.0} if wrapper.active else {}, False) for path, wrapper in saved_of(model).items()]
    return Status(tuple(rows), *trained_numbers(model))
