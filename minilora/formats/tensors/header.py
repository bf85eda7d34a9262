"""The header of a safetensors file, and every rule that it must keep, checked before anything is made of it.

    8 bytes   n, little-endian
    n bytes   JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__": {"key": "text"}}
    the rest  the numbers, little-endian, in C order

The tensors lie one behind the other: sorted by their offsets each begins where the one before ends, the first at 0, the last
one ends where the file does. So no byte belongs to two tensors, and none to no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import FormatError
from .disguise import disguise
from .dtypes import DTYPES
from .members import Malformed, Members, Pairs, Problems

__all__ = ["Entry", "Header", "LONGEST_HEADER", "read_header"]

LONGEST_HEADER = 100_000_000  # bytes: the limit of the format's own readers
_LONGEST_ENTRY = 4096         # bytes of the description of one tensor; one of 64 axes has 1500
_AXES = 64                    # more no array of NumPy has
_LARGEST = 2**63
_FIELDS = ("dtype", "shape", "data_offsets")


class Entry(NamedTuple):
    """Where a tensor lies: bytes `begin` to `end`, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What the header of a file says, checked.

    Attributes
    ----------
    entries : mapping of str to Entry
        In the order in which they lie in the file. Names are data: they may hold anything, and are never paths.
    metadata : mapping of str to str
    start : int
        The byte of the file at which the numbers begin.
    """

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    start: int


def read_header(data: Any, path: Path) -> Header:
    """Read and check the header of a file.

    Parameters
    ----------
    data : bytes-like
        The whole file, such as a map of it: of the numbers nothing is read.
    path : Path
        For messages.

    Raises
    ------
    FormatError
        If the file breaks a rule of the format, with the first five of its faults; or if it is something else.
    """
    size = len(data)
    if size < 8 or (n := int.from_bytes(data[:8], "little")) > min(LONGEST_HEADER, size - 8):
        raise FormatError(f"{path}: {disguise(path, data) or _length_problem(size, bytes(data[:8]))}")
    text = Members(data, 8, 8 + n, "header")
    problems = Problems()
    metadata: dict[str, str] = {}
    found: dict[str, Entry | None] = {}  # None: refused
    try:
        for name in text.names():
            problems.give_up()
            if name in found:
                problems.add(f"the name {_short(name)} is there twice")
            found[name] = None
            if name == "__metadata__":
                metadata = _metadata(text, problems)
            elif isinstance(entry := _entry(text.value(_LONGEST_ENTRY)), Entry):
                found[name] = entry
            else:
                problems.add(f"{_short(name)}: {entry}")
        text.skip_all("the object of tensors")
    except Malformed as error:
        problems.append(str(error))
        other = "" if found else disguise(path, data)
        raise FormatError(f"{path}: {other or _list(problems, size)}") from None
    in_order = sorted((entry.begin, entry.end, name, entry) for name, entry in found.items() if entry is not None)
    entries = {name: entry for _, _, name, entry in in_order}
    if not problems:  # else a hole may be where a tensor was refused
        _check_tiling(entries, size - 8 - n, problems)
    if problems:
        raise FormatError(f"{path}: {_list(problems, size)}")
    return Header(entries, metadata, 8 + n)


def _length_problem(size: int, first: bytes) -> str:
    """Why the first eight bytes cannot be the length of a header."""
    if size < 8:
        return f"the file has {size} bytes, and a safetensors file at least 8: it was cut off; copy or download it again"
    n = int.from_bytes(first, "little")
    if n > LONGEST_HEADER:
        return (f"the first 8 bytes ask for a header of {n} bytes, more than the limit of {LONGEST_HEADER}, and the file has "
                f"{size}: it is no safetensors file, or damaged")
    return f"the header asks for {n + 8} bytes, and the file has {size}: it was cut off; copy or download it again"


def _list(problems: Problems, size: int) -> str:
    return f"no valid safetensors file ({size} bytes): {problems.listed()}. Copy or download it again"


def _short(name: object) -> str:
    text = repr(name[:80] if isinstance(name, str) else name)
    return text if len(text) <= 80 else text[:76] + " ..."


def _metadata(text: Members, problems: Problems) -> dict[str, str]:
    """The metadata of a file: texts only. null is none; a writer whose field is optional writes that."""
    if text.next() != b"{":
        value = text.value(_LONGEST_ENTRY)
        if value is not None:
            problems.add(f"__metadata__ must be an object of texts, got {_short(value)}")
        return {}
    metadata: dict[str, str] = {}
    for key in text.names():
        problems.give_up()
        if key in metadata:
            problems.add(f"__metadata__ has {_short(key)} twice")
        metadata[key] = ""
        if text.next() == b'"':
            metadata[key] = text.string(LONGEST_HEADER)
        else:
            problems.add(f"__metadata__: {_short(key)} must have a text, got {_short(text.value(_LONGEST_ENTRY))}")
    return metadata


def _entry(value: Any) -> Entry | str:
    """One tensor's description, or what is wrong with it."""
    if not isinstance(value, Pairs):
        return f"expected an object with {', '.join(_FIELDS)}, got {_short(value)}"
    fields = dict(value)
    if len(value) > len(fields) or set(fields) != set(_FIELDS):
        return f"expected the fields {', '.join(_FIELDS)}, each once, got {_short(', '.join(name for name, _ in value))}"
    dtype, shape, offsets = (fields[name] for name in _FIELDS)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"unknown dtype {_short(dtype)}: expected one of {', '.join(DTYPES)}"
    if not _whole_numbers(shape):
        return f"its shape must be a list of whole numbers from 0 to 2^63 - 1, got {_short(shape)}"
    if len(shape) > _AXES:
        return f"it has {len(shape)} axes, and an array at most {_AXES}"
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"its data_offsets must be two whole numbers, begin <= end, got {_short(offsets)}"
    bits = DTYPES[dtype].bits
    count = room = 1
    for length in shape:
        count *= length
        room *= length or 1
    if room * bits // 8 >= _LARGEST:
        return f"its shape {_short(shape)} is more than any memory holds"
    begin, end = offsets
    if count * bits % 8:
        return f"{count} numbers of {bits} bits ({dtype} {_short(shape)}) do not end at a whole byte"
    if count * bits // 8 != end - begin:
        return f"{dtype} {_short(shape)} has {count * bits // 8} bytes, its data_offsets {begin} to {end} have {end - begin}"
    return Entry(dtype, tuple(shape), begin, end)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < _LARGEST for number in value)


def _check_tiling(entries: Mapping[str, Entry], size: int, problems: Problems) -> None:
    """Note where tensors, in the order of their offsets, overlap, leave a hole, or do not end with the file."""
    at, before = 0, "the beginning"
    for name, entry in entries.items():
        if entry.begin < at:
            problems.add(f"{_short(name)} begins at byte {entry.begin}, inside {before}, which ends at {at}")
        elif entry.begin > at:
            problems.add(f"bytes {at} to {entry.begin} between {before} and {_short(name)} belong to no tensor")
        at, before = max(at, entry.end), _short(name)
    if at > size:
        problems.add(f"the tensors ask for {at} bytes behind the header, and the file has {size}: it was cut off")
    elif at < size:
        problems.add(f"the tensors end at byte {at} behind the header, and the file at {size}: {size - at} too many")
