"""The puzzles without files: what a notebook or a script calls."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .catalogue import PUZZLES, named, number_of
from .files import Found, found_by

if TYPE_CHECKING:
    from .grading.outcome import Graded

__all__ = ["check", "check_files", "graded_files", "hint", "hint_text", "names", "show", "show_text"]


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


def check_files(*words: str | PathLike[str]) -> list[Graded]:
    """Grade files: what ``python -m minilora.puzzles check`` does, for a script that goes on with the outcome.

    Parameters
    ----------
    *words : str or path
        Files, folders with all that is in them, or puzzles by name; none means all in ./puzzles. The code in the files is run.

    Returns
    -------
    list of Graded
        One for each file, in the order of folders, then of puzzles.

    Raises
    ------
    FileError
        If a file or folder is not there, or holds no puzzle.
    ConfigError
        If a word is neither a puzzle nor a path.

    Examples
    --------
    >>> from pathlib import Path
    >>> _ = Path("02_dx.py").write_text("def backward_x(dy, W): return dy @ W")
    >>> check_files("02_dx.py")
    [dx: passed]
    """
    return graded_files(found_by([fspath(word) for word in words]))


def graded_files(found: Sequence[Found]) -> list[Graded]:
    """Each of the files, graded; the grader is loaded where there is something for it."""
    if not found:
        return []
    from .grading.judge import grade_file

    return [grade_file(puzzle, path) for puzzle, path in found]


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
