"""What a base, or any file of tensors, is: from headers and config alone, unless its numbers are asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import MiniloraError
from ...formats.adapters.reading import nonfinite
from ...lora.adapters.inventory import pattern_of
from ..output import bytes_text, table
from ..terms import printable
from .adapter import facts_lines, metadata_lines

__all__ = ["base_report", "is_base", "tensors_report", "whole_text"]

# Fields of config.json that are sizes, by the names of all families.
SIZES = ("vocab_size", "hidden_size", "n_embd", "dim", "num_hidden_layers", "n_layer", "n_layers", "num_attention_heads",
         "n_head", "n_heads", "num_key_value_heads", "head_dim", "intermediate_size", "n_inner", "hidden_dim",
         "max_position_embeddings", "n_positions", "type_vocab_size", "num_labels")
MOST = 40  # rows of a table that nobody asked to see whole


def is_base(path: Path) -> bool:
    """Whether a path is a folder of a whole model."""
    return (path / "modules.json").is_file() or \
        ((path / "config.json").is_file() and not (path / "adapter_config.json").is_file())


def base_report(folder: Path, numbers: bool) -> dict[str, Any]:
    """All that is said of the folder of a model. What is wrong with it is said too, where its tensors can be read."""
    from ...models.checkpoints.fields import read_fields
    from ...models.checkpoints.reading import open_weights
    from ...models.checkpoints.sentences import read_pooling

    inner = read_pooling(folder).folder if (folder / "modules.json").is_file() else folder
    fields = read_fields(inner)
    state: Any = open_weights(inner)
    problem, notes = None, list[str]()
    try:
        from ...models.checkpoints.outline import outline

        made = outline(folder)
        state, notes = made.file, [*made.notes]
    except MiniloraError as error:
        problem = str(error)
    files = sorted(p.name for p in folder.iterdir() if p.is_file())
    return {
        "kind": "base", "path": str(folder), "model_type": fields.get("model_type"),
        "architectures": fields.get("architectures") or [], "sizes": {k: fields[k] for k in SIZES if fields.get(k) is not None},
        "dtype": fields.get("dtype"), "tied": _tied(fields, state), "readable": problem is None, "problem": problem,
        "sentence_encoder": (folder / "modules.json").is_file(), "tokenizer": "tokenizer.json" in files,
        "files": files, **_tensors(state, numbers), "notes": notes,
    }


def _tied(fields: Mapping[str, Any], state: Mapping[str, Any]) -> bool | None:
    """Whether the table of tokens makes the logits; None for a model without."""
    said = fields.get("tie_word_embeddings")
    heads = any(name.endswith("lm_head.weight") for name in state)
    if not any("CausalLM" in str(a) or "LMHead" in str(a) for a in fields.get("architectures") or []):
        return None
    return bool(said) if said is not None else not heads


def tensors_report(path: Path, state: Any, numbers: bool) -> dict[str, Any]:
    """All that is said of a file of tensors that is neither."""
    return {"kind": "tensors", "path": str(path), **_tensors(state, numbers), "notes": []}


def _tensors(state: Any, numbers: bool) -> dict[str, Any]:
    from ...formats.tensors.dtypes import DTYPES

    sizes: dict[str, int] = {}
    for name, shape in state.shapes.items():
        sizes[state.dtypes[name]] = sizes.get(state.dtypes[name], 0) + math.prod(shape)
    four = [kind for kind in sizes if kind not in DTYPES]  # weights in 4 bits, with what belongs to them
    size = sum(n * DTYPES[kind].bits // 8 for kind, n in sizes.items() if kind in DTYPES) + \
        (sum(map(state.size, state.states)) if four else 0)
    return {
        "tensors": [{"name": name, "shape": list(shape), "dtype": state.dtypes[name]} for name, shape in state.shapes.items()],
        "numbers": sum(sizes.values()), "bytes": size, "dtypes": sizes, "bits": {kind: bits_of(state, kind) for kind in four},
        "metadata": dict(state.metadata), "nonfinite": nonfinite(state.file if four else state) if numbers else None,
    }


def bits_of(state: Any, kind: str) -> float:
    """Bits a weight of those in this kind."""
    count, held = state.held(kind)
    return float(8 * held / max(1, count))


def whole_text(report: Mapping[str, Any], each: bool) -> str:
    """The report for people: tensors by kind, or each of them."""
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in report["dtypes"].items()) or "none"
    facts: list[tuple[str, object]] = [(report["kind"], report["path"])]
    if report["kind"] == "base":
        what = ", ".join(map(str, report["architectures"])) or "architecture not said"
        facts += [("model", f"{report['model_type']}: {what}{', a sentence encoder' * report['sentence_encoder']}"),
                  ("sizes", ", ".join(f"{name} {value}" for name, value in report["sizes"].items())),
                  ("read here", "yes" if report["readable"] else "no"),
                  ("tokenizer", "tokenizer.json" if report["tokenizer"] else "no tokenizer.json")]
        if report["tied"] is not None:
            facts.append(("output head", "tied to the table of tokens" if report["tied"] else "of its own"))
    facts.append(("numbers", f"{report['numbers']:,} in {len(report['tensors'])} tensors, {bytes_text(report['bytes'])}: "
                             f"{kinds}"))
    facts += [("in 4 bits", f"{kind}: {bits:.3f} bits a weight, its scales counted") for kind, bits in report["bits"].items()]
    if report["kind"] == "base":
        files = report["files"]
        facts.append(("files", f"{', '.join(files[:6])}{f' and {len(files) - 6} more' if len(files) > 6 else ''}"))
    lines = facts_lines(facts)
    lines += ["", *_table(report["tensors"], each), ""] if report["tensors"] else []
    lines += metadata_lines(report["metadata"])
    if report["nonfinite"] is not None:
        lines += [f"not finite: {printable(name)}: {text}" for name, text in report["nonfinite"].items()] or \
            ["all numbers finite"]
    if report.get("problem"):
        lines += [f"not read here: {report['problem']}"]
    return "\n".join([*lines, *(f"note: {printable(note)}" for note in report["notes"])]).rstrip()


def _table(tensors: list[dict[str, Any]], each: bool) -> list[str]:
    groups: dict[tuple[Any, ...], int] = {}
    for tensor in tensors:
        name = tensor["name"] if each else pattern_of(tensor["name"])
        key = name, tuple(tensor["shape"]), tensor["dtype"]
        groups[key] = groups.get(key, 0) + 1
    rows = [(name, n, " x ".join(map(str, shape)) or "one number", kind, f"{n * math.prod(shape):,}")
            for (name, shape, kind), n in groups.items()]
    rest = [] if each or len(rows) <= MOST else [f"... and {len(rows) - MOST} more rows: --layers shows all"]
    return [*table(("tensor", "n", "shape", "dtype", "numbers"), rows if each else rows[:MOST], (0, 3)).split("\n"), *rest]
