"""What the grader gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...testing.reports import Verdict
from ..layout import wrapped
from ..puzzle import COMMAND

__all__ = ["BROKEN", "PASSED", "SAID", "UNWRITTEN", "WRONG", "Graded", "Stopped", "joined"]

PASSED, WRONG, UNWRITTEN, BROKEN = "passed", "wrong", "unwritten", "broken"
SAID = {PASSED: "passed", WRONG: "not yet", UNWRITTEN: "not written yet", BROKEN: "an error"}


class Stopped(Exception):
    """Grading ends here: with a status, and with words for the learner."""

    def __init__(self, status: str, words: Sequence[str] = ()) -> None:
        super().__init__(status, words)
        self.status, self.words = status, tuple(words)


@dataclass(frozen=True, repr=False)
class Graded(Verdict):
    """A puzzle's answer, graded. True if it passed; ``print(graded)`` says what was found, ``graded.check()`` raises if not.

    Attributes
    ----------
    puzzle : str
        The name.
    status : str
        ``"passed"``, ``"wrong"``, ``"unwritten"``, or ``"broken"`` where an error came in place of an answer.
    words : tuple of str
        What was found, a paragraph each.
    file : str
        Empty if the answer came from no file.
    printed : tuple of str
        What the answer printed, as far as it was kept.

    Examples
    --------
    >>> from minilora import puzzles
    >>> graded = puzzles.check("dx", lambda dy, W: dy @ W)
    >>> bool(graded), graded.status
    (True, 'passed')
    """

    puzzle: str
    status: str
    words: tuple[str, ...] = ()
    file: str = ""
    printed: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:  # type: ignore[override]
        return self.status == PASSED

    @property
    def said(self) -> str:
        """The status in words."""
        return SAID[self.status]

    def details(self) -> list[str]:
        """The lines below the first, none wider than 78."""
        lines = [line for text in self.words for line in wrapped(text)]
        if self.printed:
            lines += ["  it printed:", *(line for text in self.printed for line in wrapped(text, "    "))]
        return lines

    def __str__(self) -> str:
        help_at = "" if self.passed else f"\n  Stuck? {COMMAND} hint {self.puzzle}"
        return "\n".join([f"{self.puzzle}: {self.said}", *self.details()]) + help_at

    def __repr__(self) -> str:
        return str(self)


def joined(parts: Sequence[Any]) -> str:
    """``a, b and c``."""
    texts = [str(part) for part in parts]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
