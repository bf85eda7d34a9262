"""Plain-text tables and lists of numbers, for reports."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from .terminal import broken, room

__all__ = ["GLUE", "ranges", "table"]

DOTS = "..."
GLUE = "\x1f"  # in a cell: a blank at which no line is broken
GAP = 2  # columns between two columns of cells
LEAST_NAME, LEAST_TEXT = 20, 24  # columns that a shortened name and a broken text keep


def table(cells: Sequence[Sequence[str]], left: Iterable[int], wide: int | None = None,
          short: Mapping[str, str] | None = None) -> list[str]:
    """Lines of a table: a head, a rule, rows; all columns but those in `left` are aligned right.

    Inside `minilora.terminal.fitting` it is made to fit: a text in the last column is broken into lines; or the names in the
    first are shortened in the middle, as long as they stay different; or a row takes several lines, after
    what a column says in every row alike has gone into one line below. `wide` is a column of long texts, which is the last one
    then; `short` are other heads, by the usual ones.
    """
    left, columns = set(left), room()
    if columns is not None and total(widths_of(cells)) > columns:
        if wide is not None:
            order = [*(i for i in range(len(cells[0])) if i != wide), wide]
            cells, left = [[row[i] for i in order] for row in cells], {order.index(i) for i in left}
        lines = fitted([[(short or {}).get(head, head) for head in cells[0]], *cells[1:]], left, columns)
    else:
        lines = ruled([line_of(row, widths_of(cells), left) for row in cells], 1)
    return [line.replace(GLUE, " ") for line in lines]


def widths_of(cells: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*cells)]


def total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def line_of(row: Sequence[str], widths: Sequence[int], left: Collection[int], first: int = 0) -> str:
    return (" " * GAP).join(cell.ljust(width) if i in left else cell.rjust(width)
                            for i, (cell, width) in enumerate(zip(row, widths), first)).rstrip()


def ruled(lines: list[str], head: int) -> list[str]:
    """Lines with a rule below the first `head` of them."""
    return [*lines[:head], "-" * max(map(len, lines)), *lines[head:]]


def fitted(cells: Sequence[Sequence[str]], left: Collection[int], columns: int) -> list[str]:
    """The lines of a table that is too wide, in so many columns."""
    widths = widths_of(cells)
    over, last = total(widths) - columns, len(widths) - 1
    if last > 0 and last in left and widths[last] - over >= LEAST_TEXT and any(" " in row[last] for row in cells[1:]):
        widths[last] -= over
        lines = [list(broken_row(row, widths, left)) for row in cells]
        return ruled([line for row in lines for line in row], len(lines[0]))
    names = shortened([row[0] for row in cells], widths[0] - over) if 0 in left else None
    if names is not None:
        widths[0] -= over
        return ruled([line_of([name, *row[1:]], widths, left) for name, row in zip(names, cells)], 1)
    if repeated := repetitions(cells, widths, over):
        return without(cells, left, columns, repeated)
    groups = list(folded(widths, columns))
    lines = [[" " * (GAP if first else 0) + line_of(row[first:end], widths[first:end], left, first) for first, end in groups]
             for row in cells]
    lines = [[part for line in row for part in broken(line, columns)] for row in lines]
    return ruled([line for row in lines for line in row if line.strip()], len(lines[0]))


def repetitions(cells: Sequence[Sequence[str]], widths: Sequence[int], over: int) -> list[int]:
    """Columns that say one thing in all rows, the widest first: as many as make room for what is over, or all."""
    same = [i for i in range(1, len(widths)) if len(cells) > 2 and len({row[i] for row in cells[1:]}) == 1]
    found: list[int] = []
    for i in sorted(same, key=lambda i: -widths[i]):
        if over > 0:
            found.append(i)
            over -= widths[i] + GAP
    return sorted(found)


def without(cells: Sequence[Sequence[str]], left: Collection[int], columns: int, gone: Sequence[int]) -> list[str]:
    """The lines of a table without some columns, and one that tells what they say."""
    kept = [i for i in range(len(cells[0])) if i not in gone]
    rest, aligned = [[row[i] for i in kept] for row in cells], {kept.index(i) for i in left if i in kept}
    narrow = total(widths_of(rest)) <= columns
    lines = ruled([line_of(row, widths_of(rest), aligned) for row in rest], 1) if narrow else fitted(rest, aligned, columns)
    return lines + broken("in every row: " + ", ".join(f"{cells[0][i]} {cells[1][i] or '-'}" for i in gone), columns)


def broken_row(row: Sequence[str], widths: Sequence[int], left: Collection[int]) -> Iterator[str]:
    """A row whose last cell is broken into lines below each other."""
    parts = broken(row[-1], widths[-1])
    yield line_of([*row[:-1], parts[0]], widths, left)
    beside = " " * (total(widths) - widths[-1])
    for part in parts[1:]:
        yield beside + part.strip()


def shortened(names: Sequence[str], width: int) -> list[str] | None:
    """Names with a part in the middle, or at an end, left out; None where they would be too short, or no longer different."""
    kept = width - len(DOTS)
    if width < LEAST_NAME:
        return None
    for begin in (kept // 2, kept // 4, 0, kept):
        short = [name if len(name) <= width else name[:begin] + DOTS + name[len(name) - kept + begin:] for name in names]
        if len(set(short)) == len(set(names)):
            return short
    return None


def folded(widths: Sequence[int], columns: int) -> Iterator[tuple[int, int]]:
    """The columns that stand on one line each, as (first, end); the lines after the first are moved to the right."""
    first, used = 0, widths[0]
    for i, width in enumerate(widths[1:], 1):
        if used + GAP + width > columns:
            yield first, i
            first, used = i, GAP + width
        else:
            used += GAP + width
    yield first, len(widths)


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1][1:] = [n]
        else:
            parts.append([n])
    return ", ".join("-".join(map(str, part)) for part in parts)
