"""Checkpoints as mappings of names to arrays that lie in the file: nothing is copied, nothing is read before it is used.

The safetensors library copies every tensor that it gives to NumPy, and knows no bfloat16 there. A view needs only the offsets
that the check of the header has read anyway, so the arrays come from a memory map of ours; the library is the oracle of the
tests, in both directions.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from ...errors import FileError, FormatError
from .disguise import disguise
from .dtypes import array_dtype, check_byte_order
from .durable import read_steadily
from .faults import file_error
from .header import Entry, Header, read_header
from .shards import check_shards, read_index

__all__ = ["Part", "StateFile", "load_state", "open_state"]


class Part(NamedTuple):
    """One file: its bytes, mapped, and what they mean."""

    path: Path
    data: Any
    header: Header


class StateFile(Mapping[str, numpy.ndarray]):
    """The tensors of a checkpoint: a mapping of names to read-only arrays that lie in the mapped file, or files.

    Made by `open_state`. Names, shapes and dtypes cost nothing; an array is made when it is asked for, and the system reads
    its numbers when they are used. They stay those of the file that was opened, also when it is replaced by another
    (`save_state` replaces). They are gone where a program shortens or overwrites it in place.

    Attributes
    ----------
    path : Path
    shapes : dict of str to tuple of int
    dtypes : dict of str to str
        The names of the file: ``"F32"``, ``"BF16"``.
    metadata : dict of str to str
        Of several files that of all together; where they differ, that of the first.
    parts : tuple of Part
        The files: path, mapped bytes, and header.
    """

    def __init__(self, path: Path, parts: list[Part], index: bool) -> None:
        self.path, self.parts = path, tuple(parts)
        self._index = index
        self._places = {name: (part, entry) for part in parts for name, entry in part.header.entries.items()}
        self.shapes = {name: entry.shape for name, (_, entry) in self._places.items()}
        self.dtypes = {name: entry.dtype for name, (_, entry) in self._places.items()}
        self.metadata: dict[str, str] = {}
        for part in reversed(parts):
            self.metadata.update(part.header.metadata)

    def __getitem__(self, name: str) -> numpy.ndarray:
        part, entry = self._places[name]
        try:
            return _view(part, entry)
        except FormatError as error:
            raise FormatError(f"{part.path}: {name!r}: {error}") from error.__cause__

    def place(self, name: str) -> tuple[Part, Entry]:
        """The file that a tensor lies in, and where in it."""
        return self._places[name]

    def let_go(self, name: str, begin: int, end: int) -> None:
        """Tell the system that bytes `begin` to `end` of a tensor are not needed for now: what was read of them leaves the
        memory of this process. They can be read again at any time."""
        part, entry = self._places[name]
        start = part.header.start + entry.begin
        low = (start + begin) // mmap.PAGESIZE * mmap.PAGESIZE
        high = min((start + end) // mmap.PAGESIZE * mmap.PAGESIZE, len(part.data))
        if high > low and hasattr(mmap, "MADV_DONTNEED"):
            part.data.madvise(mmap.MADV_DONTNEED, low, high - low)

    def __contains__(self, name: object) -> bool:
        return name in self._places  # without making an array

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"<StateFile {str(self.path)!r}: {len(self)} tensors>"

    def __reduce__(self) -> Any:
        return open_state, (self.path.absolute(), self._index)  # a copy, or another process, opens the file again


def open_state(path: str | os.PathLike[str], index: bool | None = None) -> StateFile:
    """Open a safetensors file, or the index of a checkpoint in several, without reading the numbers.

    Every rule of the format is checked before the first array is made: see `header`.

    Parameters
    ----------
    path : path-like
        A file ``*.safetensors``, or an index ``*.index.json``, whose shards lie beside it.
    index : bool, optional
        Whether the file is an index; by default, whether its name ends in ``.json``.

    Returns
    -------
    StateFile
        A mapping of names to read-only arrays. BF16 and F8 are dtypes of the package ml_dtypes.

    Raises
    ------
    FileError
        If a file cannot be opened.
    FormatError
        If it is no safetensors file, breaks a rule of the format, or index and shards do not belong together.

    Examples
    --------
    >>> import minilora, numpy
    >>> minilora.formats.save_state("numbers.safetensors", {"a": numpy.arange(3.0)})
    >>> state = open_state("numbers.safetensors")
    >>> state["a"], state.dtypes["a"]
    (array([0., 1., 2.]), 'F64')
    """
    place = Path(os.fsdecode(path))
    check_byte_order(place)
    if not (place.suffix == ".json" if index is None else index):
        return StateFile(place, [_part(place)], False)
    return read_steadily(place, lambda: _sharded(place))


def load_state(path: str | os.PathLike[str]) -> dict[str, numpy.ndarray]:
    """The tensors of a safetensors file, or of an index and its shards, as arrays of your own that can be written to.

    `open_state` gives the same numbers without copying them.

    Parameters
    ----------
    path : path-like
        A file ``*.safetensors``, or an index ``*.index.json``.

    Returns
    -------
    dict of str to numpy.ndarray
        On the host.

    Raises
    ------
    FileError, FormatError
        See `open_state`.

    Examples
    --------
    >>> import minilora, numpy
    >>> minilora.formats.save_state("numbers.safetensors", {"a": numpy.ones(2)})
    >>> minilora.formats.load_state("numbers.safetensors")
    {'a': array([1., 1.])}
    """
    return {name: numpy.array(array) for name, array in open_state(path).items()}


def _sharded(place: Path) -> StateFile:
    """The checkpoint of an index."""
    weight_map = read_index(_mapped(place), place)
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (place.parent / file).is_file()]
    if missing:
        raise FileError(f"{place}: {len(missing)} of {len(files)} files of this checkpoint are not beside it: "
                        f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}. Copy or download them too")
    parts = [_part(place.parent / file) for file in files]
    check_shards(place, weight_map, {part.path.name: part.header.entries for part in parts})
    return StateFile(place, parts, True)


def _part(path: Path) -> Part:
    data = _mapped(path)
    return Part(path, data, read_header(data, path))


def _mapped(path: Path) -> Any:
    """The bytes of a file, mapped read-only: pages of the system's cache, none of our own."""
    try:
        if path.is_dir():
            raise FileError(_folder(path))
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for whoever fills it
            raise FileError(f"cannot read {str(path)!r}: this is no file but a pipe or device")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise FormatError(f"{path}: {disguise(path, b'')}")  # nothing that could be mapped
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileError:
        raise
    except OSError as error:
        raise file_error(error, path, "read") from error
    except ValueError as error:  # a zero byte in the path; or a file that is gone meanwhile
        if isinstance(error, FormatError):
            raise
        raise FileError(f"cannot read {str(path)!r}: {error}") from error


def _folder(path: Path) -> str:
    """What to say about a folder that was given in the place of a file."""
    found = sorted(file.name for ending in ("*.safetensors", "*.index.json") for file in path.glob(ending))
    inside = f"give one of the files in it: {', '.join(found[:5])}" if found else "and there is no safetensors file in it"
    return f"cannot read {str(path)!r}: this is a folder, {inside}"


def _view(part: Part, entry: Entry) -> numpy.ndarray:
    """The array that an entry describes, where it lies. At an odd offset it is not aligned: right, and slow in products."""
    array: numpy.ndarray = numpy.ndarray(entry.shape, array_dtype(entry.dtype), part.data, part.header.start + entry.begin)
    if entry.dtype == "BOOL" and array.view("uint8").max(initial=0) > 1:
        raise FormatError("a truth value that is neither 0 nor 1: the file is damaged")  # NumPy would count it wrongly
    return array
