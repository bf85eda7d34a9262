"""``minilora extract``: a low-rank adapter of what a fine-tuning changed."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from .adapter_files import add_writing, check_out, notes, write
from .combine import DTYPES
from .options import add_json, add_output
from .output import Progress, progress, show
from .terms import OK, UsageError

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """example:
  minilora extract tuned base --rank 4 --energy 0.999 -o found
  minilora diff adapter found --tolerance 0.05"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("tuned", metavar="TUNED", type=Path, help="checkpoint after a full fine-tuning: a folder, a file or an index")
    add("base", metavar="BASE", type=Path, help="the one before")
    add_output(parser)
    add("--rank", type=int, metavar="R", help="at most this rank")
    add("--energy", type=float, metavar="E", help="keep this part of each layer's |D|^2, such as 0.95")
    add("--tolerance", type=float, metavar="T", help="lose at most this part of each layer's |D|, such as 0.1")
    add("--rest", choices=("error", "save", "drop"), default="error", metavar="HOW",
        help="norms, biases, new heads: error (default), save them whole, or drop")
    add("--only", nargs="+", metavar="M", help="just these modules M: names, or their ends behind a dot")
    add("--fast", action="store_true", help="a randomised SVD up to --rank, whose error is measured: for large matrices")
    add("--dtype", choices=DTYPES, metavar="TYPE", help="of A and B (default: float32)")
    add("--embeddings", nargs="+", metavar="M", help="which are tables, where names do not tell")
    add("--transposed", nargs="+", metavar="M", help="which are stored as (in, out), where config.json does not tell")
    add("--groups", action="append", type=groups, default=[], metavar="M=N", help="modules that are convolutions with groups")
    add_writing(parser)
    add_json(parser)


def groups(text: str) -> tuple[str, int]:
    """MODULE=N as a pair."""
    name, _, count = text.rpartition("=")
    if not name or not count.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected MODULE=N, such as conv1=4")
    return name, int(count)


def run(args: argparse.Namespace) -> int:
    if args.rank is None and args.energy is None and args.tolerance is None:
        raise UsageError("missing: --rank, --energy or --tolerance: how far to go")
    check_out(args, [args.tuned, args.base])
    from ..formats.algebra.extract import extract_files

    with contextlib.ExitStack() as stack:
        bars: list[Progress] = []

        def advance(done: int, total: int) -> None:  # how many there are is known when the first is done
            if not bars:
                bars.append(stack.enter_context(progress(args, "matrices", total)))
            bars[0].advance()

        done = extract_files(args.tuned, args.base, args.rank, args.energy, tolerance=args.tolerance, rest=args.rest,
                             only=args.only, exact=not args.fast, dtype=args.dtype,
                             embeddings=args.embeddings, transposed=args.transposed, groups=dict(args.groups), advance=advance)
    said = (*done.notes, *write(args, done.adapter, "peft", {}))
    notes(args, said)
    wholes = len(done.adapter.saved) + len(done.adapter.biases)
    lines = [str(done), *([f"{wholes} arrays saved whole"] if wholes else []),
             f"{'would write' if args.dry_run else 'wrote'} {args.out}"]
    show(args, {**done.to_dict(), "saved": wholes, "notes": said, "out": args.out, "written": not args.dry_run},
         "\n".join(lines))
    return OK
