"""``minilora resize``: an adapter of lower ranks."""

from __future__ import annotations

import argparse
from pathlib import Path

from .adapter_files import add_reading, add_writing, check_out, notes, read, write
from .combine import DTYPES
from .options import add_json, add_output
from .output import progress, show
from .terms import OK, UsageError

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """example:
  minilora resize adapter --rank 2 -o small
  minilora resize adapter --energy 0.95 -o smaller --json
Each layer's D is cut to its largest singular values: no update of that rank is
nearer. A layer whose rank would not fall keeps its bits.
docs/adapter_algebra.md"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", type=Path)
    add_output(parser)
    add("--rank", type=int, metavar="R", help="at most this rank")
    add("--energy", type=float, metavar="E", help="keep this part of each layer's |D|^2, such as 0.95")
    add("--tolerance", type=float, metavar="T", help="lose at most this part of each layer's |D|, such as 0.1")
    add("--dtype", choices=DTYPES, metavar="TYPE", help="of A and B, such as float16 (default: as they are)")
    add_reading(parser)
    add_writing(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.rank is None and args.energy is None and args.tolerance is None:
        raise UsageError("missing: --rank, --energy or --tolerance: how far to go")
    check_out(args, [args.adapter])
    from ..formats.algebra.resize import resize

    adapter = read(args, args.adapter)
    with progress(args, "layers", len(adapter.updates)) as bar:
        done = resize(adapter, args.rank, args.energy, tolerance=args.tolerance,
                      dtype=args.dtype, name=str(args.adapter),
                      advance=bar.advance)
    said = (*done.notes, *write(args, done.adapter, "peft", {}))
    notes(args, said[len(done.notes):])
    show(args, {**done.to_dict(), "notes": said, "out": args.out, "written": not args.dry_run},
         f"{done}\n{'would write' if args.dry_run else 'wrote'} {args.out}")
    return OK
