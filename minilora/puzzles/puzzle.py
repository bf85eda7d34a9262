"""What a puzzle is: a task, a blank in a few lines of code, three hints, the answer, and the wrong answers that people give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .draw import CASES, Draw

__all__ = ["BLANK", "COMMAND", "UNWRITTEN", "Function", "Mistake", "Operation", "Puzzle"]

COMMAND = "python -m minilora.puzzles"
BLANK = "<blank>"
UNWRITTEN = 'raise NotImplementedError("your line here")'


class Mistake(NamedTuple):
    """A wrong answer that people give.

    Attributes
    ----------
    text : str, or one for each blank
    why : str
        What the grader says when a learner's numbers are those of this answer. Empty if its usual diagnosis says enough.
    says : str
        A piece of that diagnosis, for the tests; `why` is asked for where it is empty.
    """

    text: str | tuple[str, ...]
    why: str = ""
    says: str = ""


def called(answer: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """The answer called with the inputs in their order, whatever the learner calls them."""
    return answer(*inputs.values())


@dataclass(frozen=True)
class Puzzle:
    """One blank to fill.

    Attributes
    ----------
    name : str
    teaches : str
        One line.
    task : str
        What is given and what is wanted: letters, shapes, an example that the answer passes as a doctest.
    find : str
        The function or class of the learner's file that is graded.
    code : str
        Of the file, with a line ``<blank>`` for each blank.
    answer : str, or one for each blank
        What stands there in the end.
    mistakes : tuple of Mistake
    hints : tuple of str
        Three: a nudge, the idea, all but the line.
    see : str
        Where the same stands in the library or its docs.
    points : callable
        Inputs by name, in the order of the call, from a `Draw`.
    cases : tuple of str
        The label of each point at which an answer is graded; also its seed, by its place.
    """

    name: str
    teaches: str
    task: str
    find: str
    code: str
    answer: str | tuple[str, ...]
    mistakes: tuple[Mistake, ...]
    hints: tuple[str, str, str]
    see: str
    points: Callable[[Draw], dict[str, Any]]
    cases: tuple[str, ...] = CASES

    def filled(self, text: str | tuple[str, ...] = UNWRITTEN) -> str:
        """The code with a text in each blank; one text goes into all of them."""
        lines: list[str] = []
        blanks = [line for line in self.code.splitlines() if line.strip() == BLANK]
        texts = iter((text,) * len(blanks) if isinstance(text, str) else text)
        for line in self.code.strip("\n").split("\n"):
            if line.strip() == BLANK:
                indent = line[:line.index(BLANK)]
                lines += [indent + each if each else "" for each in next(texts).split("\n")]
            else:
                lines.append(line)
        return "\n".join(lines) + "\n"

    def file(self, number: int, text: str | tuple[str, ...] = UNWRITTEN) -> str:
        """What `start` writes: the task as a docstring, the code, and two lines that grade it where the file is run."""
        return (f'"""Puzzle {number}, {self.name}: {self.teaches}.\n\n{self.task.strip()}\n\n'
                f"grade it    run this file, or {COMMAND} check {self.name}\n"
                f'stuck?      {COMMAND} hint {self.name}\n"""\n\n{self.filled(text)}\n\n'
                f'if __name__ == "__main__":\n    from minilora import puzzles\n'
                f'    print(puzzles.check("{self.name}", {self.find}))\n')


@dataclass(frozen=True)
class Function(Puzzle):
    """A puzzle whose answer is a function of arrays, which is compared with what the library computes.

    Attributes
    ----------
    outputs : tuple of str
        The names of what is returned; two or more come as a tuple.
    right : callable
        The same from the inputs by name, computed in another way.
    run : callable
        How the answer is used: it is called, or does more than one thing.
    exact : bool
        Whether every bit counts.
    """

    outputs: tuple[str, ...] = ()
    right: Callable[..., Any] = lambda **inputs: None
    run: Callable[[Callable[..., Any], dict[str, Any]], Any] = called
    exact: bool = False


@dataclass(frozen=True)
class Operation(Puzzle):
    """A puzzle whose answer is the backward of an ``Op``, which is compared with numerical derivatives of its forward.

    Attributes
    ----------
    wanted : tuple of str
        The inputs that get a gradient; the others are constants.
    settings : tuple of str
        Those of the points' names that are attributes of the operation and not inputs.
    """

    wanted: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
