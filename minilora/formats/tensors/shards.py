"""A checkpoint in several files, and the index that says which tensor is in which.

    model-00001-of-00002.safetensors
    model-00002-of-00002.safetensors
    model.safetensors.index.json

The index is {"metadata": {"total_size": 420}, "weight_map": {"a.weight": "model-00001-of-00002.safetensors", ...}}.

A name in the index is the name of a file beside it, and nothing else: a path would lead out of the folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ...errors import FormatError
from .header import LONGEST_HEADER
from .members import Malformed, Members

__all__ = ["check_shards", "read_index"]

_SHOWN = 5


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
    text = Members(data, 0, len(data))
    weight_map: dict[str, str] | None = None
    problems: list[str] = []
    try:
        for name in text.names():
            if name != "weight_map":
                text.value(0)
            elif weight_map is not None:
                problems.append("weight_map is there twice")
                text.value(0)
            else:
                weight_map = _weight_map(text, problems)
        if text.next():
            raise text.fail("something behind the closing bracket")
    except Malformed as error:
        problems.append(f"it is no JSON object with a weight_map: {error}")
    if weight_map is None and not problems:
        problems.append('it has no "weight_map"')
    for file in sorted(set((weight_map or {}).values())):
        if not _is_a_name(file):
            problems.append(f"the file name {file!r:.80} is not the name of a file beside the index")
    if problems:
        raise FormatError(f"{path}: no index of shards: " + _some(problems, "; "))
    return weight_map or {}


def _weight_map(text: Members, problems: list[str]) -> dict[str, str]:
    weight_map: dict[str, str] = {}
    for name in text.names():
        if name in weight_map:
            problems.append(f"the tensor {name!r:.80} is there twice")
        if text.next() == b'"':
            weight_map[name] = text.string()
        else:
            problems.append(f"{name!r:.80}: expected the name of a file")
            text.value(0)
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
    problems = []
    for file, names in held.items():
        there = set(names)
        wanted = {name for name, where in weight_map.items() if where == file}
        if wanted - there:
            problems.append(f"{file} lacks {_some(sorted(map(repr, wanted - there)))}")
        if there - wanted:
            problems.append(f"{file} has {_some(sorted(map(repr, there - wanted)))}, which the index does not put there")
    if problems:
        raise FormatError(f"{path}: index and shards do not belong together: " + "; ".join(problems)
                          + ". Copy or download all of them again")


def _some(texts: list[str], between: str = ", ") -> str:
    more = f"{between}and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return between.join(text[:80] if between == ", " else text for text in texts[:_SHOWN]) + more
