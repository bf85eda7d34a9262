"""The members of a JSON object one after the other, without holding what they hold.

A file may ask for much: ten megabytes of ``[],[],[],`` are half a gigabyte as Python's lists. So the objects of a header are
walked through where they lie, in the mapped file; a value is read only when it is short enough to be one that is allowed,
and of problems a handful is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

__all__ = ["Malformed", "Members", "Pairs", "Problems"]

_SPACE = re.compile(rb"[ \t\r\n]*")
_MARK = re.compile(rb'["\[\]{},]')
_FLAT = re.compile(rb'\{[^{}"\\]*(?:"[^{}"\\]*"[^{}"\\]*)*\}')  # an object without objects: found in one step
_DEEPEST = 8           # brackets in brackets; a header needs three
_LONGEST_NAME = 65536  # bytes
_CONTROL = re.compile("[\0-\x1f]")  # JSON wants these written as escapes
_HALF = re.compile("[\ud800-\udfff]")  # and an escape can write half of a surrogate pair, which is no text


class Malformed(ValueError):
    """Text that is not of the kind that is wanted: what is wrong, and at which byte."""


class Members:
    """A place in JSON text, which moves on as values are read.

    Parameters
    ----------
    data : bytes-like
        Such as a map of the file: only what is read is touched.
    start, end : int
        The text is ``data[start:end]``.
    kind : str
        What the text is, for messages.
    """

    def __init__(self, data: Any, start: int, end: int, kind: str) -> None:
        self.data, self.at, self.end = data, start, end
        self.start, self.kind = start, kind

    def fail(self, what: str, at: int | None = None) -> Malformed:
        return Malformed(f"{what} at byte {(self.at if at is None else at) - self.start} of the {self.kind}")

    def skip_all(self, what: str) -> None:
        """Refuse anything but space up to the end."""
        if self.next():
            raise self.fail(f"something behind {what}")

    def next(self) -> bytes:
        """The next character that is no space, which is not taken; b"" at the end."""
        found = _SPACE.match(self.data, self.at, self.end)
        self.at = found.end() if found else self.at
        return self.data[self.at:min(self.at + 1, self.end)]  # type: ignore[no-any-return]

    def take(self, wanted: bytes) -> bytes:
        """Take one of the characters in `wanted`."""
        character = self.next()
        if not character or character not in wanted:
            shown = " or ".join(repr(chr(code)) for code in wanted)
            raise self.fail(f"expected {shown}, found {character.decode('latin-1') or 'the end'!r}")
        self.at += 1
        return character

    def names(self) -> Iterator[str]:
        """The names of the object that begins here; the value of each must be read before the next name is asked for."""
        self.take(b"{")
        if self.next() == b"}":
            self.at += 1
            return
        while True:
            name = self.string(_LONGEST_NAME)
            self.take(b":")
            yield name
            if self.take(b",}") == b"}":
                return

    def string(self, longest: int) -> str:
        """The string that begins here. Of what is as long as a file there are never two copies."""
        self.take(b'"')
        begin = self.at
        end = self._closing_quote(begin)
        if end - begin > longest:
            raise self.fail(f"a text of more than {longest} bytes where none is so long", begin)
        self.at = end + 1
        escaped = self.data.find(b"\\", begin, end) >= 0
        try:
            with memoryview(self.data) as view, view[begin - escaped:end + escaped] as piece:
                text = str(piece, "utf-8")
            if escaped:
                text = json.loads(text)
            if found := (_HALF if escaped else _CONTROL).search(text):
                raise ValueError(f"character {found[0]!r}")
        except ValueError as error:
            raise self.fail(f"a string that is no text ({str(error):.60})", begin) from None
        return text

    def value(self, longest: int) -> Any:
        """The value that begins here, of at most so many bytes; objects as lists of (name, value), a `Pairs`."""
        self.next()
        begin = self.at
        if flat := _FLAT.match(self.data, begin, min(self.end, begin + longest)):
            self.at = flat.end()
        else:
            self._skip(longest)
        try:
            return json.loads(str(self.data[begin:self.at], "utf-8"), object_pairs_hook=Pairs)
        except ValueError as error:
            raise self.fail(f"no JSON ({str(error):.60})", begin) from None

    def _skip(self, longest: int) -> None:
        """Move behind the value that begins here."""
        depth = 0
        begin = self.at
        while True:
            found = _MARK.search(self.data, self.at, self.end)
            if found is None:
                raise self.fail("a value that does not end", begin)
            if found.start() - begin > longest:
                raise self.fail(f"a value of more than {longest} bytes where none is so long", begin)
            mark = found[0]
            if depth == 0 and mark in b",]}":
                self.at = found.start()
                return
            self.at = found.end()
            if mark == b'"':
                self.at = self._closing_quote(self.at) + 1
            elif mark in b"[{":
                depth += 1
                if depth > _DEEPEST:
                    raise self.fail(f"brackets more than {_DEEPEST} deep", found.start())
            elif mark in b"]}":
                depth -= 1
            if depth == 0:
                return

    def _closing_quote(self, begin: int) -> int:
        at = begin
        while True:
            at = int(self.data.find(b'"', at, self.end))
            if at < 0:
                raise self.fail("a string that does not end", begin - 1)
            back = at
            while back > begin and self.data[back - 1:back] == b"\\":
                back -= 1
            if (at - back) % 2 == 0:
                return at
            at += 1


class Problems(list[str]):
    """The first few problems of a file, and how many there are."""

    kept, most = 5, 100

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def add(self, text: str) -> None:
        self.total += 1
        if self.total <= self.kept:
            self.append(text if len(text) <= 300 else f"{text[:296]} ...")

    def give_up(self) -> None:
        """Stop where there are so many that more of them tell nothing."""
        if self.total >= self.most:
            raise Malformed(f"given up after {self.total} problems")

    def listed(self) -> str:
        more = [f"and {self.total - self.kept} more"] if self.total > self.kept else []
        return "; ".join([*self[:self.kept], *more, *self[self.kept:]])


class Pairs(list[tuple[str, Any]]):
    """The members of an object in their order, a name that comes twice twice."""
