"""``minilora check``: does an adapter fit a base, and which programs can read it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..terminal import WIDTH, room, wrapped
from .options import add_json
from .output import show
from .terms import CHECK_FAILED, OK, printable

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """example:
  minilora check adapter base
  minilora check adapter --for peft --for vllm
exit code 3: it does not fit BASE, or a program of --for cannot read it as it is"""

MOST = 12  # lines of problems that are shown
INDENT = " " * 11
NAMES = ("peft", "vllm", "sglang", "mlx", "diffusers", "llama.cpp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="a folder or file in any dialect")
    parser.add_argument("base", metavar="BASE", type=Path, nargs="?", help="folder or safetensors file of the model it is for")
    parser.add_argument("--for", dest="readers", metavar="PROGRAM", choices=NAMES, action="append",
                        help=f"must read it: {', '.join(NAMES)}; may be given again")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..formats import read_adapter
    from .reports.readers import READERS, Asked, verdict

    fit, saved, config = None, None, None
    if args.base is not None:
        fit, saved, config = fits(args.adapter, args.base)
    saved = read_adapter(args.adapter) if saved is None else saved
    asked = Asked(saved, args.adapter, args.base, config)
    verdicts = [verdict(reader, asked) for reader in dict.fromkeys(args.readers or READERS)]
    report = {"adapter": args.adapter, "base": args.base, "dialect": saved.dialect, "layers": len(saved.updates), "fit": fit,
              "readers": [found._asdict() for found in verdicts], "notes": list(saved.notes)}
    show(args, report, text_of(report))
    wrong = (fit is not None and not fit["fits"]) or (args.readers and any(found.reads != "yes" for found in verdicts))
    return CHECK_FAILED if wrong else OK


def fits(adapter: Path, base: Path) -> tuple[dict[str, Any], Any, Mapping[str, Any] | None]:
    """What fits and what does not; the adapter, read; and the base's config. Of the base, what is adapted is read, for the
    fingerprint, in blocks."""
    from ..formats.merging.checkpoint import open_checkpoint
    from ..formats.merging.fitting import Fitting
    from ..formats.merging.work import given_adapters

    checkpoint = open_checkpoint(base)
    given = given_adapters([adapter], checkpoint)
    fitting = Fitting(checkpoint, given, untie=True)
    fitting.fit()
    words = next(iter(fitting.fingerprints.values()), None)
    return ({"fits": not fitting.problems, "problems": fitting.problems, "notes": fitting.notes, "fingerprint": words,
             "tensors": sorted(fitting.sites)}, given[0].saved, checkpoint.config)


def text_of(report: Mapping[str, Any]) -> str:
    lines = [f"{report['adapter']}: {report['dialect']}, {report['layers']} layer{'' if report['layers'] == 1 else 's'}"]
    lines += [f"note: {printable(note)}" for note in report["notes"]]
    fit = report["fit"]
    if fit is not None:
        lines += ["", f"fits {report['base']}: {'yes' if fit['fits'] else 'NO'}"]
        lines += [f"  fingerprint: {fit['fingerprint']}"] if fit["fingerprint"] and fit["fits"] else []
        lines += [f"  {line}" for line in first_of(fit["problems"])]
        lines += [f"  note: {note}" for note in fit["notes"]]
        if any("another base" in problem for problem in fit["problems"]):
            lines += ["  to merge all the same, which is written down: minilora merge ... --force"]
    if report["readers"]:
        lines.append("")
        lines += [line for found in report["readers"] for line in reader_lines(found)]
    return "\n".join(lines)


def first_of(problems: Sequence[str]) -> list[str]:
    """The lines of problems; of very many, the first."""
    lines = [line for problem in problems for line in problem.split("\n")]
    more = len(lines) - MOST
    return lines if more <= 0 else [*lines[:MOST], f"... and {more} lines more: --json has all"]


def reader_lines(found: Mapping[str, Any]) -> list[str]:
    """One program: the verdict, why, and the line to type."""
    words = {"yes": "reads it", "converted": "reads it after", "no": "cannot read it"}[found["reads"]]
    line = found["line"]
    lines = [f"{found['reader']:<9}  {words}{f':  {line}' if line and found['reads'] == 'converted' else ''}"]
    below = first_of(found["problems"]) if found["reads"] == "no" else []
    below += [f"note: {note}" for note in found["notes"]]
    for text in below:
        lines.append(wrapped(f"{INDENT}{printable(text)}", room() or WIDTH))
    return lines + ([f"{INDENT}instead:  {line}"] if line and found["reads"] == "no" else [])
