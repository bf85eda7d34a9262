"""``minilora diff``: whether two adapters are the same function, and how far apart they are."""

from __future__ import annotations

import argparse
from pathlib import Path

from .adapter_files import add_reading, notes, read
from .merge import renaming
from .options import add_json
from .output import progress, show
from .terms import CHECK_FAILED, OK, UsageError

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """example:
  minilora resize adapter --rank 64 -o same
  minilora diff adapter same
|a|, |b|: sizes of D = s B A; angles: the largest between the spaces that both
read / write, in degrees. Exit code: 0 the same function up to rounding; 3 not
the same; 1 they could not be compared"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("a", metavar="A", type=Path)
    add("b", metavar="B", type=Path, help="adapters in any dialect")
    add("--tolerance", type=float, metavar="T", help="take layers with |a-b| up to T |a| as the same")
    add("--names", metavar="OLD=NEW", action="append", default=[], type=renaming,
        help="what paths of B begin with, and what they begin with in A: model.=transformer.")
    add_reading(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.tolerance is not None and not args.tolerance >= 0:
        raise UsageError(f"--tolerance {args.tolerance}: expected a number that is not below 0")
    from ..formats.algebra.convert import renamed
    from ..formats.algebra.difference import difference

    a, b = read(args, args.a), renamed(read(args, args.b), dict(args.names) or None)
    with progress(args, "layers", len({**a.updates, **b.updates})) as bar:
        found = difference(a, b, names=(str(args.a), str(args.b)), tolerance=args.tolerance or 0.0, advance=bar.advance)
    notes(args, found.notes)
    show(args, found.to_dict(), str(found))
    return OK if found.same else CHECK_FAILED
