"""What verbs write: tables or JSON to stdout, notes and progress to stderr. Nothing from a file reaches a terminal raw."""

from __future__ import annotations

import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from typing import Any, Protocol

from ..terminal import columns_of, wrapped
from .terms import printable

__all__ = ["Progress", "bytes_text", "progress", "say", "show", "table"]

LINE_EVERY = 5.0  # seconds between two lines of progress where there is no terminal


def show(args: Namespace, report: Mapping[str, Any], text: str) -> None:
    """The outcome of a verb, on stdout: with ``--json`` the report as one object, else the text.

    The object begins with ``"schema": "minilora.VERB/1"``: the number changes when a key goes or changes its meaning, not when
    one is added. NaN and infinity, which JSON does not have, are null; paths are text; arrays are lists.
    """
    if getattr(args, "json", False):
        said = {"schema": f"minilora.{args.verb}/1", **report}
        print(json.dumps(plain(said), indent=2, allow_nan=False))
    elif text:
        print(wrapped("\n".join(map(printable, text.split("\n"))), columns_of(sys.stdout)))


def say(args: Namespace, line: str) -> None:
    """A note or a line of progress, on stderr; nothing with ``--quiet``."""
    if not args.quiet:
        print(wrapped("\n".join(map(printable, line.split("\n"))), columns_of(sys.stderr)), file=sys.stderr, flush=True)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], left: Iterable[int] = (0,)) -> str:
    """A table: a head, a rule, rows; all columns but those in `left` are aligned right. Cells are made printable."""
    from ..tables import table as lines_of

    return "\n".join(lines_of([[printable(str(cell)) for cell in row] for row in (head, *rows)], set(left)))


def bytes_text(count: float) -> str:
    """A number of bytes for people.

    Examples
    --------
    >>> bytes_text(512), bytes_text(90_900_000)
    ('512 B', '90.9 MB')
    """
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"


def plain(value: Any) -> Any:
    """The same with nothing but what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if hasattr(value, "tolist"):  # arrays and numbers of NumPy
        return plain(value.tolist())
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Progress(Protocol):
    """What `progress` gives."""

    def advance(self, n: int = 1) -> None:
        """So much more of the total is done."""


@contextmanager
def progress(args: Namespace, label: str, total: int) -> Iterator[Progress]:
    """Progress on stderr: a bar where a terminal and tqdm are, else a line every five seconds; nothing with ``--quiet``.

    Examples
    --------
    >>> with progress(Namespace(quiet=True), "layers", 2) as bar:
    ...     bar.advance()
    """
    bar = _bar(label, total) if not args.quiet and sys.stderr.isatty() else None
    if bar is None:
        yield _Lines(args, printable(label), total)
        return
    try:
        yield _Bar(bar)
    finally:
        bar.close()


def _bar(label: str, total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, desc=printable(label), file=sys.stderr, leave=False, dynamic_ncols=True)


class _Bar:
    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def advance(self, n: int = 1) -> None:
        self.bar.update(n)


class _Lines:
    def __init__(self, args: Namespace, label: str, total: int) -> None:
        self.args, self.label, self.total, self.done, self.said = args, label, total, 0, time.monotonic()

    def advance(self, n: int = 1) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.said >= LINE_EVERY:
            self.said = now
            say(self.args, f"{self.label}: {self.done:,} of {self.total:,}")
