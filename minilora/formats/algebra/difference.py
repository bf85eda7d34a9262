"""How far two adapters are from each other, from their factors: the same function, or by how much another one, and where."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy

from ...errors import FormatError, MiniloraError
from ...lora.algebra.angles import principal_angles
from ...lora.algebra.compress import noise_level
from ...lora.algebra.factors import LowRank, core_of
from ...lora.algebra.spectra import spectrum
from ...shown import shown
from ...tables import table
from ..adapters.saved import SavedAdapter, Update
from ..adapters.scalings import EPSILON
from ..placing.fingerprint import KEY, parsed
from .bases import check_adapters, check_names, moved_start
from .matrices import blocks_of, layer_of, summed
from .outcome import name_cell
from .wholes import parts_of

__all__ = ["Compared", "Difference", "Other", "difference"]

Array = Any


class Compared(NamedTuple):
    """One layer of two adapters.

    Attributes
    ----------
    path, kind : str
    ranks : (int, int)
        Of the factors; 0 where an adapter lacks the layer.
    norms : (float, float)
        ||Da||_F and ||Db||_F.
    distance : float
        ||Da - Db||_F; 0 where it is below float64's own error.
    rounding : float
        The distance that rounding the factors to their dtypes can make, and float64's own error.
    cosine : float
        Of Da and Db as vectors; NaN where one of them is 0.
    angles_in, angles_out : (float, float) or None
        The smallest and the largest principal angle, in degrees, of the spaces that D reads and that it writes.
    reason : str
        What else is different: lengths of DoRA, a bias. "" if nothing is.
    tolerance : float
        The part of ||Da||_F that was said to count as nothing.
    """

    path: str
    kind: str
    ranks: tuple[int, int]
    norms: tuple[float, float]
    distance: float
    rounding: float
    cosine: float
    angles_in: tuple[float, float] | None
    angles_out: tuple[float, float] | None
    reason: str = ""
    tolerance: float = 0.0

    @property
    def relative(self) -> float:
        """distance / ||Da||_F: 0 if both are 0, inf if only Da is."""
        return self.distance / self.norms[0] if self.norms[0] else math.inf if self.distance else 0.0

    @property
    def same(self) -> bool:
        """Whether D is the same but for rounding and the tolerance, and nothing else differs."""
        return self.distance <= max(self.rounding, self.tolerance * self.norms[0]) and not self.reason


class Other(NamedTuple):
    """An array that stands for the base's own: a saved module, a bias, rows of tokens."""

    field: str
    path: str
    same: bool
    text: str


@shown
@dataclass(frozen=True, eq=False)
class Difference:
    """Two adapters side by side. Printed as a table.

    Attributes
    ----------
    rows : tuple of Compared
    others : tuple of Other
    names : (str, str)
    notes : tuple of str
    """

    rows: tuple[Compared, ...]
    others: tuple[Other, ...]
    names: tuple[str, str]
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether both compute the same on the same base, but for rounding."""
        return all(row.same for row in self.rows) and all(other.same for other in self.others)

    @property
    def relative(self) -> float:
        """||Da - Db|| / ||Da|| over all layers."""
        norm, distance = (math.hypot(*values) for values in
                          ([row.norms[0] for row in self.rows], [row.distance for row in self.rows]))
        return distance / norm if norm else math.inf if distance else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report, for JSON."""
        return {"same": self.same, "relative_distance": self.relative, "names": list(self.names),
                "layers": [{**row._asdict(), "relative": row.relative, "same": row.same} for row in self.rows],
                "others": [other._asdict() for other in self.others], "notes": list(self.notes)}

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [("layer", "ranks", "|a|", "|b|", "|a-b|/|a|", "cos", "angles", "")]
        for row in self.rows:
            angles = "/".join("-" if pair is None else f"{pair[1]:.0f}" for pair in (row.angles_in, row.angles_out))
            cells.append((name_cell(row.path), f"{row.ranks[0]},{row.ranks[1]}", *(f"{norm:.3g}" for norm in row.norms),
                          f"{row.relative:.3g}", "-" if math.isnan(row.cosine) else f"{row.cosine:.3f}", angles,
                          "same" if row.same else row.reason or "differs"))
        lines = table(cells, left=(0, 7)) if self.rows else []
        lines += [f"{other.field} {name_cell(other.path)}: {other.text}" for other in self.others]
        apart = sum(not row.same for row in self.rows) + sum(not other.same for other in self.others)
        total = len(self.rows) + len(self.others)
        last = f"the same function, in all {total} parts, up to rounding" if self.same else \
            f"not the same function: {apart} of {total} parts differ, {self.relative:.3g} of |a| in all"
        return "\n".join([f"a: {self.names[0]}", f"b: {self.names[1]}", *lines, last])


