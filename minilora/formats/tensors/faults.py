"""What the operating system says about a file, as one sentence that says what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from ...errors import DTypeError, FileError

__all__ = ["file_error", "place"]

_SENTENCES = {
    errno.ENOENT: "there is no such file or folder: check the spelling",
    errno.ENOSPC: "the disk is full: free space on it, or choose a folder on another one",
    errno.EDQUOT: "the quota of this disk is used up: free space on it, or choose a folder on another one",
    errno.EFBIG: "the file would be larger than the system allows: raise the limit (ulimit -f), or save it in parts with "
                 "max_shard_bytes=...",
    errno.EACCES: "permission is denied: change the permissions, or choose another folder",
    errno.EPERM: "the system does not permit it: change the permissions, or choose another folder",
    errno.EROFS: "this disk is read-only: choose a folder on another one",
    errno.EEXIST: "a file is in the way: remove it, or choose another name",
    errno.ENOTDIR: "a part of this path is a file, not a folder: check the spelling",
    errno.EISDIR: "this is a folder: give the path of a file",
    errno.ENAMETOOLONG: "the name is too long for this disk: choose a shorter one",
    errno.EBUSY: "it is in use (a mounted folder, say): choose a folder inside it",
    errno.EXDEV: "it is a mounted folder, which cannot be renamed: choose a folder inside it",
    errno.EMFILE: "this program has too many files open: raise the limit (ulimit -n), or drop what is no longer used",
    errno.ELOOP: "the links on this path go in a circle",
}


def file_error(error: OSError, path: str | os.PathLike[str], doing: str) -> FileError:
    """The error to raise in the place of `error`: what was being done, which file, why not, and what helps.

    Parameters
    ----------
    doing : str
        ``"read"``, ``"write"`` ...: the sentence begins "cannot read ...".
    """
    said = _SENTENCES.get(error.errno or 0, error.strerror or str(error))
    told = FileError(f"cannot {doing} {str(path)!r}: {said}")
    told.errno = error.errno
    return told


def place(path: str | os.PathLike[str]) -> Path:
    """A path with its links followed, so that what a link points to is meant and not the link."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise DTypeError(f"expected the path of a file or folder, got {type(path).__name__}: the path comes first, as in "
                         "formats.save_state(path, tensors)")
    text = os.fsdecode(path)
    if "\0" in text:
        raise FileError(f"{text!r} is no path: it holds a zero byte")
    if not text:
        raise FileError("the path is empty: give the path of a file or folder")
    return Path(os.path.realpath(text))
