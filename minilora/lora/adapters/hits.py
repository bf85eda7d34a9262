"""What a config hits in a model, as values: `Target`, one layer, and `Match`, all of it."""

from __future__ import annotations

from typing import NamedTuple

from ... import nn
from ...shown import shown
from ..config import Config
from ...tables import table

__all__ = ["Match", "Target"]


class Target(NamedTuple):
    """A layer that is hit, with the values that hold for it, and `entry`, the part of the config that named it."""

    path: str
    module: nn.Module | None
    kind: str
    r: int
    lora_alpha: float
    scaling: float
    entry: str


@shown
class Match(NamedTuple):
    """What a config hits. Printed as a table.

    Attributes
    ----------
    config : Config
    targets : tuple of Target
        In model order.
    excluded : tuple of (str, str)
        Layers that a target names but that are left out, and why.
    saved : tuple of str
        Paths of the modules in `modules_to_save`.
    notes : tuple of str
        What deserves a look: uneven coverage; and, with `allow_unmatched`, every entry that matches nothing.
    tokens : tuple of (str, tuple of int)
        Paths of embeddings, and the rows in `trainable_token_indices`.
    """

    config: Config
    targets: tuple[Target, ...]
    excluded: tuple[tuple[str, str], ...]
    saved: tuple[str, ...]
    notes: tuple[str, ...]
    tokens: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __str__(self) -> str:
        cells = [("layer", "type", "r", "lora_alpha", "s", "named by")]
        cells += [(t.path, t.kind, str(t.r), f"{t.lora_alpha:g}", f"{t.scaling:g}", t.entry) for t in self.targets]
        lines = [f"{len(self.targets)} layers are adapted", *table(cells, left=(0, 1, 5))]
        lines += [f"left out: {path}: {why}" for path, why in self.excluded]
        lines += [f"trained as a whole: {path}" for path in self.saved]
        lines += [f"trained rows of {path}: {', '.join(map(str, indices))}" for path, indices in self.tokens]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
