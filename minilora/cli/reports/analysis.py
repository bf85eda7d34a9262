"""Section 7 of the LoRA paper for an adapter file: `lora.analyse` for each layer, and its tables."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from ...errors import FormatError
from ...formats.adapters.saved import SavedAdapter
from ...lora.adapters.inventory import pattern_of
from ...lora.algebra.analysis import analyse, analysis_table
from ...lora.algebra.factors import LowRank
from ..output import progress
from ..terms import printable
from .adapter import as_low_rank, few, short_names

__all__ = ["analysis_report", "analysis_text"]

WORDS = {
    "ranks": "Which rank is used? Effective: e to the entropy of the singular values;\n"
             "stable: |D|^2 over the largest one squared; 99 %: values with 99 % of |D|^2",
    "similarity": "The same directions? What share of the top i inputs that D reads lies in all\n"
                  "that the other reads (of equal ranks: in its top i); in brackets: by chance",
    "amplification": "What is amplified? ||U^T W V||_F with the singular vectors of D, of W itself\n"
                     "and random ones; factor: ||D||_F over the first",
}


def analysis_report(args: argparse.Namespace, adapter: SavedAdapter) -> dict[str, Any]:
    """Of every layer with finite numbers the figures; against another adapter and a base, if they are given."""
    updates = {path: as_low_rank(update) for path, update in adapter.updates.items()}
    finite = {path: D for path, D in updates.items() if numpy.isfinite(D.A).all() and numpy.isfinite(D.B).all()}
    others: dict[str, LowRank] = {}
    weights: Iterable[tuple[str, numpy.ndarray]] = ()
    notes: list[str] = []
    if args.against is not None:
        others, notes = _others(args.against, finite)
    if args.base is not None:
        from ...formats.merging.weights import weights_beside

        weights, more = weights_beside(adapter, args.base, str(args.path))
        notes += more
    found = {path: dict[str, Any]() for path in finite}
    with progress(args, "layers", len(finite)) as bar:
        for path, W in weights:
            if path in finite and W.shape == finite[path].shape:
                found[path] = analyse(finite[path], others.get(path), W)
                bar.advance()
        for path in [path for path, figures in found.items() if not figures]:
            found[path] = analyse(finite[path], others.get(path))
            bar.advance()
    notes += _notes(adapter, updates, found, args.base)
    rows = [{"path": path, **{key: value for key, value in figures.items() if key != "singular_values"}}
            for path, figures in found.items()]
    return {"against": args.against, "base": args.base, "layers": rows, "notes": notes}


def _others(path: Path, own: Mapping[str, LowRank]) -> tuple[dict[str, LowRank], list[str]]:
    """The updates of another adapter that are for the same layers."""
    from ...formats.adapters.reading import read_adapter

    other = {name: as_low_rank(update) for name, update in read_adapter(path).updates.items()}
    shared = [name for name in own if name in other]
    if not shared:
        raise FormatError(f"--against {path}: the adapters have no layer in common: {few(list(own))} here, "
                          f"{few(list(other))} there. If they are of one model, give both one set of names: minilora convert "
                          "--names OLD=NEW")
    odd = [name for name in shared if own[name].shape != other[name].shape]
    if odd:
        raise FormatError(f"--against {path}: {odd[0]} is {own[odd[0]].shape} here and {other[odd[0]].shape} there: is it an "
                          "adapter of another model?")
    left = sorted(own.keys() ^ other.keys())
    return {name: other[name] for name in shared}, [f"in one of the two adapters only: {few(left)}"] if left else []


def _notes(adapter: SavedAdapter, updates: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]], base: Any) -> list[str]:
    notes = []
    bad = [path for path in updates if path not in found]
    if bad:
        notes.append(f"left out, since their numbers are not finite: {few(bad)}")
    zero = [path for path, figures in found.items() if not figures["rank"]]
    if zero:
        notes.append(f"an update that is 0 has no directions: {few(zero)}")
    lengths = [path for path, update in adapter.updates.items() if update.magnitude is not None]
    if lengths:
        notes.append(f"DoRA in {few(lengths)}: this is of D = s B A, and not of the change of lengths beside it")
    lacking = [path for path, figures in found.items() if figures["rank"] and figures["amplification"] is None]
    if base is not None and lacking:
        notes.append(f"{base} has no weight of that shape for {few(lacking)}")
    if any(figures["amplification"] and not figures["amplification"]["exact"] for figures in found.values()):
        notes.append("the values of W itself are estimated: of large weights, by a randomised range finder")
    return notes


def analysis_text(report: Mapping[str, Any], each: bool) -> str:
    """The tables, by kind of layer or layer by layer."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in report["layers"]:
        groups.setdefault(row["path"] if each else pattern_of(row["path"]), []).append(row)
    names = {name: name for name in groups} if each else short_names(list(groups))
    rows = [((printable(names[name]), *(() if each else (str(len(figures)),))), figures) for name, figures in groups.items()]
    labels = ("layer",) if each else ("layer", "n")
    lines: list[str] = []
    for part, words in WORDS.items():
        if text := analysis_table(part, rows, labels):
            lines += [words, text, ""]
    return "\n".join([*lines, *_said(report["notes"])]).rstrip()


def _said(notes: Sequence[str]) -> list[str]:
    return [f"note: {printable(note)}" for note in notes]
