"""``minilora verify``: whether a merged folder is what a base and adapters give."""

from __future__ import annotations

import argparse
from pathlib import Path

from .merge import add_adapters, add_memory, add_names
from .options import add_json
from .output import progress, say, show
from .terms import CHECK_FAILED, OK

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """example:
  minilora merge base adapter -o merged
  minilora verify merged base adapter

Exit code 3 if a tensor differs in a bit, is missing, or should not be there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("merged", metavar="MERGED", type=Path, help="folder that `minilora merge` wrote")
    add_adapters(parser)
    parser.add_argument("--rounding", choices=("nearest", "stochastic"), help="default: as the record in MERGED says")
    parser.add_argument("--seed", type=int, help="of stochastic rounding; default: as the record says")
    add_memory(parser)
    add_names(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..formats.merging.checkpoint import open_checkpoint
    from ..formats.merging.verify import verify_files

    say(args, f"computing {args.merged} again")
    with progress(args, "tensors", len(open_checkpoint(args.base).state)) as bar:
        report = verify_files(args.merged, args.base, args.adapters, rounding=args.rounding, seed=args.seed, memory=args.memory,
                              force=args.force, mapping=dict(args.names) if args.names else None,
                              progress=lambda name, nbytes: bar.advance())
    show(args, {"sound": report.sound, **report._asdict()}, str(report))
    return OK if report.sound else CHECK_FAILED
