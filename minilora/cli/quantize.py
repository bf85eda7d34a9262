"""``minilora quantize``: the folder of a model with its linear layers in four bits, and back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import add_json, add_output
from .output import progress, say, show
from .terms import OK, UsageError

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """example:
  minilora quantize base -o base-nf4 --kind nf4
  minilora quantize base-nf4 -o base-again --dequantize float16 --dry-run

transformers reads what is written (bitsandbytes' layout). Output heads,
embeddings and norms stay as they are."""

KINDS = ("nf4", "fp4")
DTYPES = ("float16", "bfloat16", "float32", "float64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", type=Path, help="folder of a model")
    add_output(parser)
    parser.add_argument("--kind", choices=KINDS, default="nf4", help="which 16 numbers the codes stand for (default: nf4)")
    parser.add_argument("--no-double", action="store_true", help="scales in 32 bits, not 8: 4.5 bits a weight, not 4.13")
    parser.add_argument("--blocksize", metavar="N", type=int, default=64, help="weights that share a scale (default: 64)")
    parser.add_argument("--skip", metavar="NAMES", type=names, default=[], help="layers to leave too: down_proj,layers.0 ...")
    parser.add_argument("--dequantize", metavar="DTYPE", choices=DTYPES,
                        help=f"the way back: BASE is in 4 bits; write {', '.join(DTYPES)}")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT when the new one is whole")
    add_json(parser)


def names(text: str) -> list[str]:
    """Names between commas."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: expected names between commas, such as down_proj,layers.0")
    return found


def run(args: argparse.Namespace) -> int:
    from ..formats.merging.checkpoint import open_checkpoint
    from ..models import dequantize_files, quantize_files

    if args.dequantize and (args.no_double or args.skip or args.kind != "nf4" or args.blocksize != 64):
        raise UsageError("--dequantize takes the codes as they are: without --kind, --no-double, --blocksize, --skip")
    common: dict[str, Any] = {"overwrite": args.overwrite, "dry_run": args.dry_run}
    say(args, f"{'rehearsing: ' if args.dry_run else ''}{'decoding' if args.dequantize else 'quantising'} {args.base}")
    with progress(args, "tensors", len(open_checkpoint(args.base).state)) as bar:
        common["progress"] = lambda name, nbytes: bar.advance()
        if args.dequantize:
            report = dequantize_files(args.base, args.out, args.dequantize, **common)
        else:
            report = quantize_files(args.base, args.out, args.kind, double=not args.no_double, blocksize=args.blocksize,
                                    exclude=args.skip, **common)
    end = "nothing was written: this was a rehearsal" if args.dry_run else f"written: {args.out}"
    show(args, {"written": not args.dry_run, **report.as_dict()}, f"{report}\n{end}")
    return OK
