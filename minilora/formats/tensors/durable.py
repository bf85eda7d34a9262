"""Files and folders that are replaced as a whole: whoever looks, and whenever the program is killed, finds the old or the new.

A file: written under another name in the same folder, brought to the disk (fsync), renamed over the old one, and the folder
brought to the disk, so that the name survives a power cut too.

A folder cannot be renamed over one that holds something. Linux (renameat2) and macOS (renamex_np) can exchange two names in
one step, which is used where the system and the disk know it. Elsewhere there are two steps, old name aside and new folder
in its place; a run that is killed between them leaves no folder of that name, and both of them complete beside it.
`recover_folder` then finishes the second step: every reader and every save of such a folder begins with it. The new folder
takes over, as links that cost no space, what the old one holds and it does not: files that others put there stay.

Leftovers of killed runs are removed by the next save to the same path. A run holds a lock (flock) on its temporary file or
folder, which ends with the run however it ends: that tells a leftover from the work of a run that is still going.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from ...errors import FileError
from .exchange import exchange
from .faults import file_error, place
from .temporary import beside, remove_leftovers, reserve_file, reserve_folder
from .tree import copy_mode, sync_folder, sync_tree, take_over

__all__ = ["new_file", "read_steadily", "recover_folder", "replace_file", "replace_folder"]


T = TypeVar("T")


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file anew: the block writes into a temporary one, which takes the place of the old one when the block ends.

    If the block raises, nothing has changed. The new file has the permissions of the old one, or those that the umask gives.
    A link is followed: what it points to is replaced.

    Raises
    ------
    FileError
        If the file cannot be written: no such folder, no permission, a full disk, or the path is a folder.

    Examples
    --------
    >>> with replace_file("numbers.txt") as file:
    ...     file.write(b"1 2 3")
    5
    >>> Path("numbers.txt").read_text()
    '1 2 3'
    """
    target = place(path)
    with _told(target):
        if target.is_dir():
            raise FileError(f"cannot write {str(path)!r}: this is a folder: give the path of a file inside it")
        if target.exists() and not target.is_file():
            raise FileError(f"cannot write {str(path)!r}: this is a pipe or device, which would be replaced by a file")
        if target.exists() and not os.access(target, os.W_OK):
            raise FileError(f"cannot write {str(path)!r}: the file is read-only: choose another name, or make it writable")
        remove_leftovers(target)
        temporary, descriptor = reserve_file(target)
    file = os.fdopen(descriptor, "wb")
    try:
        with _told(target):
            yield file
            file.flush()
            copy_mode(target, temporary)
            os.fsync(descriptor)
            if os.name == "nt":
                file.close()  # Windows renames no open file; elsewhere it stays open, and so locked
            os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            file.close()
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    file.close()
    sync_folder(target.parent)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file that is not there yet, and that nothing refers to before it is on the disk."""
    with _told(path), open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replace_folder(path: str | os.PathLike[str], drop: Iterable[str] = ()) -> Iterator[Path]:
    """Write a folder anew: the block writes into a temporary one, which takes the place of the old one when the block ends.

    If the block raises, nothing has changed. Missing parent folders are made. What the old folder holds and the block has
    not written is taken over, as links, but for the names in `drop`.

    Parameters
    ----------
    path : path-like
    drop : iterable of str
        Names of entries of the old folder that shall not stay, with ``*`` and ``?``: the other forms of what is written.

    Yields
    ------
    Path
        The temporary folder: empty, on the same disk.

    Raises
    ------
    FileError
        If the folder cannot be written or replaced: no permission, a full disk, a file of that name, a mounted folder, or
        the current working folder.
    """
    target = place(path)
    with _told(target):
        if target.exists() and not target.is_dir():
            raise FileError(f"cannot write {str(path)!r}: this is a file: give the path of a folder, or remove the file")
        if target.is_dir() and Path.cwd().is_relative_to(target):
            raise FileError(f"cannot write {str(path)!r}: it is, or holds, the current working folder, which would be "
                            "replaced: save into a folder inside it")
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_mount() or not os.access(target.parent, os.W_OK):
            why = "it is mounted" if target.is_mount() else f"{str(target.parent)!r} is not to be written to"
            raise FileError(f"cannot write {str(path)!r}: a new folder is made beside it and takes its place, and {why}: save "
                            "into a folder inside it")
        recover_folder(target)
        remove_leftovers(target)
        temporary, descriptor = reserve_folder(target)
    try:
        with _told(target):
            try:
                yield temporary
                dropped = tuple(drop)
                take_over(target, temporary, dropped)
                copy_mode(target, temporary)
                sync_tree(temporary)
                old = _put_in_place(temporary, target)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            sync_folder(target.parent)  # before anything of the old one is removed
            if old is not None:
                take_over(old, target, dropped)  # what others wrote into it meanwhile
                shutil.rmtree(old, ignore_errors=True)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def recover_folder(path: str | os.PathLike[str]) -> Path:
    """The folder at a path, after finishing a replacement that was killed between its two steps; see the module.

    Costs nothing where the folder exists.
    """
    target = place(path)
    if not target.exists() and target.parent.is_dir():
        for old in sorted(beside(target, "old")):
            new = old.with_suffix(".new")
            if new.is_dir():
                with contextlib.suppress(OSError), _told(target):
                    os.rename(new, target)
                    sync_folder(target.parent)
                break
    return target


def read_steadily(path: str | os.PathLike[str], read: Callable[[], T]) -> T:
    """What `read` gives, which opens the files of a folder, or those that an index names: all of one save.

    If the folder, or the index, was replaced meanwhile, whether `read` then failed or not, it is called again.
    """
    while True:
        before = _identity(recover_folder(path))
        try:
            result = read()
        except Exception:
            if _identity(place(path)) == before:
                raise
        else:
            if _identity(place(path)) == before:
                return result


def _identity(folder: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


@contextlib.contextmanager
def _told(target: Path) -> Iterator[None]:
    """What the system says in this block, as a `FileError`; what a caller's code says of another file goes through."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        named = error.filename
        if error.errno is None:
            raise  # not from the system
        if named is None or Path(os.fsdecode(named)).is_relative_to(target.parent):
            raise file_error(error, target, "write") from error
        raise


def _put_in_place(temporary: Path, target: Path) -> Path | None:
    """Give the new folder its name; where the old one is now, if there was one."""
    if not target.exists():
        os.rename(temporary, target)
        return None
    if exchange(temporary, target):
        return temporary
    new, old = temporary.with_suffix(".new"), temporary.with_suffix(".old")
    os.rename(temporary, new)  # complete from here on: `recover_folder` may finish what follows
    try:
        os.rename(target, old)
        os.rename(new, target)
    except OSError:
        if not new.exists():  # a reader has done it
            return old
        if not target.exists():
            os.rename(old, target)
        os.rename(new, temporary)
        raise
    return old
