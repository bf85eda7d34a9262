"""A learner's folder: which file is of which puzzle, and what is written into it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..cli.terms import nearest, printable
from ..errors import ConfigError, FileError
from .catalogue import PUZZLES, named, number_of, puzzle_of
from .puzzle import COMMAND, Puzzle

__all__ = ["FOLDER", "Found", "Written", "file_name", "found_by", "usual_folder", "write"]

FOLDER = Path("puzzles")


class Found(NamedTuple):
    """A file of a puzzle."""

    puzzle: Puzzle
    path: Path


class Written(NamedTuple):
    """What `write` did, by file names."""

    new: list[Path]
    kept: list[Path]


def file_name(puzzle: Puzzle) -> str:
    """What `start` calls its file.

    Examples
    --------
    >>> file_name(PUZZLES["dx"])
    '02_dx.py'
    """
    return f"{number_of(puzzle):02}_{puzzle.name}.py"


def usual_folder() -> Path:
    """Where files are looked for if nobody says: ./puzzles; or here, for whoever went into it."""
    return FOLDER if FOLDER.is_dir() or not inside(Path()) else Path()


def inside(folder: Path, deep: bool = False) -> list[Found]:
    """The files of puzzles in a folder, and in those inside it; in the order of folders, then of puzzles."""
    found = []
    for path in folder.rglob("*.py") if deep else folder.glob("*.py"):
        puzzle = puzzle_of(path)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)
        if puzzle is not None and not hidden and path.is_file():
            found.append(Found(puzzle, path))
    return sorted(found, key=lambda each: (each.path.parent, number_of(each.puzzle), each.path))


def found_by(words: Sequence[str]) -> list[Found]:
    """The files that the words of a command name: puzzles, files and folders; all of the usual folder if there are none.

    Raises
    ------
    FileError
        If a file or folder is not there, or holds no puzzle.
    ConfigError
        If a word is neither a puzzle nor a path.
    """
    if not words:
        return all_in(usual_folder(), deep=False)
    found: list[Found] = []
    for word in words:
        found += by_word(word)
    return list(dict.fromkeys(found))


def by_word(word: str) -> list[Found]:
    path = Path(word)
    if path.is_file():
        return [one(path)]
    if len(path.parts) == 1:
        try:
            return of_puzzle(named(word))
        except ConfigError:
            if not path.is_dir():
                raise
    if path.is_dir():
        return all_in(path, deep=True)
    beside = [each.name for each in path.parent.glob("*.py")] if path.parent.is_dir() else []
    raise FileError(f"there is no file {printable(str(path))}{nearest(path.name, beside)}")


def of_puzzle(puzzle: Puzzle) -> list[Found]:
    folder = usual_folder()
    there = [each for each in inside(folder) if each.puzzle is puzzle]
    if not there:
        expected = folder / file_name(puzzle)
        what = "is not a file" if os.path.lexists(expected) else "is not there"
        raise FileError(f"{printable(str(expected))} {what}: {COMMAND} start writes it")
    return there


def one(path: Path) -> Found:
    puzzle = puzzle_of(path)
    if puzzle is None:
        raise FileError(f"{printable(str(path))} has the name of no puzzle: call it NUMBER_NAME.py, as start does "
                        f"({file_name(PUZZLES['dA'])})")
    return Found(puzzle, path)


def all_in(folder: Path, deep: bool) -> list[Found]:
    if not folder.is_dir():
        raise FileError(f"there is no folder {printable(str(folder))}: {COMMAND} start makes it")
    found = inside(folder, deep)
    if not found:
        raise FileError(f"no file in {printable(str(folder))} has the name of a puzzle: {COMMAND} start writes them")
    return found


def write(folder: Path, puzzles: Iterable[Puzzle]) -> Written:
    """Write the files of puzzles. What is there already, under a puzzle's file name, stays as it is.

    Raises
    ------
    FileError
        If the folder cannot be made, or a file not be written.
    """
    from ..formats.tensors.durable import replace_file

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the folder {printable(str(folder))}: {error.strerror or error}. Name another: "
                        f"{COMMAND} start FOLDER") from None
    written = Written([], [])
    for puzzle in puzzles:
        path = folder / file_name(puzzle)
        if os.path.lexists(path):
            written.kept.append(path)
            continue
        with replace_file(path) as file:
            file.write(puzzle.file(number_of(puzzle)).encode("utf-8"))
        written.new.append(path)
    return written
