"""Plain-text tables and lists of numbers, for the reports of this room."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["ranges", "table"]


def table(cells: Sequence[Sequence[str]], left: Iterable[int]) -> list[str]:
    """Lines of a table: a head, a rule, rows; all columns but those in `left` are aligned right."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
             for row in cells]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1][1:] = [n]
        else:
            parts.append([n])
    return ", ".join("-".join(map(str, part)) for part in parts)
