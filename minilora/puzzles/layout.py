"""Lines of text for a terminal of 80 columns."""

from __future__ import annotations

import textwrap

__all__ = ["WIDE", "wrapped"]

WIDE = 78


def wrapped(text: str, indent: str = "  ") -> list[str]:
    """The lines of a text, those that are too long broken between words; an indented line keeps its indent.

    Examples
    --------
    >>> wrapped("one\\n    two")
    ['  one', '      two']
    """
    lines: list[str] = []
    for line in text.split("\n"):
        inner = indent + line[:len(line) - len(line.lstrip())]
        lines += textwrap.wrap(line.strip(), WIDE, initial_indent=inner, subsequent_indent=inner,
                               break_on_hyphens=False, break_long_words=False) or [""]
    return lines
