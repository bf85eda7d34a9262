"""``minilora unmerge``: the base of a merged folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_json, add_output
from .output import progress, say, show
from .terms import OK

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """example:
  minilora merge base adapter -o merged
  minilora unmerge merged -o base_again

The patch beside the result holds all that leads back. Every tensor is compared
with the SHA-256 of the base's; if one is not that, nothing is written."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("merged", metavar="MERGED", type=Path, help="folder that `minilora merge` wrote, with its patch")
    add_output(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT when the new one is whole")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..formats.merging.checkpoint import open_checkpoint
    from ..formats.merging.unmerge import unmerge_files

    say(args, f"{'rehearsing: ' if args.dry_run else ''}unmerging {args.merged}")
    with progress(args, "tensors", len(open_checkpoint(args.merged).state)) as bar:
        report = unmerge_files(args.merged, args.out, overwrite=args.overwrite, dry_run=args.dry_run,
                               progress=lambda name, nbytes: bar.advance())
    end = "nothing was written: this was a rehearsal" if args.dry_run else f"written: {args.out}"
    show(args, {"written": not args.dry_run, **report._asdict()}, f"{report}\n{end}")
    return OK
