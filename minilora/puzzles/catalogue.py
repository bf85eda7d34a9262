"""All puzzles, in the order in which each needs only what came before."""

from __future__ import annotations

from ..cli.terms import nearest, printable
from ..errors import ConfigError
from .basics import dW, dx, index, linear, loss, norm, softmax, unbroadcast
from .lora import dA, dB, dropout, join, length, merge, once, paths, scaling, shared, start, tokens, unmerge
from .puzzle import COMMAND, Puzzle
from .training import accumulate, adam

__all__ = ["PUZZLES", "named", "number_of"]

PUZZLES: dict[str, Puzzle] = {module.puzzle.name: module.puzzle for module in (
    loss, dx, dW, unbroadcast, linear, index, softmax, norm,
    scaling, dB, dA, paths, once, start, merge, unmerge, shared, dropout, tokens, join, length,
    accumulate, adam)}


def number_of(puzzle: Puzzle) -> int:
    """Its place, from 1."""
    return list(PUZZLES).index(puzzle.name) + 1


def named(name: str) -> Puzzle:
    """The puzzle of a name, in whatever case, or of a number.

    Raises
    ------
    ConfigError
        If there is none.

    Examples
    --------
    >>> named("da").name, named("11").name
    ('dA', 'dA')
    """
    for puzzle in PUZZLES.values():
        if name.lower() == puzzle.name.lower() or name.isdecimal() and int(name) == number_of(puzzle):
            return puzzle
    raise ConfigError(f"there is no puzzle '{printable(name)}'{nearest(name, PUZZLES)}\n"
                      f"{COMMAND} lists them, 1 to {len(PUZZLES)}")
