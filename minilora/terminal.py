"""How wide a terminal is, and texts in lines that fit it.

Only what a person reads on a terminal is fitted. A pipe, a file and JSON get every line as it is: a program reads them. Nothing
is cut: lines are broken at spaces, and a line to type, such as ``pip install 'minilora[models]'``, is never broken.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

__all__ = ["WIDTH", "columns_of", "fitting", "room", "wrapped"]

WIDTH = 80  # columns, where a terminal does not say how many it has
LEAST = 40  # columns; in fewer there is no reading
DEEPEST = 26  # columns of a label beside which the lines after the first stand

PROGRAMS = {"python", "python3", "pip", "minilora", "mpiexec", "mpirun", "srun", "chmod", "df", "ulimit"}
SAID = re.compile(r"(^|:|  |`|\b[Tt]ype|\b[Rr]un|\binstead|\bor) *$")  # what stands before a line to type

_room: ContextVar[int | None] = ContextVar("room", default=None)


def columns_of(stream: Any) -> int | None:
    """The columns of the terminal that a stream leads to; None where it leads to none.

    The environment variable COLUMNS goes first, as in Python's own `shutil.get_terminal_size`.
    """
    try:
        if not stream.isatty():
            return None
    except (AttributeError, ValueError):  # no stream, or a closed one
        return None
    given, columns = os.environ.get("COLUMNS", ""), 0
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no file behind it, or one without a size
        columns = int(given) if given.isdecimal() else os.get_terminal_size(stream.fileno()).columns
    return max(columns or WIDTH, LEAST)


@contextlib.contextmanager
def fitting(columns: int | None) -> Iterator[None]:
    """Tables that are made inside fit so many columns; None: they are as wide as they are."""
    token = _room.set(columns)
    try:
        yield
    finally:
        _room.reset(token)


def room() -> int | None:
    """The columns that `fitting` asks for."""
    return _room.get()


def wrapped(text: str, columns: int | None) -> str:
    """A text with its long lines broken at spaces. The lines after the first stand below it, a bit to the right.

    Examples
    --------
    >>> print(wrapped("names  a path, another path, and a third path that is long", 40))
    names  a path, another path, and a third
           path that is long
    >>> print(wrapped("needs the package gguf: pip install 'minilora[gguf]'", 40))
    needs the package gguf:
      pip install 'minilora[gguf]'
    """
    if columns is None:
        return text
    return "\n".join("\n".join(broken(line, columns)) for line in text.split("\n"))


def broken(line: str, columns: int) -> list[str]:
    """The lines of one line."""
    if len(line) <= columns:
        return [line]
    blank = " " * below(line, columns)
    lines = [""]
    for piece in pieces(line):
        if len(lines[-1]) + len(piece) <= columns or not lines[-1].strip():
            lines[-1] += piece
        else:
            lines.append(blank + piece.lstrip())
    return lines


def below(line: str, columns: int) -> int:
    """Where the lines after the first begin: below what stands beside a label, else two columns to the right."""
    label = re.match(r" *\S+(?: \S+)*  +(?=\S)", line)
    if label and label.end() <= min(DEEPEST, columns // 3):
        return label.end()
    return len(line) - len(line.lstrip()) + 2


def pieces(line: str) -> Iterator[str]:
    """Words with the blanks before them; a line to type is one piece."""
    words = re.findall(r"\s*\S+", line)
    at = 0
    while at < len(words):
        end = at + 1
        if words[at].strip().lstrip("`(") in PROGRAMS:
            stop = end_of_command(words, at)
            if meant(words[at:stop], "".join(words[:at])):
                end = stop
        yield "".join(words[at:end])
        at = end


def end_of_command(words: list[str], at: int) -> int:
    """Behind the last word of a command that begins at `at`, if it is one: at the end of a clause, or of the line."""
    for end in range(at + 1, len(words) + 1):
        text = "".join(words[at:end])
        if text.count('"') % 2 or text.count("'") % 2:
            continue
        following = words[end] if end < len(words) else ""
        if text[-1] in ",;:)`" or text[-1] == "." and not text.endswith(" ...") or following.startswith(("  ", " (")):
            return end
    return len(words)


def meant(words: list[str], before: str) -> bool:
    """Whether these words are a command and not a sentence that begins with the name of a program."""
    rest = [word.strip() for word in words[1:]]
    if not rest:
        return False
    return bool(rest[0] == "install" or any(word.startswith("-") and len(word) > 1 for word in rest)
                or rest[0].rstrip(".,;").endswith(".py") or words[0].strip() in ("chmod", "df", "ulimit")
                or SAID.search(before))
