"""Names in a drawing. They are given by users and files, so they are taken for text that may hold anything."""

from __future__ import annotations

import unicodedata

__all__ = ["broken", "columns", "plain", "shape_text"]


def plain(name: str, most: int = 40) -> str:
    """A name on one line, without characters that do not print. Of a long one the end, which tells more of a path.

    Examples
    --------
    >>> plain("h.0\\nattn"), plain("abcdefgh", 5)
    ('h.0\\\\nattn', '…efgh')
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(name)[-most - 1:])
    return text if columns(text) <= most else "…" + broken(text[::-1], most)[-2::-1]


def columns(text: str) -> int:
    """How many columns a text takes where each letter has the same width: two for those of East Asia, none for accents."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def broken(text: str, width: int) -> str:
    """A text cut off at so many columns."""
    if columns(text) <= width:
        return text
    kept = ""
    for c in text:
        if columns(kept + c) >= width:
            break
        kept += c
    return kept + "…"


def shape_text(shape: tuple[int, ...]) -> str:
    return str(tuple(map(int, shape)))
