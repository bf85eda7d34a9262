"""What the verbs that read and write adapter files share."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import say

if TYPE_CHECKING:
    from ..formats.adapters.saved import SavedAdapter

__all__ = ["add_reading", "add_writing", "check_out", "read", "setting", "write"]

DIALECTS = ("peft", "loralib", "mlx", "kohya", "diffusers", "gguf")
LONGEST_NOTE = 240  # characters


def add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--read", metavar="KEY=VALUE", action="append", type=setting, default=[],
                        help="what a file does not say, such as lora_alpha=16 (docs/dialects.md)")


def add_writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace what is at OUT")


def setting(text: str) -> tuple[str, Any]:
    """KEY=VALUE: the value is JSON, or else a text; ``@FILE`` is what that JSON file holds.

    Examples
    --------
    >>> setting("lora_alpha=16"), setting("dialect=mlx"), setting("enable_lora=[true, false]")
    (('lora_alpha', 16), ('dialect', 'mlx'), ('enable_lora', [True, False]))
    """
    key, sign, value = text.partition("=")
    if not sign or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r}: expected KEY=VALUE, such as lora_alpha=16")
    if value.startswith("@"):
        from ..errors import MiniloraError
        from ..formats.adapters.found import read_json

        try:
            return key, read_json(Path(value[1:]))
        except MiniloraError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value


def read(args: argparse.Namespace, path: Path, **more: Any) -> SavedAdapter:
    """The adapter at a path, with the options of ``--read``; its notes go to stderr."""
    from ..formats.adapters.reading import read_adapter

    with hint("--read", '--read lora_alpha=16, --read modules=\'["fc1", "fc2"]\''):
        adapter = read_adapter(path, **{**more, **dict(args.read)})
    notes(args, adapter.notes, f"{path}: ")
    return adapter


def notes(args: argparse.Namespace, lines: Iterable[str], where: str = "") -> None:
    """Say notes on stderr, each once."""
    for line in dict.fromkeys(lines):
        say(args, f"note: {where}{line if len(line) <= LONGEST_NOTE else f'{line[:LONGEST_NOTE]}...'}")


def check_out(args: argparse.Namespace, sources: Iterable[Path]) -> None:
    """Refuse an output that is an input, and one that exists, before any work is done."""
    from ..errors import FileError

    out: Path = args.out
    here = out.resolve()
    for source in sources:
        there = source.resolve()
        if source.exists() and (here == there or here in there.parents or there in here.parents):
            raise FileError(f"-o {out}: this is, holds or lies in the input {source}, which must stay as it is: give another "
                            "place")
    if out.exists() and not (args.overwrite or args.dry_run) and not (out.is_dir() and not any(out.iterdir())):
        raise FileError(f"-o {out}: this exists: give another place, or --overwrite to replace it")


def write(args: argparse.Namespace, adapter: SavedAdapter, to: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Write the adapter, or with ``--dry-run`` make sure that it can be said; what the dialect notes."""
    from ..formats.adapters.registry import check_options, dialect_named
    from ..formats.adapters.writing import write_adapter

    with hint("--write", "--write fold=true, --write architecture=llama"):
        if not args.dry_run:
            return write_adapter(adapter, args.out, to, **options)
        dialect = dialect_named(to)
        check_options(to, dialect.write, options)
        return dialect.write(adapter, **options).notes


@contextlib.contextmanager
def hint(flag: str, examples: str) -> Iterator[None]:
    """Say how an option that an error of a dialect names is given on the command line."""
    from ..errors import ConfigError, FormatError

    try:
        yield
    except (ConfigError, FormatError) as error:
        if not re.search(r"\b[a-z_]+=\S|no option|give base", str(error)):
            raise
        raise type(error)(f"{error}\n  Options of a dialect are given by {flag} KEY=VALUE: {examples}; minilora convert takes "
                          "what the base tells by --base BASE") from None