def difference(a: SavedAdapter, b: SavedAdapter, *, names: Sequence[str] = ("a", "b"), tolerance: float = 0.0,
               advance: Callable[[], None] | None = None) -> Difference:
    """Compare what two adapters do, layer by layer: D = s B A and not A and B, which are free but for their product.

    Parameters
    ----------
    a, b : SavedAdapter
        Ranks, scalings, dtypes and layers may differ. A layer that one of them lacks is an update of 0 there.
    names : (str, str)
        What to call them.
    tolerance : float
        Take layers with ||Da - Db|| up to this part of ||Da|| as the same, also where rounding does not explain it.
    advance : callable, optional
        Called after each layer.

    Returns
    -------
    Difference
        Two updates are the same if ||Da - Db|| is no more than rounding the numbers of all four factors to their dtypes, once
        each, can make of one D: (2 u + u^2) sum_j |s| |b_j| |a_j| with the unit roundoff u, for each of the two. So an
        adapter and its float16 copy are the same, to what float16 can say. Replaced modules, biases and rows are the same if
        they are so in the coarser dtype of the two.

    Raises
    ------
    FormatError
        If updates of one path are of layers of different shapes, or only one of the adapters belongs to a base that its start
        was taken out of.
    StateError
        If one holds NaN or inf.

    Notes
    -----
    O((out + in) (r_a + r_b)^2) a layer; D is never formed.
    """
    first, second = names
    check_adapters((a, b), (first, second))
    check_names((a, b), (first, second))
    _check_starts(a, b, names)
    rows = []
    for path in sorted({**a.updates, **b.updates}):
        try:
            rows.append(_compared(path, a.updates.get(path), b.updates.get(path))._replace(tolerance=tolerance))
        except MiniloraError as error:
            error.path = error.path or path
            raise
        if advance:
            advance()
    one, two = parts_of(a), parts_of(b)
    others = tuple(_other(field, path, one.get((field, path)), two.get((field, path)), names)
                   for field, path in sorted({**one, **two}))
    return Difference(tuple(rows), others, (first, second), tuple(_bases(a.metadata, b.metadata)))


def _check_starts(a: SavedAdapter, b: SavedAdapter, names: Sequence[str]) -> None:
    kinds = [adapter.config.init_lora_weights if moved_start(adapter) else True for adapter in (a, b)]
    if kinds[0] != kinds[1]:
        raise FormatError("the adapters belong to different bases: " + ", ".join(
            f"{name} to {'the unchanged one' if kind is True else f'one that its start ({kind}) was taken out of'}"
            for name, kind in zip(names, kinds)) + ". formats.load_adapter and formats.save_adapter write such a start out")


