"""``minilora merge``: adapters into the files of a base. What it does in full: docs/merging_files.md."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from .options import add_json, add_output, weighted
from .output import progress, say, show
from .terms import OK

__all__ = ["EPILOG", "add_adapters", "add_arguments", "add_memory", "add_names", "run"]

EPILOG = """example:
  minilora merge base adapter -o merged
  minilora merge base adapter=0.7 other=0.3 -o mixed --dtype float32"""

UNITS = {"": 1, "B": 1, "KB": 10 ** 3, "MB": 10 ** 6, "GB": 10 ** 9, "KIB": 2 ** 10, "MIB": 2 ** 20, "GIB": 2 ** 30}


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """BASE and ADAPTER[=WEIGHT]..., of verbs that merge."""
    parser.add_argument("base", metavar="BASE", type=Path, help="folder with *.safetensors, one such file, or an index")
    parser.add_argument("adapters", metavar="ADAPTER[=WEIGHT]", type=weighted, nargs="+", help="added up with these weights")


def add_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory", metavar="SIZE", type=size, default=512 << 20,
                        help="bound on the work, such as 2GB (default: 512MiB)")


def add_names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--names", metavar="OLD=NEW", type=renaming, action="append",
                        help="prefix in the adapters' names, and in the base's")
    parser.add_argument("--force", action="store_true", help="take adapters of another base; it is written down")


def size(text: str) -> int:
    """A number of bytes, with a unit or without.

    Examples
    --------
    >>> size("512"), size("300MB"), size("1.5 GiB")
    (512, 300000000, 1610612736)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-zA-Z]*)", text.strip())
    unit = UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 300MB or 2GB")
    return int(float(found[1]) * unit)


def renaming(text: str) -> tuple[str, str]:
    """A prefix and what takes its place."""
    old, sign, new = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r}: expected OLD=NEW, such as thinker.=")
    return old, new


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapters(parser)
    add_output(parser)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), help="convert all weights to it")
    parser.add_argument("--dequantize", choices=("float16", "bfloat16", "float32", "float64"), metavar="DTYPE",
                        help="of a base in 4 bits: merge into its decoded weights, written so")
    parser.add_argument("--requantize", action="store_true", help=argparse.SUPPRESS)  # an error tells, where it is one
    parser.add_argument("--rounding", choices=("nearest", "stochastic"), default="nearest",
                        help="stochastic keeps small updates on average")
    parser.add_argument("--seed", type=int, default=0, help="of stochastic rounding")
    parser.add_argument("--no-patch", action="store_true", help="write no patch: then nothing leads back")
    parser.add_argument("--untie", action="store_true", help="a head of its own where one side of a tied table changes")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT when the new one is whole")
    add_memory(parser)
    add_names(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..formats.merging.checkpoint import open_checkpoint
    from ..formats.merging.merge import merge_files

    say(args, f"{'rehearsing: ' if args.dry_run else ''}merging into {args.base}")
    with progress(args, "tensors", len(open_checkpoint(args.base).state)) as bar:
        report = merge_files(args.base, args.adapters, args.out, memory=args.memory, dtype=args.dtype,
                             dequantize=args.dequantize, requantize=args.requantize, rounding=args.rounding, seed=args.seed,
                             patch=not args.no_patch, force=args.force, untie=args.untie,
                             overwrite=args.overwrite, mapping=dict(args.names) if args.names else None,
                             dry_run=args.dry_run, progress=lambda name, nbytes: bar.advance())
    end = "nothing was written: this was a rehearsal" if args.dry_run else f"written: {args.out}"
    show(args, {"written": not args.dry_run, **report.as_dict()}, f"{report}\n{end}")
    return OK
