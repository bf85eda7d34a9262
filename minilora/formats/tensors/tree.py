"""The contents of a folder as a whole: taken over into another, and brought to the disk."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import shutil
import stat
from pathlib import Path

__all__ = ["copy_mode", "sync_folder", "sync_tree", "take_over"]


def copy_mode(old: Path, new: Path) -> None:
    """The permissions of what is replaced, if there is something."""
    with contextlib.suppress(FileNotFoundError, PermissionError):  # a disk without permissions
        os.chmod(new, stat.S_IMODE(os.stat(old).st_mode))


def take_over(old: Path, new: Path, drop: tuple[str, ...]) -> None:
    """Give `new` what `old` has and it has not: a second link to the same file, so that nothing is copied and a log that is
    open for writing goes on in both. What is in both is the new one's, but for folders, which are gone through."""
    if not old.is_dir():
        return
    for entry in _entries(old):
        target = new / entry.name
        if any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in drop):
            continue
        if entry.is_dir(follow_symlinks=False):
            if not os.path.lexists(target):
                target.mkdir()
                copy_mode(Path(entry.path), target)
            if target.is_dir():
                take_over(Path(entry.path), target, ())
        elif not os.path.lexists(target):
            try:
                os.link(entry.path, target, follow_symlinks=False)
            except (OSError, NotImplementedError):  # a disk without links, or a file that may not be linked to
                shutil.copy2(entry.path, target, follow_symlinks=False)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def sync_tree(folder: Path) -> None:
    """Bring a folder and all in it to the disk. What is there already costs nothing."""
    for entry in _entries(folder):
        if entry.is_dir(follow_symlinks=False):
            sync_tree(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            _sync_file(entry.path)
    sync_folder(folder)


def _sync_file(path: str) -> None:
    try:
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    except PermissionError:
        return  # taken over from the old folder, and not ours to read
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk."""
    if os.name == "nt":
        return  # there a rename is written through
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a disk that knows no such call
            raise
    finally:
        os.close(descriptor)
