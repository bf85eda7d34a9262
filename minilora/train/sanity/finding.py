"""What a check says: what was expected, what came, and what may be the matter."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable
from typing import Any

from ...shown import shown

__all__ = ["FAILED", "LOOK", "OK", "SKIPPED", "WIDTH", "Finding", "spread"]

OK, LOOK, FAILED, SKIPPED = "ok", "look", "FAILED", "-"
WIDTH = 80


@shown
@dataclasses.dataclass(frozen=True)
class Finding:
    """One check. True unless it failed.

    Attributes
    ----------
    check : str
        Which one.
    outcome : {"ok", "look", "FAILED", "-"}
        "look": no fault by itself, and worth a look. "-": the rule does not apply.
    expected, came : str
        In short.
    words : tuple of str
        What is to be said besides: likely causes, and the line to type.
    """

    check: str
    outcome: str
    expected: str
    came: str
    words: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.outcome != FAILED

    def __str__(self) -> str:
        line = f"{self.check}: expected {self.expected or 'nothing'}, came {self.came or 'nothing'}: {self.outcome}"
        return "\n".join([*textwrap.wrap(line, WIDTH, subsequent_indent="  "), *self.lines(), *self.told()])

    def lines(self) -> list[str]:
        """A table of what was looked at, line by line; none by default."""
        return []

    def told(self) -> list[str]:
        """The words as lines."""
        return [line for text in self.words
                for line in textwrap.wrap(text, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)]

    def as_dict(self) -> dict[str, Any]:
        """Plain values: what JSON can hold, but for NaN and infinity."""
        return {"check": self.check, "outcome": self.outcome, "expected": self.expected, "came": self.came,
                "words": list(self.words)}


def spread(numbers: Iterable[float]) -> str:
    """The least and the largest of some numbers, to two digits.

    Examples
    --------
    >>> spread([0.001, 0.02]), spread([0.5])
    ('0.001 to 0.02', '0.5')
    """
    given = sorted(numbers)
    if not given:
        return "none"
    low, high = f"{given[0]:.2g}", f"{given[-1]:.2g}"
    return low if low == high else f"{low} to {high}"
