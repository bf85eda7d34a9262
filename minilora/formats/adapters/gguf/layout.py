"""The layout of GGUF files, versions 2 and 3, as far as adapters need it: read with every number checked before it is used.

    "GGUF", u32 version, u64 count of tensors, u64 count of fields
    fields     key (u64 length, UTF-8), u32 type, value; an array: u32 type, u64 count, values
    tensors    name, u32 count of axes, u64 for each axis (the last one first), u32 type, u64 offset
    padding    to a multiple of general.alignment, 32 if it is not said
    data       each tensor at its offset from here

All little-endian. The reader of the gguf package trusts the counts, and loops over an array of 2^60 values in a file of 100
bytes; here nothing is larger than the file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy

from ....errors import FileError, FormatError
from ...tensors.dtypes import array_dtype
from ..dialect import Source

__all__ = ["MAGIC", "is_gguf", "open_gguf"]

Array = Any
MAGIC = b"GGUF"
LONGEST = 1 << 21  # bytes before the data: an adapter of a thousand layers has 0.2 MB of them
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
TYPES = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}


class _Reader:
    """A place in the bytes before the data, from which nothing is read beyond their end."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise FormatError(f"{self.path}: a GGUF file that ends too early, or whose counts are damaged: {count:,} bytes are "
                              f"asked for at byte {self.at:,}, and {len(self.data) - self.at:,} are left of the first "
                              f"{len(self.data):,}")
        self.at += count
        return self.data[self.at - count:self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"{self.path}: a text in this GGUF file is no UTF-8, before byte {self.at:,}") from None

    def value(self, kind: int, deep: int = 0) -> Any:
        """One value; of an array only that it is one: adapters need none."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY or deep > 4:
            raise FormatError(f"{self.path}: a value of the unknown type {kind} in this GGUF file, before byte {self.at:,}")
        inner, count = self.number("I"), self.number("Q")
        if inner in NUMBERS:
            self.take(count * struct.calcsize(f"<{NUMBERS[inner]}"))
        else:
            for _ in range(count):  # each takes at least 8 bytes of the file
                self.value(inner, deep + 1)
        return f"an array of {count} values"


class Tensors(Mapping[str, Array]):
    """The tensors of a GGUF file by name: read-only views of the mapped file."""

    def __init__(self, data: Any, places: Mapping[str, tuple[numpy.dtype[Any], tuple[int, ...], int]]) -> None:
        self._data, self._places = data, places
        self.shapes = {name: shape for name, (_, shape, _) in places.items()}

    def __getitem__(self, name: str) -> Array:
        dtype, shape, begin = self._places[name]
        count = int(numpy.prod(shape, dtype=object))
        return self._data[begin:begin + count * dtype.itemsize].view(dtype).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do; what cannot be read is for its reader to say."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def open_gguf(path: Path) -> Source:
    """The tensors and fields of a GGUF file. Numbers among the fields come as text, as in the metadata of other files.

    Raises
    ------
    FormatError
        If it breaks the layout, or has tensors of a type that no adapter has: quantised ones.
    FileError
        If the operating system cannot give it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(min(size, LONGEST))
        data = numpy.memmap(path, dtype=numpy.uint8, mode="r") if size else numpy.zeros(0, numpy.uint8)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None
    reader = _Reader(head, path)
    if reader.take(4) != MAGIC:
        raise FormatError(f"{path}: this is no GGUF file: it does not begin with {MAGIC!r}")
    version = reader.number("I")
    if version not in (2, 3):
        raise FormatError(f"{path}: GGUF of version {version}: expected 2 or 3, little-endian")
    count, fields = reader.number("Q"), reader.number("Q")
    metadata: dict[str, str] = {}
    for _ in range(fields):
        key, kind = reader.text(), reader.number("I")
        if key in metadata:
            raise FormatError(f"{path}: the field {key!r} comes twice")
        metadata[key] = str(reader.value(kind))
    entries = [_entry(reader) for _ in range(count)]
    alignment = metadata.get("general.alignment", "32")
    if not alignment.isdecimal() or not 0 < int(alignment[:9]) < 1 << 20:
        raise FormatError(f"{path}: general.alignment is {alignment!r}: expected a number of bytes")
    start = -(-reader.at // int(alignment)) * int(alignment)
    return Source(path, Tensors(data, _places(entries, start, size, path)), metadata, None)


def _entry(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, type, offset) of a tensor."""
    name, axes = reader.text(), reader.number("I")
    if axes > 4:
        raise FormatError(f"{reader.path}: the tensor {name[:80]!r} has {axes} axes: GGUF has up to 4")
    shape = tuple(reader.number("Q") for _ in range(axes))[::-1]
    return name, shape, reader.number("I"), reader.number("Q")


def _places(entries: list[tuple[str, tuple[int, ...], int, int]], start: int, size: int,
            path: Path) -> dict[str, tuple[numpy.dtype[Any], tuple[int, ...], int]]:
    """Where each tensor lies, inside of the file, and no two in one place."""
    places: dict[str, tuple[numpy.dtype[Any], tuple[int, ...], int]] = {}
    taken = []
    for name, shape, kind, offset in entries:
        if kind not in TYPES:
            raise FormatError(f"{path}: the tensor {name[:80]!r} is of GGML's type {kind}: an adapter has F32, F16 or BF16. A "
                              "quantised one has lost what it was")
        if name in places:
            raise FormatError(f"{path}: the tensor {name[:80]!r} comes twice")
        dtype, numbers = array_dtype(TYPES[kind]), 1
        for n in shape:
            numbers *= n
        begin, end = start + offset, start + offset + numbers * dtype.itemsize
        if end > size:
            raise FormatError(f"{path}: {size:,} bytes, and the tensor {name[:80]!r} {shape} ends at byte {end:,}: was the "
                              "file copied whole?")
        places[name] = dtype, shape, begin
        taken.append((begin, end, name))
    taken.sort()
    for (_, end, one), (begin, _, two) in zip(taken, taken[1:]):
        if begin < end:
            raise FormatError(f"{path}: the tensors {one[:80]!r} and {two[:80]!r} lie in the same bytes")
    return places