def _compared(path: str, a: Update | None, b: Update | None) -> Compared:
    known = a if a is not None else b
    assert known is not None
    if a is not None and b is not None and layer_of(a) != layer_of(b):
        raise FormatError(f"updates of different layers: {a.kind} A {a.A.shape} B {a.B.shape}, and {b.kind} A {b.A.shape} "
                          f"B {b.B.shape}")
    one, two = (None if update is None else blocks_of(update) for update in (a, b))
    both = [blocks for blocks in (one, two) if blocks is not None]
    apart = summed(both, [1.0, -1.0][:len(both)])
    norms = tuple(0.0 if blocks is None else math.hypot(*(block.norm() for block in blocks)) for blocks in (one, two))
    rounding = sum(_rounding(update, blocks) for update, blocks in ((a, one), (b, two)) if update is not None and blocks)
    noise = math.hypot(*(noise_level(block.shape, float(core_of(block, vectors=False)[1])) for block in apart))
    inner = sum(x.inner(y) for x, y in zip(one, two)) if one and two else 0.0
    sizes, distance = norms[0] * norms[1], math.hypot(*(block.norm() for block in apart))
    return Compared(path, known.kind, tuple(0 if u is None else u.r for u in (a, b)), norms,  # type: ignore[arg-type]
                    distance if distance > noise else 0.0, rounding + noise,
                    max(-1.0, min(1.0, inner / sizes)) if sizes else math.nan, _angles(one, two, "V"), _angles(one, two, "U"),
                    _beside(a, b))


def _rounding(update: Update, blocks: Sequence[LowRank]) -> float:
    """How far D moves at most when each number of A and B is rounded to its dtype: |s| sum_j (2 u + u^2) |b_j| |a_j|."""
    u = EPSILON[update.A.dtype.name]
    return (2 * u + u * u) * sum(float(core_of(block, vectors=False)[1]) for block in blocks)


def _angles(one: Sequence[LowRank] | None, two: Sequence[LowRank] | None, of: str) -> tuple[float, float] | None:
    """The smallest and the largest angle in degrees, over the groups; None where an update is 0."""
    found: list[float] = []
    for x, y in zip(one or (), two or ()):
        if spectrum(x).rank and spectrum(y).rank:
            found += numpy.degrees(principal_angles(x, y, of)).tolist()
    return (min(found), max(found)) if found else None


def _beside(a: Update | None, b: Update | None) -> str:
    """What differs beside D: lengths and biases."""
    lengths = [None if u is None else u.magnitude for u in (a, b)]
    biases = [None if u is None or u.bias is None else u.bias.astype("float64") * u.s for u in (a, b)]
    kinds = [u.A.dtype for u in (a, b) if u is not None]
    if (lengths[0] is None) != (lengths[1] is None):
        return "DoRA in one"
    if not _equal(lengths[0], lengths[1], kinds):
        return "lengths differ"
    zero = numpy.zeros_like(next((bias for bias in biases if bias is not None), numpy.zeros(())))
    first, second = (zero if bias is None else bias for bias in biases)
    u = 4 * max(EPSILON[kind.name] for kind in kinds)
    return "" if (abs(first - second) <= u * (abs(first) + abs(second))).all() else "biases differ"


def _equal(a: Array | None, b: Array | None, kinds: Sequence[Any]) -> bool:
    """Whether two arrays are the same in the coarser of these dtypes."""
    if a is None or b is None:
        return a is b
    coarse = max(kinds, key=lambda kind: EPSILON.get(kind.name, 0.0))
    return a.shape == b.shape and bool((a.astype(coarse) == b.astype(coarse)).all())


def _other(field: str, path: str, a: Array | None, b: Array | None, names: Sequence[str]) -> Other:
    if a is None or b is None:
        return Other(field, path, False, f"only in {names[0] if b is None else names[1]}")
    if a.shape != b.shape:
        return Other(field, path, False, f"{a.shape} and {b.shape}")
    if _equal(a, b, (a.dtype, b.dtype)):
        return Other(field, path, True, "the same")
    one, two = (array.astype("float64").reshape(-1) for array in (a, b))
    norm, apart = float(numpy.linalg.norm(one)), float(numpy.linalg.norm(one - two))
    return Other(field, path, False, f"differs, by {apart / norm if norm else math.inf:.3g} of its norm")


def _bases(a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    """What the fingerprints say of the two bases, if it deserves a look."""
    if KEY not in a or KEY not in b:
        return []
    one, two = parsed(a)["tensors"], parsed(b)["tensors"]
    different = [path for path in one.keys() & two.keys() if one[path]["sha256"] != two[path]["sha256"]]
    return [f"the adapters belong to different bases: {len(different)} of {len(one.keys() & two.keys())} weights are others, "
            f"such as {min(different)}"] if different else []
