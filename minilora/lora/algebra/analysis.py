"""Section 7 of the LoRA paper for one update, as plain values and as tables: what `minilora inspect --analysis` prints.

Three questions: which rank does the update really use, how much of its subspace does another one share, and what does it
amplify of the weight. The numbers come from `spectra` and `subspaces`, where they are derived.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from ...tables import table
from .factors import LowRank
from .spectra import spectrum
from .subspaces import amplification, subspace_similarity

__all__ = ["analyse", "analysis_table"]

Array = Any
TOPS = (1, 2, 4, 8)
LARGE = 2048  # the shorter side of a weight from which on its own singular values are estimated: their SVD would take minutes
Rows = Sequence[tuple[Sequence[str], Sequence[Mapping[str, Any]]]]


def analyse(update: LowRank, other: LowRank | None = None, W: Array | None = None,
            sides: Sequence[str] = ("V",)) -> dict[str, Any]:
    """The figures of section 7 of the LoRA paper for one update: the ranks it uses, what it shares, what it amplifies.

    Parameters
    ----------
    update : LowRank
    other : LowRank, optional
        An update of the same layer, of another rank or seed: their subspaces are compared.
    W : array, shape (out, in), optional
        The frozen weight: what the update amplifies of it. Of a weight above 2,048 in both directions, its own values are
        estimated by a randomised range finder.
    sides : sequence of str
        Whose singular vectors are compared, as in `subspace_similarity`.

    Returns
    -------
    dict
        Plain values and arrays of the host: "r", "norm", "rank", "effective_rank", "stable_rank", "rank_99",
        "singular_values"; "similarity", by side "grid", "n" and the two "ranks", or None; "amplification", the fields of
        `Amplification` with "factor", or None. An update that is 0 has neither of the last two.

    Examples
    --------
    >>> import numpy
    >>> D = LowRank(A=numpy.array([[0.0, 6.0]]), B=numpy.array([[0.0], [1.0]]))
    >>> found = analyse(D, D, numpy.diag([4.0, 3.0]))
    >>> found["amplification"]["factor"], found["similarity"]["V"]["grid"].tolist()
    (2.0, [[1.0]])
    """
    used = spectrum(update)
    found: dict[str, Any] = {
        "r": update.r, "norm": used.norm, "rank": used.rank, "effective_rank": used.effective_rank,
        "stable_rank": used.stable_rank, "rank_99": used.rank_at(0.99) if used.rank else 0,
        "singular_values": used.singular_values, "similarity": None, "amplification": None}
    if other is not None and used.rank and spectrum(other).rank:
        compared = {side: subspace_similarity(update, other, side) for side in sides}
        found["similarity"] = {side: {"grid": phi.grid, "n": phi.n, "ranks": [update.r, other.r]}
                               for side, phi in compared.items()}
    if W is not None and used.rank:
        exact = min(update.shape) <= LARGE
        one = amplification(update, W, exact=exact, rng=None if exact else 0)
        found["amplification"] = {**vars(one), "factor": one.factor, "exact": exact}
    return found


def analysis_table(part: str, rows: Rows, labels: Sequence[str] = ("layer",), side: str = "V") -> str:
    """One of the three tables of section 7 as text; a row of it is a mean over what `analyse` gave for several updates.

    Parameters
    ----------
    part : {"ranks", "similarity", "amplification"}
    rows : sequence of (labels, figures)
        What a row is called, in as many cells as there are `labels`, and what `analyse` gave for one or more updates.
        Instead of the chance of random subspaces, max(i, j) / n, a similarity may have a "random" grid of its own.
    labels : sequence of str
    side : str
        Of the similarity.

    Returns
    -------
    str
        "" if nothing of that kind is known.

    Raises
    ------
    ConfigError
        For another part.

    Examples
    --------
    >>> import numpy
    >>> D = LowRank(A=numpy.array([[0.0, 6.0]]), B=numpy.array([[0.0], [1.0]]))
    >>> print(analysis_table("amplification", [(("fc",), [analyse(D, W=numpy.diag([4.0, 3.0]))])]))
    layer  r  ||D||_F  of D  of W  random  factor
    ---------------------------------------------
    fc     1     6.00  3.00  4.00    2.50     2.0
    """
    if part not in PARTS:
        raise ConfigError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    head, cells = PARTS[part]
    lines = []
    for names, figures in rows:
        known = [got for one in figures if (got := _picked(one, part, side))]
        lines += [[*names, *cells(known)]] if known else []
    filled = max((len(line) for line in lines), default=0)
    lines = [[*line, *[""] * (filled - len(line))] for line in lines]  # of lower rank
    return "\n".join(table([[*labels, *head][:filled], *lines], set(range(len(labels))))) if lines else ""


def _picked(one: Mapping[str, Any], part: str, side: str) -> Mapping[str, Any] | None:
    """What a table is about, of what is known of an update; None if that is not known."""
    if part == "ranks":
        return one
    found: Mapping[str, Any] | None = one[part]
    return found.get(side) if found is not None and part == "similarity" else found


def _mean(figures: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(sum(one[key] for one in figures) / len(figures))


def _ranks(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{_mean(figures, 'r'):g}", f"{_mean(figures, 'norm'):.3f}", f"{_mean(figures, 'effective_rank'):.1f}",
            f"{_mean(figures, 'stable_rank'):.1f}", f"{_mean(figures, 'rank_99'):.3g}"]


def _shares(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """The share of the top i directions that lies in all of the other's or, of two equal ranks, in its top i; and by chance."""
    cells = []
    for i in [i for i in TOPS if i <= max(len(one["grid"]) for one in figures)]:
        own, chance = zip(*(_phi(one, i) for one in figures))
        cells.append(f"{sum(own) / len(own):.2f} ({sum(chance) / len(chance):.2f})")
    return cells


def _phi(one: Mapping[str, Any], i: int) -> tuple[float, float]:
    grid, random = one["grid"], one.get("random")
    rows, columns = len(grid), len(grid[0])
    i = min(i, rows)
    j = min(i, columns) if one["ranks"][0] == one["ranks"][1] else columns
    chance = max(i, j) / one["n"] if random is None else random[min(i, len(random)) - 1][min(j, len(random[0])) - 1]
    return float(grid[i - 1][j - 1]), float(chance)


def _amplified(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    along = [f"{_mean(figures, key):.2f}" for key in ("update_norm", "along_update", "along_weight", "along_random")]
    return [f"{_mean(figures, 'r'):g}", *along, f"{_mean(figures, 'factor'):.1f}"]


PARTS: dict[str, tuple[tuple[str, ...], Callable[[Sequence[Mapping[str, Any]]], list[str]]]] = {
    "ranks": (("r", "||D||_F", "effective rank", "stable rank", "99 %"), _ranks),
    "similarity": (tuple(f"top {i}" for i in TOPS), _shares),
    "amplification": (("r", "||D||_F", "of D", "of W", "random", "factor"), _amplified),
}
