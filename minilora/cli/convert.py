"""``minilora convert``: an adapter in another program's dialect."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .adapter_files import DIALECTS, add_reading, add_writing, check_out, notes, read, setting, write
from .merge import renaming
from .options import add_json, add_output
from .output import show
from .terms import OK, UsageError

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """example:
  minilora convert adapter --to mlx -o as-mlx --write pad=true --write fold=true
  minilora convert as-mlx --to peft -o as-peft
What the dialect cannot say is refused by name, and never left out:
docs/dialects.md"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="ADAPTER", type=Path, help="in any dialect: a folder or a file")
    add("--to", choices=DIALECTS, required=True, metavar="DIALECT", help=", ".join(DIALECTS))
    add_output(parser)
    add("--names", metavar="OLD=NEW", action="append", default=[], type=renaming,
        help="what paths begin with, and what takes its place: transformer.=model.")
    add("--base", type=Path, metavar="BASE", help="the base's folder: names of modules for kohya, config.json for gguf")
    add("--write", metavar="KEY=VALUE", action="append", type=setting, default=[],
        help="an option of the dialect: fold=true rounds s into B, pad=true fills up ranks ...")
    add_reading(parser)
    add_writing(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    check_out(args, [args.source])
    from ..formats.algebra.convert import ready_for, renamed

    adapter = read(args, args.source, **from_base(args, "read"))
    made = ready_for(renamed(adapter, dict(args.names) or None), args.to)
    said = write(args, made, args.to, {**from_base(args, "write"), **dict(args.write)})
    notes(args, said)
    ranks = sorted({update.r for update in made.updates.values()})
    parts = {"updates": len(made.updates), "saved": len(made.saved), "biases": len(made.biases), "tokens": len(made.tokens)}
    report = {"from": adapter.dialect, "to": args.to, "ranks": ranks, "parts": parts, "notes": [*adapter.notes, *said],
              "out": args.out, "written": not args.dry_run}
    held = ", ".join(f"{count} {name}" for name, count in parts.items() if count)
    show(args, report, f"{adapter.dialect} -> {args.to}: {held}, ranks {', '.join(map(str, ranks)) or 'none'}\n"
         f"{'would write' if args.dry_run else 'wrote'} {args.out}")
    return OK


def from_base(args: argparse.Namespace, what: str) -> dict[str, Any]:
    """What the base tells the dialect that is read or written, if it asks."""
    if args.base is None:
        return {}
    import inspect

    from ..formats.adapters.found import find, read_json
    from ..formats.adapters.reading import recognised
    from ..formats.adapters.registry import dialect_named

    given = dict(args.read)
    dialect = dialect_named(args.to) if what == "write" else dialect_named(given["dialect"]) if "dialect" in given else \
        recognised(find(args.source, given.get("name")))
    asked = inspect.signature(getattr(dialect, what)).parameters
    found: dict[str, Any] = {}
    if "base" in asked:
        config = args.base / "config.json" if args.base.is_dir() else args.base
        if not config.is_file():
            raise UsageError(f"--base {args.base}: there is no config.json in it")
        found["base"] = read_json(config)
    if "modules" in asked:
        from ..formats.merging.checkpoint import open_checkpoint

        names = open_checkpoint(args.base).state
        found["modules"] = sorted({name.rpartition(".")[0] for name in names} - {""})
    return found
