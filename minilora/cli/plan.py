"""``minilora plan``: what a config would touch in a model, and what training would cost. No number of the model is read."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..terminal import WIDTH, room, wrapped
from .options import add_json, hidden
from .output import say, show, table
from .terms import OK, printable

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """also: --exclude NAMES, --save NAMES (modules_to_save), --dora, --rslora,
--bias none|all|lora_only, --init true|gaussian|pissa|olora|orthogonal,
--dtype float16|bfloat16|float32|float64 (of all numbers), --optimizer adam|sgd,
--largest batch|rank (what --fit makes large), --head HEAD (as in models.load)

example:
  minilora plan base --rank 8
  minilora plan base --target q_proj,v_proj --dora --tokens 100000 --json
  minilora plan base --rank 8 --length 16 --batch 4 --fit 1MB"""

NOTES = 6  # that are shown
INITS = ("true", "gaussian", "pissa", "olora", "orthogonal")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="folder of a model")
    add("--rank", metavar="N", type=int, default=16, help="of the updates (default: 16)")
    add("--alpha", metavar="X", type=float, default=32.0, help="s is alpha / r (default: 32)")
    add("--target", metavar="NAMES", type=targets, default="all-linear", help="q_proj,v_proj ... (default: all-linear)")
    add("--rows", metavar="N", type=int, default=1, help="tokens of one step, for memory and FLOPs (default: 1)")
    add("--tokens", metavar="N", type=int, help="target tokens of the data: how many for each trained number")
    add("--length", metavar="N", type=int, help="tokens of a row: then whole steps are rehearsed, to the byte")
    add("--batch", metavar="N", type=int, default=1, help="rows of those steps (default: 1)")
    add("--fit", metavar="SIZE", type=memory, help="what fits into so much memory, such as 24GB or 24GiB")
    hidden(parser, "--largest", choices=("batch", "rank"), default="batch")
    hidden(parser, "--optimizer", choices=("adam", "sgd"), default="adam")
    hidden(parser, "--dtype", choices=("float16", "bfloat16", "float32", "float64"))
    hidden(parser, "--exclude", type=targets)
    hidden(parser, "--save", type=targets)
    hidden(parser, "--dora", action="store_true")
    hidden(parser, "--rslora", action="store_true")
    hidden(parser, "--init", choices=INITS, default="true")
    hidden(parser, "--bias", choices=("none", "all", "lora_only"), default="none")
    hidden(parser, "--head")
    add_json(parser)


def memory(text: str) -> int:
    """``24GB``, ``24GiB`` or a number of bytes."""
    from .merge import size

    nbytes = size(text)
    if nbytes < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 24GB or 24GiB")
    return nbytes


def targets(text: str) -> str | list[str]:
    """``all-linear``, or names between commas."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r}: expected names between commas, such as q_proj,v_proj")
    return names[0] if names == ["all-linear"] else names


def run(args: argparse.Namespace) -> int:
    from ..lora import Config, plan, what_fits
    from ..models.checkpoints.outline import outline

    config = Config(r=args.rank, lora_alpha=args.alpha, target_modules=args.target, exclude_modules=args.exclude,
                    modules_to_save=args.save, use_dora=args.dora, use_rslora=args.rslora, bias=args.bias,
                    init_lora_weights=True if args.init == "true" else args.init)
    there = outline(args.model, args.head)
    length = args.length or default_length(there.model)
    rehearsal = (args.batch, length) if args.length is not None else None
    if rehearsal is not None or args.fit is not None:
        say(argparse.Namespace(quiet=False), "rehearsing steps on arrays without numbers: seconds, of a large model more ...")
    made = plan(there.model, config, batch=args.rows if rehearsal is None else args.batch * length, dtype=args.dtype,
                example=rehearsal, optimizer=args.optimizer)
    fits = None if args.fit is None else what_fits(there.model, config, args.fit, length=length, asked=args.largest,
                                                   rows=args.batch, optimizer=args.optimizer)
    notes = [*there.notes, *held_notes(there.file), *too_long(there.model, length)]
    report = {**report_of(args, made, type(there.model).__name__, notes), **steps_of(made, fits)}
    show(args, report, "\n\n".join([text_of(report, str(made._replace(steps=()))), *more_text(made, fits)]))
    return OK


def positions(model: Any) -> int | None:
    """How many tokens a row may have, where the config says it."""
    named = (getattr(model.config, name, None) for name in ("n_positions", "max_position_embeddings"))
    return min((n for n in named if n), default=None)


