"""JSON lines: a file with one JSON object a line. It is untrusted: a line's length and depth are bounded, a number is finite.

Blank lines are passed over. What Windows adds, a byte order mark and CR before LF, changes no row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import FileError
from ...formats.json_rules import no_number, once
from .problems import Problems

__all__ = ["objects_in"]

LONGEST = 16 << 20  # bytes of a line: a book has one or two million
MARK = b"\xef\xbb\xbf"  # the byte order mark of UTF-8


def objects_in(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file, each with its line, counted from 1; faults go to `problems`.

    Raises
    ------
    FileError
        If the file cannot be read.
    """
    count = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(lines_of(file), 1):
                line = line.removeprefix(MARK) if number == 1 else line
                if not line.strip():
                    continue
                count += 1
                try:
                    yield number, parsed(line)
                except ValueError as error:  # what is no UTF-8 too
                    problems.add(path, number, str(error))
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not count:
        problems.add(path, 0, "the file has no rows: expected a JSON object in every line, such as {\"text\": \"...\"}")


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """The lines; of one that is longer than `LONGEST` only its beginning, one byte too long. The rest is never in memory."""
    while line := file.readline(LONGEST + 1):
        yield line
        while len(line) > LONGEST and not line.endswith(b"\n"):
            line = file.readline(LONGEST + 1)


def parsed(line: bytes) -> dict[str, Any]:
    """A line as a JSON object; ValueError with what is wrong."""
    if len(line) > LONGEST:
        raise ValueError(f"the line is longer than {LONGEST >> 20} MiB: a row is a text to learn from, not a library")
    try:
        text = line.decode("utf-8").rstrip()
    except UnicodeDecodeError as error:
        other = " It looks like UTF-16:" if line[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ValueError(f"no UTF-8: {error.reason} at byte {error.start + 1} of the line.{other} save the file as "
                         "UTF-8") from None
    try:
        found = json.loads(text, object_pairs_hook=once, parse_constant=no_number)
    except RecursionError:
        raise ValueError("nested too deeply to be a row of texts") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} at character {error.pos + 1}{likely(text, error.pos)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, {{...}}, got {kind(found)}{likely(text, 0)}")
    return found


def likely(text: str, place: int) -> str:
    """The likely cause of a fault, where it can be told."""
    if "\r" in text.strip():
        return ". Lines end with CR alone here: save the file with LF at their ends"
    if text.lstrip()[:1] == "[":
        return ": is this a file with one JSON list? Write each row on a line of its own, without the list"
    if text.strip() in ("{", "}"):
        return ": is an object written over several lines? Each must be on one"
    if "'" in text[place:place + 2]:
        return ": JSON has double quotation marks"
    return ""


def kind(value: Any) -> str:
    """What JSON calls a value."""
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
