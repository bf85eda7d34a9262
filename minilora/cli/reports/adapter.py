"""What an adapter file is: a row for each layer, with the spectrum of its update from the factors, and the whole of it.

No (out, in) matrix is made: a spectrum costs O((out + in) r^2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from ...errors import FormatError
from ...formats.adapters.saved import SavedAdapter, Update
from ...formats.placing.fingerprint import KEY, parsed
from ...lora.adapters.inventory import pattern_of
from ...lora.algebra.factors import LowRank
from ...lora.algebra.spectra import spectrum
from ...terminal import WIDTH, room, wrapped
from ..output import bytes_text, table
from ..terms import printable

__all__ = ["adapter_report", "adapter_text", "as_low_rank"]

SHOWN = 72  # characters of a value of the metadata
FEW = 3  # names in a note


def as_low_rank(update: Update) -> LowRank:
    """D = s B A of an update of any kind as two matrices in float64; of a convolution with groups as one whose B has blocks."""
    A = numpy.asarray(update.A, "float64").reshape(len(update.A), -1)
    B = numpy.asarray(update.B, "float64").reshape(len(update.B), -1)
    groups = A.shape[0] // B.shape[1]
    if groups > 1:
        out, r = len(B) // groups, B.shape[1]
        blocks = numpy.zeros((len(B), len(A)))
        for g in range(groups):
            blocks[g * out:(g + 1) * out, g * r:(g + 1) * r] = B[g * out:(g + 1) * out]
        B = blocks
    return LowRank(A, B, update.s)


def layer_row(path: str, update: Update, rslora: bool) -> dict[str, Any]:
    """One layer. Without spectrum where its numbers are not finite."""
    D = as_low_rank(update)
    alpha = update.s * (math.sqrt(update.r) if rslora else update.r)
    row: dict[str, Any] = {
        "path": path, "kind": update.kind, "shape": list(D.shape), "r": update.r, "s": update.s, "lora_alpha": alpha,
        "dtype": update.A.dtype.name, "norm_A": float(numpy.linalg.norm(D.A)), "norm_B": float(numpy.linalg.norm(D.B)),
        "untrained": not update.B.any(), "dora": update.magnitude is not None, "bias": update.bias is not None,
        "norm_D": None, "singular_values": None, "rank": None, "effective_rank": None, "stable_rank": None, "rank_99": None}
    if numpy.isfinite(D.A).all() and numpy.isfinite(D.B).all():
        found = spectrum(D)
        row.update(norm_D=found.norm, singular_values=found.singular_values.tolist(), rank=found.rank,
                   effective_rank=found.effective_rank, stable_rank=found.stable_rank,
                   rank_99=found.rank_at(0.99) if found.rank else 0)
    return row


def adapter_report(path: Any, adapter: SavedAdapter) -> dict[str, Any]:
    """All that is said of an adapter."""
    config = adapter.config
    layers = [layer_row(name, update, config.use_rslora) for name, update in adapter.updates.items()]
    arrays = [array for u in adapter.updates.values() for array in (u.A, u.B, u.bias, u.magnitude) if array is not None]
    arrays += [*adapter.saved.values(), *adapter.biases.values(), *(rows.rows for rows in adapter.tokens.values())]
    return {
        "kind": "adapter", "path": str(path), "dialect": adapter.dialect, "base": config.base_model_name_or_path,
        "task_type": config.task_type, "rule": "alpha / sqrt(r)" if config.use_rslora else "alpha / r",
        "start": config.init_lora_weights, "ranks": sorted({row["r"] for row in layers}),
        "scalings": sorted({row["s"] for row in layers}), "numbers": sum(array.size for array in arrays),
        "bytes": sum(array.nbytes for array in arrays), "dtypes": sorted({array.dtype.name for array in arrays}),
        "layers": layers,
        "saved": [_whole(name, array) for name, array in adapter.saved.items()],
        "biases": [_whole(name, array) for name, array in adapter.biases.items()],
        "tokens": {name: list(rows.indices) for name, rows in adapter.tokens.items()},
        "fingerprint": _fingerprint(adapter.metadata),
        "metadata": dict(adapter.metadata), "notes": [*_notes(adapter, layers), *adapter.notes],
    }


def _whole(name: str, array: Any) -> dict[str, Any]:
    return {"name": name, "shape": list(array.shape), "dtype": array.dtype.name}


def _fingerprint(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    if KEY not in metadata:
        return None
    try:
        said = parsed(metadata)
    except FormatError as error:
        return {"problem": str(error)}
    return {"base": said["base"], "weights": len(said["tensors"]), "forced": said["forced"] or None}


def _notes(adapter: SavedAdapter, layers: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = []
    zero = [row["path"] for row in layers if row["untrained"]]
    if zero and len(zero) == len(layers):
        notes.append("lora_B is all zero: untrained")
    elif zero:
        notes.append(f"lora_B is all zero in {len(zero)} of {len(layers)} layers: {few(zero)}")
    if adapter.config.init_lora_weights in ("pissa", "olora"):
        notes.append(f"it began as {adapter.config.init_lora_weights}, which takes its start out of the weight: the update is "
                     "s B A less the start, which loading computes from the base; what is told here is of s B A")
    larger = [row["path"] for row in layers if row["r"] > min(row["shape"])]
    if larger:
        notes.append(f"the rank is larger than the matrix in {few(larger)}: resize loses nothing")
    fingerprint = _fingerprint(adapter.metadata)
    if fingerprint and (fingerprint.get("problem") or fingerprint.get("forced")):
        notes.append(str(fingerprint.get("problem") or fingerprint["forced"]))
    return notes


def few(names: Sequence[str]) -> str:
    """The first names, and how many more."""
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(map(printable, names[:FEW])) + more


# -- the same as text ---------------------------------------------------------------------------------------------------


def adapter_text(report: Mapping[str, Any], each: bool) -> str:
    """The report for people: layers by kind, or each of them."""
    layers = report["layers"]
    facts = [("adapter", f"{report['path']} ({report['dialect']})"), ("base", report["base"] or "not said"),
             ("numbers", f"{report['numbers']:,} in {len(layers)} layer{'' if len(layers) == 1 else 's'}, "
                         f"{bytes_text(report['bytes'])}, {' and '.join(report['dtypes'])}"),
             ("scaling", f"s = {report['rule']}: r {_several(report['ranks'])}, s {_several(report['scalings'])}"),
             ("start", str(report["start"]).lower() if isinstance(report["start"], bool) else report["start"])]
    if report["fingerprint"] and "base" in report["fingerprint"]:
        facts.append(("of a base", f"{report['fingerprint']['base'][:16]}... ({report['fingerprint']['weights']} weights)"))
    lines = facts_lines(facts)
    lines += ["", *(_each(layers) if each else _by_kind(layers)), ""] if layers else [""]
    lines += [f"saved whole: {printable(s['name'])} {tuple(s['shape'])}" for s in report["saved"]]
    lines += [f"bias of the base: {few([b['name'] for b in report['biases']])}"] if report["biases"] else []
    lines += [f"rows of {printable(name)}: {', '.join(map(str, rows[:12]))}{' ...' if len(rows) > 12 else ''}"
              for name, rows in report["tokens"].items()]
    lines += metadata_lines(report["metadata"])
    return "\n".join([*lines, *(f"note: {printable(note)}" for note in report["notes"])]).rstrip()


def facts_lines(facts: Sequence[tuple[str, object]]) -> list[str]:
    """Names and values below each other."""
    wide = max(len(name) for name, _ in facts)
    return [wrapped(f"{name:<{wide}}  {printable(str(value))}", room() or WIDTH) for name, value in facts]


def metadata_lines(metadata: Mapping[str, str]) -> list[str]:
    """Metadata of a file, one line a key; what is long, cut."""
    lines = []
    for key, value in metadata.items():
        if key != KEY:
            shown = value if len(value) <= SHOWN else f"{value[:SHOWN]}... ({len(value):,} characters)"
            lines.append(f"metadata {printable(key[:SHOWN])}: {printable(shown)}")
    return lines


def _several(values: Sequence[float]) -> str:
    if len(values) > 4:
        return f"{values[0]:.4g} to {values[-1]:.4g}"
    return ", ".join(f"{value:.4g}" for value in values)


HEAD = ("layer", "r", "s", "|A|", "|B|", "|D|", "eff. rank", "99 %")


def _each(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [(row["path"], row["r"], f"{row['s']:.4g}", *_figures([row])) for row in layers]
    return [*table(HEAD, rows).split("\n"), *explained()]


def _by_kind(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each group of corresponding layers of one shape and rank, with means."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in layers:
        groups.setdefault((pattern_of(row["path"]), tuple(row["shape"]), row["r"], row["s"]), []).append(row)
    names = short_names([pattern for pattern, *_ in groups])
    rows = [(names[pattern], len(rows), f"{shape[0]} x {shape[1]}", r, f"{s:.4g}", *_figures(rows))
            for (pattern, shape, r, s), rows in groups.items()]
    head = (HEAD[0], "n", "D", *HEAD[1:])
    return [*table(head, rows).split("\n"), *explained("means over n layers; ")]


def _figures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    def mean(name: str, form: str) -> str:
        values = [row[name] for row in rows if row[name] is not None]
        return f"{sum(values) / len(values):{form}}" if values else "-"

    return [mean("norm_A", "#.3g"), mean("norm_B", "#.3g"), mean("norm_D", "#.3g"), mean("effective_rank", ".2f"),
            mean("rank_99", ".3g")]


def explained(before: str = "") -> list[str]:
    """What the last columns mean."""
    return [f"{before}D = s B A; 99 %: singular values that hold 99 % of |D|^2"]


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The shortest ends by which paths can be told apart, cut at dots."""
    found = {}
    for path in paths:
        parts = path.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        others = [f".{other}" for other in paths if other != path]
        found[path] = next((end for end in ends if not any(other.endswith(f".{end}") for other in others)), path)
    return found
