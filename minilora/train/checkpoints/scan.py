"""The checkpoints of a run: which there are, which is the newest, and which stay.

No file says which is the newest: a pointer can be wrong. The names say it, and each checkpoint whether it is whole.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from ...errors import FileError, FormatError
from ...formats.tensors.durable import recover_folder
from ...formats.tensors.faults import file_error
from ...formats.tensors.temporary import remove_leftovers
from ...formats.tensors.tree import sync_folder
from .files import Saved, read, whole

__all__ = ["ROOM", "holds_run", "newest", "place_of", "remove_others", "somebody_elses", "steps"]

ROOM = "checkpoints"
_NAME = re.compile(r"step-([0-9]{6,18})")
_LEFT = re.compile(r"\.(step-[0-9]{6,18})\.[0-9a-f]{16}\.(tmp|new|old)")  # a save that was killed; see formats' `durable`
_GONE = ".gone-"  # a checkpoint that is being removed
METRICS = "metrics.jsonl"


def place_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return folder / ROOM / f"step-{step:06d}"


def steps(folder: Path) -> list[int]:
    """The steps of which there are checkpoints, damaged ones too, the newest last."""
    room = folder / ROOM
    try:
        names = sorted(path.name for path in room.iterdir()) if room.is_dir() else []
    except OSError as error:
        raise file_error(error, room, "read") from error
    for name in {found[1] for found in map(_LEFT.fullmatch, names) if found}:
        recover_folder(room / name)
        names.append(name)
    found = {int(match[1]) for match in map(_NAME.fullmatch, names) if match}
    return sorted(step for step in found if place_of(folder, step).is_dir())


def holds_run(folder: Path) -> bool:
    """Whether something was trained in a folder: what failed before its first step, for a mistake say, may be begun again."""
    metrics = folder / METRICS
    return any(steps(folder)) or metrics.is_file() and metrics.stat().st_size > 0


def somebody_elses(folder: Path) -> list[str]:
    """The names of weights and configs in a folder in which nothing was trained: a run would write over them at its end."""
    if holds_run(folder):
        return []
    return sorted(path.name for pattern in ("*.safetensors", "*config.json") for path in folder.glob(pattern))


def newest(folder: Path) -> Saved | None:
    """The newest checkpoint, whole; None if there is none.

    Raises
    ------
    FileError, FormatError
        If the newest is damaged. It is not passed over in silence: the message says which one before it is whole, and how to
        go on from there.
    """
    found = steps(folder)
    if not found:
        return None
    last = place_of(folder, found[-1])
    try:
        return read(last)
    except (FileError, FormatError) as error:
        before = next((step for step in reversed(found[:-1]) if whole(place_of(folder, step))), None)
        if before is None:
            cure = "No other checkpoint of this run is whole: start it anew, in another folder"
        else:
            bad = [place_of(folder, step) for step in found if step > before]
            cure = (f"{place_of(folder, before)} is whole: to go on from there, remove what is damaged, "
                    f"rm -r {' '.join(map(str, bad))}, and resume again")
        raise type(error)(f"{error}. {cure}") from error


def remove_others(folder: Path, stay: Collection[int]) -> None:
    """Remove all checkpoints but those of these steps, each under another name first: none is ever seen half removed.

    What killed saves left goes too, also of a step that is not saved again.
    """
    room = folder / ROOM
    for left in {found[1] for found in map(_LEFT.fullmatch, os.listdir(room)) if found}:
        remove_leftovers(room / left)
    for step in steps(folder):
        if step not in stay:
            gone = room / f"{_GONE}{step}"
            with contextlib.suppress(OSError):  # it costs room, and no more: the next time
                shutil.rmtree(gone, ignore_errors=True)
                place_of(folder, step).rename(gone)
    sync_folder(room)
    for path in room.glob(f"{_GONE}*"):
        shutil.rmtree(path, ignore_errors=True)