def default_length(model: Any) -> int:
    """256 tokens, or as many positions as the model has."""
    return min(256, positions(model) or 256)


def too_long(model: Any, length: int) -> list[str]:
    """A rehearsal needs no positions, but `train` cuts rows that have more tokens."""
    most = positions(model)
    return [] if most is None or length <= most else [
        f"rows of {length:,} tokens are planned, and the model has {most:,} positions: train cuts longer rows"]


def steps_of(made: Any, fits: Any) -> dict[str, Any]:
    """What was rehearsed, for the report."""
    steps = [{"name": name, **step._asdict(), "forward": step.forward._asdict(), "backward": step.backward._asdict(),
              "peak": step.peak} for name, step in made.steps]
    fit = None if fits is None else {
        **fits._asdict(), "ways": [way._asdict() for way in fits.ways],
        "first": None if fits.first is None else fits.first.name, "nearest": fits.nearest.name}
    return {"steps": steps, "fit": fit}


def more_text(made: Any, fits: Any) -> list[str]:
    """The tables of what was rehearsed."""
    from ..lora.planning.ways import step_table

    found = ["\n".join(step_table(made.steps))] if made.steps else []
    if fits is not None:
        rows, verdict = str(fits).rsplit("\n\n", 1)
        found += [rows, wrapped(verdict, room() or WIDTH)]
    return found


def held_notes(file: Any) -> list[str]:
    """What weights in 4 bits take."""
    kinds = dict.fromkeys(file.dtypes[name] for name in getattr(file, "states", ()))
    return [f"held in {kind}: {count:,} numbers in {size:,} bytes, {8 * size / max(1, count):.3f} bits a weight: only adapters "
            "can be trained beside them" for kind in kinds for count, size in [file.held(kind)]]


def report_of(args: argparse.Namespace, made: Any, architecture: str, notes: Any) -> dict[str, Any]:
    adapters = [{"path": a.target.path, "kind": a.target.kind, "shape": a.shape, "r": a.target.r,
                 "lora_alpha": a.target.lora_alpha, "s": a.target.scaling, "trained": a.trained} for a in made.adapters]
    return {
        "model": args.model, "architecture": architecture, "rows": made.batch, "adapters": adapters,
        "lora": {**made.lora._asdict(), "memory": made.lora.memory},
        "full": {**made.full._asdict(), "memory": made.full.memory},
        "fewer_trained": made.fewer_trained, "less_memory": made.less_memory, "smaller_checkpoint": made.smaller_checkpoint,
        "tokens_for_each": None if args.tokens is None else args.tokens / made.lora.trained,
        "left_out": [{"path": path, "why": why} for path, why in made.matched.excluded],
        "saved": list(made.matched.saved), "notes": [*notes, *made.notes],
    }


def text_of(report: Mapping[str, Any], printed: str) -> str:
    """The layers as a table that fits a terminal; costs and what they mean as `lora.plan` prints them."""
    from ..lora.adapters.inventory import pattern_of
    from .reports.adapter import short_names

    groups: dict[tuple[Any, ...], int] = {}
    for a in report["adapters"]:
        key = pattern_of(a["path"]), tuple(a["shape"]), a["r"], a["s"], a["trained"]
        groups[key] = groups.get(key, 0) + 1
    names = short_names(list(dict.fromkeys(pattern for pattern, *_ in groups)))
    rows = [(names[pattern], n, " x ".join(map(str, shape)), r, f"{s:.4g}", f"{n * trained:,}")
            for (pattern, shape, r, s, trained), n in groups.items()]
    _, costs, explained = printed.split("\n\n", 2)
    lines = [f"{report['model']}: {report['architecture']}", "",
             *table(("layer", "n", "weight", "r", "s", "trained"), rows).split("\n"), "", *costs.split("\n"), ""]
    facts = [line for line in explained.split("\n") if not line.startswith("note: ")]
    if report["tokens_for_each"] is not None:
        enough = "" if report["tokens_for_each"] >= 1 else ": fewer tokens than trained numbers; a lower rank may do as well"
        facts.append(f"data: {report['tokens_for_each']:.3g} target tokens for each trained number{enough}")
    notes = report["notes"]
    facts += [f"note: {note}" for note in notes[:NOTES]]
    facts += [f"... and {len(notes) - NOTES} notes more: --json has all"] if len(notes) > NOTES else []
    for fact in facts:
        lines.append(wrapped(printable(fact), room() or WIDTH))
    return "\n".join(lines)
