"""What a load did: layer by layer, and what deserves a look."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ...shown import shown
from ...tables import table

__all__ = ["LoadReport", "LoadedLayer"]


class LoadedLayer(NamedTuple):
    """One adapted layer: its path in the model, its kind, r, lora_alpha, s, the rule by which s follows, and what is more."""

    path: str
    kind: str
    r: int
    lora_alpha: float
    scaling: float
    rule: str
    more: str


@shown
class LoadReport(NamedTuple):
    """What `load_adapter` put into a model. Printed as a table.

    Attributes
    ----------
    name : str
        Of the adapter in the model.
    source : str
        The file, and its dialect.
    layers : tuple of LoadedLayer
        In the order of the file.
    saved : tuple of str
        Paths of the modules that the adapter replaces as a whole.
    biases : tuple of str
        Paths of the biases of the base that the file has set.
    tokens : mapping of str to tuple of int
        The rows that the adapter replaces, by the path of their embedding.
    names : str
        How the file's paths became the model's; "" if they are the same.
    fingerprint : str
        What became of the base's fingerprint: "the base is the one that it was saved with", or why that is not known.
    forced : bool
        Whether it was loaded onto another base by ``force=True``.
    notes : tuple of str
        What deserves a look.
    """

    name: str
    source: str
    layers: tuple[LoadedLayer, ...]
    saved: tuple[str, ...]
    biases: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    names: str
    fingerprint: str
    forced: bool
    notes: tuple[str, ...]

    def __str__(self) -> str:
        cells = [("layer", "kind", "r", "lora_alpha", "s", "rule", "and")]
        cells += [(row.path, row.kind, str(row.r), f"{row.lora_alpha:g}", f"{row.scaling:g}", row.rule, row.more)
                  for row in self.layers]
        count = len(self.layers)
        lines = [f"adapter {self.name!r} from {self.source}: {count} layer{'' if count == 1 else 's'}",
                 *table(cells, left=(0, 1, 5, 6))]
        lines += [f"replaced as a whole: {path}" for path in self.saved]
        lines += [f"biases of the base: {', '.join(self.biases)}"] if self.biases else []
        lines += [f"rows of {path}: {', '.join(map(str, indices))}" for path, indices in self.tokens.items()]
        lines += [f"names: {self.names}"] if self.names else []
        return "\n".join([*lines, f"fingerprint: {self.fingerprint}", *(f"note: {note}" for note in self.notes)])
