"""A checkpoint in several files, and the index that says which tensor is in which.

    model-00001-of-00002.safetensors
    model-00002-of-00002.safetensors
    model.safetensors.index.json

The index is {"metadata": {"total_size": 420}, "weight_map": {"a.weight": "model-00001-of-00002.safetensors", ...}}.

A name in the index is the name of a file beside it, and nothing else: a path would lead out of the folder.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ...errors import FormatError
from .disguise import disguise
from .header import LONGEST_HEADER
from .members import Malformed, Members, Problems

__all__ = ["check_shards", "read_index"]

_LONGEST_VALUE = 65536  # bytes: a file name, or what else an index says of itself


def read_index(data: Any, path: Path) -> dict[str, str]:
    """The weight map of an index: tensor name to file name.

    Parameters
    ----------
    data : bytes-like
        The index.
    path : Path
        For messages.

    Raises
    ------
    FormatError
        If it is no index, a tensor is named twice, or a file name is more than a name.
    """
    if len(data) > LONGEST_HEADER:
        raise FormatError(f"{path}: {len(data)} bytes are too many for an index of shards (at most {LONGEST_HEADER})")
    text = Members(data, 0, len(data), "index")
    weight_map: dict[str, str] | None = None
    problems = Problems()
    try:
        for name in text.names():
            if name != "weight_map":
                text.value(_LONGEST_VALUE)
            elif weight_map is not None:
                raise text.fail("a second weight_map")
            else:
                weight_map = _weight_map(text, problems)
        text.skip_all("the closing bracket")
        if weight_map is None:
            problems.add('it has no "weight_map"')
        for file in sorted(set((weight_map or {}).values())):
            if not _is_a_name(file):
                problems.add(f"the file name {file!r:.80} is not the name of a file beside the index")
    except Malformed as error:
        problems.append(str(error))
    if problems and bytes(data[:1]) != b"{" and (other := disguise(path, data)):
        raise FormatError(f"{path}: {other}")
    if problems:
        raise FormatError(f"{path}: no index of the files of a checkpoint: {problems.listed()}")
    return weight_map or {}


def _weight_map(text: Members, problems: Problems) -> dict[str, str]:
    weight_map: dict[str, str] = {}
    for name in text.names():
        problems.give_up()
        if name in weight_map:
            problems.add(f"the tensor {name[:80]!r} is there twice")
        if text.next() == b'"':
            weight_map[name] = sys.intern(text.string(_LONGEST_VALUE))  # thousands of names of a few files
        else:
            problems.add(f"{name[:80]!r}: expected the name of a file")
            text.value(_LONGEST_VALUE)
    return weight_map


def _is_a_name(file: str) -> bool:
    """Whether a text names a file in any folder it is put in: no separator, drive or step up, on any system."""
    return (file not in ("", ".", "..") and "\0" not in file
            and PurePosixPath(file).name == file and PureWindowsPath(file).name == file)


def check_shards(path: Path, weight_map: Mapping[str, str], held: Mapping[str, Iterable[str]]) -> None:
    """Compare an index with what its files hold.

    Parameters
    ----------
    held : mapping of str to iterable of str
        File name to the names of the tensors in it.

    Raises
    ------
    FormatError
        With every tensor that is missing from the file that the index names, and every one that the index does not put there.
    """
    problems = Problems()
    for file, names in held.items():
        there = set(names)
        wanted = {name for name, where in weight_map.items() if where == file}
        if wanted - there:
            problems.add(f"{file} lacks {_some(wanted - there)}")
        if there - wanted:
            problems.add(f"{file} has {_some(there - wanted)}, which the index does not put there")
    if problems:
        raise FormatError(f"{path}: index and shards do not belong together: {problems.listed()}"
                          ". Copy or download all of them again")


def _some(names: set[str]) -> str:
    shown = [repr(name[:60]) for name in sorted(names)[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")
