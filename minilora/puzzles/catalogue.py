"""All puzzles, in the order in which each needs only what came before."""

from __future__ import annotations

import re
from pathlib import Path

from ..cli.terms import nearest, printable
from ..errors import ConfigError
from .basics import dW, dx, index, linear, loss, norm, softmax, unbroadcast
from .lora import dA, dB, dropout, join, length, merge, once, paths, scaling, shared, start, tokens, unmerge
from .puzzle import COMMAND, Puzzle
from .training import accumulate, adam

__all__ = ["PUZZLES", "named", "number_of", "puzzle_of"]

PUZZLES: dict[str, Puzzle] = {module.puzzle.name: module.puzzle for module in (
    loss, dx, dW, unbroadcast, linear, index, softmax, norm,
    scaling, dB, dA, paths, once, start, merge, unmerge, shared, dropout, tokens, join, length,
    accumulate, adam)}


def number_of(puzzle: Puzzle) -> int:
    """Its place, from 1."""
    return list(PUZZLES).index(puzzle.name) + 1


def puzzle_of(path: Path) -> Puzzle | None:
    """The puzzle of a file by its name, which may have something before and behind it: ``ann_11_dA (2).py``; or None.

    Examples
    --------
    >>> [puzzle_of(Path(name)).name for name in ("11_dA.py", "dA.py", "ann-11_dA_v2.py")]
    ['dA', 'dA', 'dA']
    """
    for puzzle in PUZZLES.values():
        name = re.escape(puzzle.name)
        if re.fullmatch(rf"{name}|(.*\D)?\d\d?[_-]{name}([^A-Za-z0-9].*)?", path.stem, re.IGNORECASE) and path.suffix == ".py":
            return puzzle
    return None


def named(name: str) -> Puzzle:
    """The puzzle of a name, in whatever case, of a number, or of a file's name with or without its ``.py``.

    Raises
    ------
    ConfigError
        If there is none.

    Examples
    --------
    >>> named("da").name, named("11").name, named("11_dA.py").name
    ('dA', 'dA', 'dA')
    """
    for puzzle in PUZZLES.values():
        if name.isdecimal() and int(name) == number_of(puzzle):
            return puzzle
    found = puzzle_of(Path(name if name.endswith(".py") else f"{name}.py"))
    if found is None:
        raise ConfigError(f"there is no puzzle '{printable(name)}'{nearest(name, PUZZLES)}\n"
                          f"{COMMAND} lists them, 1 to {len(PUZZLES)}")
    return found
