"""One checkpoint on the disk: state.safetensors and state.json in a folder, replaced as a whole.

    state.json   {"format": 1, "sum": SHA-256 of the rest of this object, "arrays": SHA-256 of state.safetensors,
                  "contents": plain values, "identity": what the checkpoint belongs to}

JSON in the one spelling that `spelled` gives it. So every damaged byte is found, of the numbers too, and nothing is taken from
a file that is not the one that was written. The sums are no proof against somebody who wants to mislead: what the values are is
checked besides, as of any file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import FileError, FormatError
from ...formats.tensors.durable import new_file, recover_folder, replace_folder
from ...formats.tensors.faults import file_error
from ...formats.tensors.reading import open_state
from ...formats.tensors.writing import save_state
from .contents import Contents

__all__ = ["ARRAYS", "FORMAT", "Saved", "VALUES", "read", "write"]

FORMAT = 1
ARRAYS, VALUES = "state.safetensors", "state.json"
PIECE = 1 << 22
LARGEST = 1 << 26  # bytes of state.json: of a million reports it has 30 MB


class Saved(NamedTuple):
    """A checkpoint that was read, and is whole."""

    folder: Path
    contents: Contents
    identity: Mapping[str, Any]


def spelled(values: Any) -> bytes:
    """The one spelling of plain values. Python's floats come back to the last bit."""
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def summed(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            found.update(piece)
    return found.hexdigest()


def write(folder: Path, contents: Contents, identity: Mapping[str, Any], room: int = 0) -> None:
    """Write a checkpoint: whole and on the disk, or not at all.

    Parameters
    ----------
    room : int
        Bytes that later checkpoints will have and this one has not: their place on the disk is tried out.

    Raises
    ------
    FileError
        If it cannot be written.
    FormatError
        If it holds numbers that the format has no type for.
    """
    with replace_folder(folder, drop=("*",)) as new:
        _try_room(new / "room", room)
        save_state(new / ARRAYS, contents.arrays)
        values = {"format": FORMAT, "arrays": summed(new / ARRAYS), "contents": contents.values, "identity": identity}
        with new_file(new / VALUES) as file:
            file.write(spelled({**values, "sum": hashlib.sha256(spelled(values)).hexdigest()}))


def _try_room(path: Path, size: int) -> None:
    """Write so many bytes, and remove them: a disk, or a quota, that has no room for them says so."""
    if size <= 0:
        return
    with open(path, "xb") as file:
        for start in range(0, size, PIECE):
            file.write(bytes(min(PIECE, size - start)))
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def read(folder: Path) -> Saved:
    """Read a checkpoint and check every byte of it.

    Raises
    ------
    FileError, FormatError
        If it is not whole, or of another version.
    """
    recover_folder(folder)
    values = _values(folder / VALUES)
    arrays = folder / ARRAYS
    state = open_state(arrays)  # a sound header first: its faults say more than a sum
    try:
        found = summed(arrays)
    except OSError as error:
        raise file_error(error, arrays, "read") from error
    if found != values.get("arrays"):
        raise FormatError(f"{arrays}: its bytes are not those that were written: it was damaged, or is of another checkpoint")
    contents, identity = values.get("contents"), values.get("identity")
    if not isinstance(contents, dict) or not isinstance(identity, dict) or \
            not {"step", "optimizer", "scheduler", "losses", "evaluations", "best"} <= contents.keys():
        raise FormatError(f"{folder / VALUES}: it lacks a part of a run's state: it was not written by minilora")
    return Saved(folder, Contents(state, contents), identity)


def _values(path: Path) -> dict[str, Any]:
    """The object in state.json."""
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise FormatError(f"{path}: {size} bytes: no run has so much to say, it was not written by minilora")
        data = path.read_bytes()
    except OSError as error:
        raise file_error(error, path, "read") from error
    values: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(data)
    if isinstance(values, dict) and type(values.get("format")) is int and values["format"] != FORMAT:
        raise FormatError(f"{path}: a checkpoint of version {values['format']}, and this minilora reads version {FORMAT}: go "
                          "on with the minilora that wrote it, or start the run anew in another folder")
    if not isinstance(values, dict) or not _is_sound(values, data):
        raise FormatError(f"{path}: its {len(data)} bytes are not those that were written: it was damaged or cut off")
    return values


def _is_sound(values: dict[str, Any], data: bytes) -> bool:
    """Whether these values, which `data` was read as, are spelled as written, and have the sum that they name."""
    rest = {key: value for key, value in values.items() if key != "sum"}
    try:
        return spelled(values) == data and hashlib.sha256(spelled(rest)).hexdigest() == values.get("sum")
    except (ValueError, RecursionError):  # half of a surrogate pair
        return False


def whole(folder: Path) -> bool:
    """Whether a checkpoint can be read."""
    try:
        read(folder)
    except (FileError, FormatError):
        return False
    return True
