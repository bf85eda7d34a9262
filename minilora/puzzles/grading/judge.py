"""One answer, or one file with an answer in it, graded."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from ...recording import recording
from ..puzzle import Function, Operation, Puzzle
from ..source import load
from . import function, operation
from .answers import found, learners
from .outcome import BROKEN, PASSED, UNWRITTEN, Graded, Stopped

__all__ = ["grade", "grade_file"]

KEPT = 10  # lines of what an answer prints


def grade(puzzle: Puzzle, answer: Any) -> Graded:
    """An answer that is at hand: the function or the class that the puzzle asks for."""
    try:
        judge(puzzle, answer)
    except Stopped as stopped:
        return Graded(puzzle.name, stopped.status, said(stopped))
    return Graded(puzzle.name, PASSED)


def grade_file(puzzle: Puzzle, path: str | PathLike[str]) -> Graded:
    """A learner's file: it is run, and what it prints is kept. A file that cannot be read is an error like one in it.
    """
    printed = Printed()
    status: str = PASSED
    words: tuple[str, ...] = ()
    try:
        with redirect_stdout(printed):
            text = read(path)
            with learners():
                module = load(text, fspath(path))
            judge(puzzle, found(puzzle, module))
    except Stopped as stopped:
        status, words = stopped.status, said(stopped)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted while {fspath(path)} ran") from None
    return Graded(puzzle.name, status, words, fspath(path), printed.lines())


def read(path: str | PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise Stopped(BROKEN, [f"the file cannot be read: {error.strerror or error}"]) from None


def judge(puzzle: Puzzle, answer: Any) -> None:
    with recording():  # a notebook may be inside no_grad
        if isinstance(puzzle, Operation):
            operation.grade(puzzle, answer)
        else:
            assert isinstance(puzzle, Function)
            function.grade(puzzle, answer)


def said(stopped: Stopped) -> tuple[str, ...]:
    if stopped.status == UNWRITTEN and not stopped.words:
        return ("raise NotImplementedError(...) is still there: write your line in its place",)
    return stopped.words


class Printed(io.TextIOBase):
    """Takes what is printed, and keeps the beginning: a print in a loop is for looking at, not for the memory."""

    def __init__(self) -> None:
        self.text, self.more = "", False

    def write(self, text: str) -> int:
        self.text += text[:max(0, 4000 - len(self.text))]
        self.more = self.more or len(self.text) >= 4000
        return len(text)

    def writable(self) -> bool:
        return True

    def lines(self) -> tuple[str, ...]:
        lines = self.text.splitlines()
        return (*lines[:KEPT], *(["..."] if self.more or len(lines) > KEPT else []))
