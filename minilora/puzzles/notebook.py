"""The puzzles without files: what a notebook or a script calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .catalogue import PUZZLES, named, number_of

if TYPE_CHECKING:
    from .grading.outcome import Graded

__all__ = ["check", "hint", "hint_text", "names", "show", "show_text"]


def names() -> tuple[str, ...]:
    """The names of all puzzles, in order.

    Examples
    --------
    >>> names()[:3]
    ('loss', 'dx', 'dW')
    """
    return tuple(PUZZLES)


def check(name: str, answer: Any) -> Graded:
    """Grade an answer.

    Parameters
    ----------
    name : str
        Of the puzzle.
    answer : callable or type
        The function or class that `show` asks for.

    Returns
    -------
    Graded
        True if it passed; printed, it says what was found.

    Raises
    ------
    ConfigError
        If there is no such puzzle.

    Examples
    --------
    >>> check("dx", lambda dy, W: dy @ W)
    dx: passed
    """
    from .grading.judge import grade

    return grade(named(name), answer)


def hint(name: str, number: int = 1) -> None:
    """Print one of the three hints of a puzzle, from a nudge to nearly the answer.

    Examples
    --------
    >>> hint("dx", 2)
    dx, hint 2 of 3
      The index that disappears is k, the outputs: the last axis of dy and the
      first of W.
    """
    print(hint_text(name, number))


def show(name: str, solution: bool = False) -> None:
    """Print the task of a puzzle with its blank, or the code that solves it.

    Examples
    --------
    >>> show("dx", solution=True)
    import numpy as np
    <BLANKLINE>
    <BLANKLINE>
    def backward_x(dy, W):
        return dy @ W
    """
    print(show_text(name, solution))


def hint_text(name: str, number: int) -> str:
    from .layout import wrapped

    puzzle = named(name)
    if number not in (1, 2, 3):
        raise ConfigError(f"a puzzle has the hints 1, 2 and 3, not {number!r}")
    return "\n".join([f"{puzzle.name}, hint {number} of 3", *wrapped(puzzle.hints[number - 1])])


def show_text(name: str, solution: bool) -> str:
    puzzle = named(name)
    return (puzzle.filled(puzzle.answer) if solution else puzzle.file(number_of(puzzle))).rstrip("\n")
