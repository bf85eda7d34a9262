"""``minilora combine``: several adapters into one."""

from __future__ import annotations

import argparse

from .adapter_files import add_reading, add_writing, check_out, notes, read, write
from .options import add_json, add_output, weighted
from .output import progress, show
from .terms import OK, UsageError

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """example:
  minilora combine adapter=0.7 other=0.3 -o both
  minilora combine adapter other=-1 --how ties --density 0.4 --rank 4 -o mixed
D = s B A is combined, never A and B apart. sum and cat are exact, sum at the
least rank. docs/adapter_algebra.md"""
METHODS = ("cat", "sum", "svd", "ties", "dare", "dare_ties")
DTYPES = ("float16", "bfloat16", "float32", "float64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("adapters", metavar="ADAPTER[=WEIGHT]", nargs="+", type=weighted, help="weights may be negative and 0; 1 by default")
    add_output(parser)
    add("--how", choices=METHODS, default="sum", metavar="HOW", help="sum (default), cat, svd, ties, dare or dare_ties")
    add("--rank", type=int, metavar="R", help="svd, ties, dare: at most this rank (default: the largest)")
    add("--energy", type=float, metavar="E", help="svd: keep this part of each layer's |D|^2, such as 0.99")
    add("--density", type=float, metavar="P", help="ties (0.2), dare (0.5): the part of D that stays")
    add("--majority", choices=("total", "frequency"), default="total", metavar="SIGN",
        help="ties: whose sign is elected, total (default) or frequency")
    add("--seed", type=int, metavar="N", help="dare, --fast: draws (default: 0)")
    add("--fast", action="store_true", help="ties, dare: a randomised SVD")
    add("--saved", metavar="HOW", default="same", help="whole modules: same (default), average, drop, or of which one, 1 ..")
    add("--dtype", choices=DTYPES, metavar="TYPE", help="of A and B, such as float16 (default: the widest)")
    add("--force", action="store_true", help="even if the adapters belong to different bases")
    add_reading(parser)
    add_writing(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    paths = [path for path, _ in args.adapters]
    check_out(args, paths)
    saved = args.saved if not args.saved.isdigit() else int(args.saved) - 1
    if isinstance(saved, int) and not 0 <= saved < len(paths):
        raise UsageError(f"--saved {args.saved}: there are adapters 1 to {len(paths)}")
    from ..formats.algebra.combine import combine

    adapters = [read(args, path) for path in paths]
    drawn = args.how.startswith("dare") or args.fast
    with progress(args, "layers", len(set().union(*(adapter.updates for adapter in adapters)))) as bar:
        done = combine(adapters, [weight for _, weight in args.adapters], args.how, rank=args.rank, energy=args.energy,
                       density=args.density, seed=0 if drawn and args.seed is None else args.seed,
                       majority_sign_method=args.majority, exact=not args.fast, saved=saved,
                       dtype=args.dtype, force=args.force,
                       names=list(map(str, paths)), advance=bar.advance)
    said = (*done.notes, *write(args, done.adapter, "peft", {}))
    notes(args, said)
    show(args, {**done.to_dict(), "notes": said, "out": args.out, "written": not args.dry_run},
         f"{done}\n{'would write' if args.dry_run else 'wrote'} {args.out}")
    return OK
