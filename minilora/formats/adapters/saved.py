"""SavedAdapter: what an adapter file says, as a value. No model, and nothing of the dialect it was written in.

Every dialect is read into this value and written from it; a model takes it and gives it. Arrays are on the host, of the
dtype that the file has, read-only where they are views of a mapped file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ...lora.config import Config
from ...shown import shown
from ...tables import table
from .faults import shortened

__all__ = ["SavedAdapter", "TokenRows", "Update"]

Array = Any
Kind = Literal["linear", "embedding", "convolution"]


@dataclass(frozen=True, eq=False)
class Update:
    """The update of one layer, with the shapes of PEFT.

    Attributes
    ----------
    kind : "linear", "embedding" or "convolution"
    A : array
        Linear (r, in); embedding (r, V); convolution (r, C_in, \\*kernel). Never transposed, also where the weight is
        stored as (in, out).
    B : array
        Linear (out, r); embedding (d, r); convolution (out, r, 1, ...), with groups (out, r / groups, 1, ...).
    s : float
        The scaling that holds for this layer, whatever rule it came from.
    bias : array, shape (out,), or None
        `lora_bias`: the update is s (B A x + bias).
    magnitude : array, shape (out,), or None
        DoRA's lengths; flat for every kind of layer.
    """

    kind: Kind
    A: Array
    B: Array
    s: float
    bias: Array | None = None
    magnitude: Array | None = None

    @property
    def r(self) -> int:
        """The rank: rows of A."""
        return int(self.A.shape[0])


class TokenRows(NamedTuple):
    """Rows of an embedding that the adapter replaces: `trainable_token_indices`."""

    indices: tuple[int, ...]
    rows: Array  # (len(indices), d)


@shown
@dataclass(frozen=True, eq=False)
class SavedAdapter:
    """An adapter without a model. Printed as a table.

    Attributes
    ----------
    updates : mapping of str to Update
        By module path, as the file has it without the fixed prefix of its dialect.
    saved : mapping of str to array
        Whole parameters that take the place of the base's (`modules_to_save`), by parameter path: ``"head.weight"``.
    biases : mapping of str to array
        Biases of the base that were trained (`bias`), by parameter path: ``"fc.bias"``.
    tokens : mapping of str to TokenRows
        By the path of the embedding.
    config : lora.Config
        What the file's config says, or what follows from the tensors where a dialect has none. The scalings that hold are
        those of `updates`.
    dialect : str
    metadata : mapping of str to str
        That of the file, as it is.
    notes : tuple of str
        What deserves a look: settings that are off and unknown here, a saved head that the config does not name ...
    """

    updates: Mapping[str, Update]
    config: Config
    dialect: str = "peft"
    saved: Mapping[str, Array] = field(default_factory=dict)
    biases: Mapping[str, Array] = field(default_factory=dict)
    tokens: Mapping[str, TokenRows] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def shapes(self) -> dict[str, str]:
        """The module paths of all parts, each with its shapes in words, for messages."""
        found = {path: f"A {u.A.shape} B {u.B.shape}" for path, u in self.updates.items()}
        for path, token in self.tokens.items():
            found.setdefault(path, f"rows {token.rows.shape}")
        for parts in (self.saved, self.biases):
            for path, array in parts.items():
                found.setdefault(path.rpartition(".")[0], f"{path.rpartition('.')[2]} {array.shape}")
        return found

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [("layer", "kind", "r", "s", "A", "B", "")]
        for path, u in self.updates.items():
            more = [*(["lengths"] if u.magnitude is not None else []), *(["bias"] if u.bias is not None else [])]
            shapes = [str(tuple(factor.shape)) for factor in (u.A, u.B)]
            cells.append((shortened(path), u.kind, str(u.r), f"{u.s:g}", *shapes, ", ".join(more)))
        count = f"{len(self.updates)} update{'' if len(self.updates) == 1 else 's'}"
        lines = [f"adapter in {self.dialect}'s dialect: {count}", *(table(cells, left=(0, 1, 4, 5, 6)) if self.updates else [])]
        lines += [f"saved whole: {shortened(path)} {tuple(array.shape)}" for path, array in self.saved.items()]
        lines += [f"bias of the base: {shortened(path)}" for path in self.biases]
        lines += [f"rows of {shortened(path)}: {', '.join(map(str, rows.indices))}" for path, rows in self.tokens.items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
