"""Faults: everything that is wrong with a file, told at once in one table."""

from __future__ import annotations

from typing import Any

from ...errors import FormatError
from ...tables import table

__all__ = ["Faults", "shortened"]

MOST = 20  # rows of a table: a hostile file has as many faults as it likes
LONGEST = 120  # characters of a name that comes from a file


def shortened(text: Any, longest: int = LONGEST) -> str:
    """A text from a file, fit for one line of a message: printable, and of a length that can be read."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text)[:longest + 1])
    return shown if len(shown) <= longest else f"{shown[:longest]}..."


class Faults:
    """A list of what is wrong: the name of a tensor or setting, its shape if it has one, and the reason."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, name: str, text: str, tensor: Any = None) -> None:
        shape = "" if tensor is None else str(tuple(int(n) for n in tensor.shape))
        self.rows.append((shortened(name), shape, shortened(text, 400)))

    def refuse(self, where: Any, cure: str = "") -> None:
        """Raise `FormatError` with all of them, if there are any."""
        if not self.rows:
            return
        count = f"{len(self.rows)} problem{'s' if len(self.rows) > 1 else ''}"
        rest = [f"... and {len(self.rows) - MOST} more"] if len(self.rows) > MOST else []
        lines = [*table([("name", "shape", "problem"), *self.rows[:MOST]], left=(0, 1, 2)), *rest, *([cure] if cure else [])]
        raise FormatError("\n  ".join([f"{where}: {count}", *lines]))
