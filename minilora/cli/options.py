"""Options that several verbs have, under one name and with one meaning."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

__all__ = ["add_device", "add_json", "add_output", "hidden", "weighted"]


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``: what `output.show` reads."""
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, not tables")


def add_output(parser: argparse.ArgumentParser) -> None:
    """``-o OUT`` and ``--dry-run``, of a verb that writes."""
    parser.add_argument("-o", "--out", metavar="OUT", type=Path, required=True, help="where to write")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, write nothing")


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``: what `minilora.use` takes."""
    parser.add_argument("--device", choices=("cpu", "gpu", "auto"), default="cpu", help="where to compute (default: cpu)")


def hidden(parser: argparse.ArgumentParser, *flags: str, **more: Any) -> None:
    """An option that the help names in its last lines only."""
    parser.add_argument(*flags, help=argparse.SUPPRESS, **more)


def weighted(text: str) -> tuple[Path, float]:
    """The `type` of an argument ``ADAPTER[=WEIGHT]``: its path and its weight, 1 if there is none.

    A path that exists as it stands is taken so, whatever ``=`` is in it.

    Examples
    --------
    >>> weighted("style=0.5")[1], weighted("style")[1]
    (0.5, 1.0)
    """
    path, sign, number = text.rpartition("=")
    if not sign or _exists(text):
        return Path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not path or not math.isfinite(weight):
        raise argparse.ArgumentTypeError(f"{text!r}: expected ADAPTER or ADAPTER=WEIGHT with a finite number, such as "
                                         f"{path or 'ADAPTER'}=0.5; nothing lies at that path either")
    return Path(path), weight


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a name, or with a NUL in it
        return False
