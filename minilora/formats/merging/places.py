"""Where a result may go: never over what it is made from, never over something else unasked, and only if it fits."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from ...errors import ConfigError, FileError
from ...flags import option
from ..tensors.faults import place
from ..tensors.durable import recover_folder

__all__ = ["DROPPED", "check_out", "check_room"]

# Of a folder that is replaced: the forms of weights, and what says how to read them, which might be taken for the new ones'.
DROPPED = ("*.safetensors", "*.index.json", "minilora_merge.json", "modules.json")


def check_out(out: str | os.PathLike[str], inputs: Iterable[Path], overwrite: bool) -> Path:
    """The folder to write. Raise if it is, holds, or lies in one of the inputs, or if something is there already."""
    target = recover_folder(place(out))
    if target.suffix in (".safetensors", ".json"):
        raise ConfigError(f"{os.fspath(out)!r}: the result is a folder (weights, config, patch ...): give a name for one")
    there = {(found.st_dev, found.st_ino) for name in (target.rglob("*") if target.is_dir() else ())
             if not name.is_symlink() and (found := name.stat())}
    for given in inputs:
        source = place(given)
        if source == target or (target.exists() and source.exists() and os.path.samefile(source, target)):
            raise FileError(f"cannot write {os.fspath(out)!r}: this is {str(given)!r}, from which the result is made: choose "
                            "another folder")
        if source.is_relative_to(target) or (source.is_dir() and target.is_relative_to(source)):
            raise FileError(f"cannot write {os.fspath(out)!r}: it lies in, or holds, {str(given)!r}, from which the result is "
                            "made: choose a folder beside it")
        files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
        same = next((path for path in files if (path.stat().st_dev, path.stat().st_ino) in there), None)
        if same is not None:
            raise FileError(f"cannot write {os.fspath(out)!r}: a file in it is {str(same)!r} under another name (a hard link), "
                            "from which the result is made: choose another folder")
    if os.path.lexists(target) and not overwrite:
        raise FileError(f"cannot write {os.fspath(out)!r}: it exists. To replace it: "
                        f"{option('overwrite=True', '--overwrite')}; it stays "
                        "until the new one is whole")
    return target


def check_room(target: Path, needed: int) -> None:
    """Raise if the disk has less free space than so many bytes."""
    folder = next(parent for parent in target.parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FileError(f"cannot write {str(target)!r}: it needs {needed / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB "
                        "free: free space on it, or choose a folder on another one")
