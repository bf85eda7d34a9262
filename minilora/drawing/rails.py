"""The lines to the left of a drawing in text: a rail for each value that is still needed, from who makes it to who uses it."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["MOST", "rails"]

MOST = 10  # columns: more would leave no room for the text

# (up, down, left, right): where a letter has arms
_LETTERS = {
    (1, 1, 1, 1): "┼", (1, 1, 1, 0): "┤", (1, 1, 0, 1): "├", (1, 1, 0, 0): "│", (1, 0, 1, 1): "┴", (0, 1, 1, 1): "┬",
    (1, 0, 1, 0): "╯", (1, 0, 0, 1): "╰", (0, 1, 1, 0): "╮", (0, 1, 0, 1): "╭", (0, 0, 1, 1): "─",
}


def rails(operations: Sequence[int], edges: Sequence[tuple[int, int]]) -> dict[int, tuple[list[str], str, str]] | None:
    """For each operation the lines that lead to it, its own line, and how the rails go on below it.

    Parameters
    ----------
    operations : sequence of int
        In their order.
    edges : sequence of (int, int)
        Between operations.

    Returns
    -------
    dict or None
        None if more than `MOST` values are needed at a time.

    Examples
    --------
    >>> for before, own, after in rails([0, 1, 2], [(0, 1), (0, 2), (1, 2)]).values():
    ...     print(*before, own, sep="\\n")
    ●
    ├─╮
    │ ●
    ├─╯
    ●
    """
    last = {source: target for source, target in sorted(edges, key=lambda edge: edge[1])}
    sources: dict[int, set[int]] = {}
    for source, target in edges:
        sources.setdefault(target, set()).add(source)
    active: list[int | None] = []  # what lies in each column
    drawn = {}
    for op in operations:
        used = [c for c, value in enumerate(active) if value is not None and value in sources.get(op, ())]
        ending = [c for c in used if last[active[c]] == op]  # type: ignore[index]
        free = next((c for c, value in enumerate(active) if value is None), len(active))
        own = ending[0] if ending else free
        if own == len(active):
            active.append(None)
        if len(active) > MOST:
            return None
        before = [_joint(active, used, ending, own)] if used not in ([], [own]) else []
        for c in ending:
            active[c] = None
        line = _row(["●" if c == own else "│" if value is not None else " " for c, value in enumerate(active)])
        active[own] = op if op in last else None
        while active and active[-1] is None:
            active.pop()
        drawn[op] = before, line, _row(["│" if value is not None else " " for value in active])
    return drawn


def _joint(active: Sequence[int | None], used: Sequence[int], ending: Sequence[int], own: int) -> str:
    """The line in which the values that are used turn to the column of their operation."""
    low, high = min(*used, own), max(*used, own)
    text = ""
    for c, value in enumerate(active):
        if c in used or c == own:
            arms = c in used, c == own or c not in ending, c > low, c < high
            text += _LETTERS[arms]
        else:
            text += "│" if value is not None else "─" if low < c < high else " "
        text += "─" if low <= c < high else " "
    return text.rstrip()


def _row(letters: Sequence[str]) -> str:
    return " ".join(letters).rstrip()
