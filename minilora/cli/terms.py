"""The words and numbers that every verb shares: exit codes, the error of a wrong command, how names are shown."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import MiniloraError

__all__ = ["CHECK_FAILED", "DIVERGED", "FAILED", "INTERRUPTED", "OK", "READER_GONE", "USAGE", "UsageError", "nearest",
           "printable"]

OK = 0
FAILED = 1
USAGE = 2
CHECK_FAILED = 3  # the command did its work, and what it looked at is not as it should be
DIVERGED = 4
INTERRUPTED = 130
READER_GONE = 141  # as of any program whose output goes to one that has ended, such as head: 128 + SIGPIPE


class UsageError(MiniloraError, ValueError):
    """A command that cannot be meant so: an unknown word, two options that exclude each other, a wrong config file."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``": did you mean 'inspect'?"``, or nothing where no known word is like it.

    Examples
    --------
    >>> nearest("inspct", ["inspect", "merge"])
    ": did you mean 'inspect'?"
    """
    import difflib  # for errors only

    known = list(known)
    near = difflib.get_close_matches(word, known, 1, 0.6) or [k for k in known if len(word) > 1 and k.startswith(word)][:1]
    return f": did you mean {near[0]!r}?" if near else ""


def printable(text: str) -> str:
    """Text on one line with all that moves a terminal's cursor or turns its letters around written as an escape.

    Examples
    --------
    >>> printable("layer" + chr(27) + "[2J")
    'layer\\\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
