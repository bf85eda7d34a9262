"""What is wrong with files: every fault with its line, and all of them in one error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import FormatError

__all__ = ["Problems", "short"]

SHOWN, KEPT = 10, 1000


class Problems:
    """Collects faults, and tells the first `SHOWN` of them in the order of the lines."""

    def __init__(self) -> None:
        self.kept: list[tuple[Path, int, str]] = []
        self.count = 0

    def add(self, path: Path, line: int, text: str) -> None:
        """Note a fault of a line, counted from 1; of line 0 for the file as a whole."""
        self.count += 1
        if len(self.kept) < KEPT:
            self.kept.append((path, line, text))

    def complain(self) -> None:
        """Raise `FormatError` if there are any."""
        lines = [f"{path}:{line}: {text}" if line else f"{path}: {text}" for path, line, text in sorted(self.kept)[:SHOWN]]
        if self.count == 1:
            raise FormatError(lines[0])
        if self.count:
            more = [f"and {self.count - SHOWN:,} more"] if self.count > SHOWN else []
            raise FormatError("\n  ".join([f"{self.count:,} problems:", *lines, *more]))


def short(value: Any) -> str:
    """A value from a file for a message: on one line, no longer than it must be, without escape sequences."""
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    return text if len(text) <= 60 else text[:56] + " ..."
