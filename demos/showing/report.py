"""The report of a run: JSON that is on the disk whole or not at all, also when the run is interrupted, fails or is killed."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shlex
import time
from collections.abc import Iterator
from typing import Any

import numpy

from minilora.errors import DivergedError, FileError

__all__ = ["plain", "recording", "save", "write"]

CURES = {
    errno.EACCES: "chmod u+w {folder}, or choose another folder",
    errno.EPERM: "chmod u+w {folder}, or choose another folder",
    errno.EROFS: "choose another folder",
    errno.ENOSPC: "free some space (df -h {folder} shows it), or choose another folder",
    errno.EDQUOT: "free some of your space, or choose another folder",
    errno.EFBIG: "raise the limit (ulimit -f unlimited)",
    errno.ENOENT: "mkdir -p {folder}",
    errno.ENOTDIR: "a part of this path is a file: move it away, or choose another folder",
    errno.EEXIST: "a file has this name: move it away, or choose another folder",
    errno.EISDIR: "a folder has this name: move it away, or choose another folder",
}


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file, whole or not at all.

    The bytes go to a new file in the same folder (a rename across file systems would be a copy), are brought to the disk,
    and take the name `path` in one step. Whoever reads `path` sees the old bytes or the new ones, also after a crash in
    between; all that a killed process leaves behind is a file that ends in ``.part``.

    Parameters
    ----------
    path : str or path
        A symbolic link is followed: the file it names is replaced.
    data : bytes

    Raises
    ------
    minilora.errors.FileError
        It cannot be written: what, why, and what helps. The old file is as it was.
    """
    target = os.path.realpath(path)
    part = f"{target}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        raise refused(target, error) from error
    finally:
        with contextlib.suppress(OSError):  # gone: renamed, or never made
            os.unlink(part)
    sync_folder(os.path.dirname(target))


def sync_folder(folder: str) -> None:
    """Bring the new name to the disk. Some systems cannot (Windows, network drives); the file is in its place all the same."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def refused(path: str, error: OSError) -> FileError:
    """The error that says what could not be written, why, and what helps."""
    cure = CURES.get(error.errno or 0, "choose another folder")
    folder = shlex.quote(os.path.dirname(path) or ".")
    return FileError(f"cannot write {path}: {error.strerror or error}: {cure.format(folder=folder)}")


def save(path: str | os.PathLike[str], report: dict[str, Any]) -> None:
    """Write a report as JSON, whole or not at all. What is stored is `plain` of it, in ASCII."""
    write(path, (json.dumps(plain(report), indent=2, allow_nan=False) + "\n").encode("ascii"))


def plain(value: Any, where: str = "report") -> Any:
    """A value as JSON has it.

    NumPy's numbers become Python's, arrays, tuples and lists become lists, paths become texts. JSON has no NaN and no
    infinity: each becomes None (``null``).

    Raises
    ------
    TypeError
        A value that JSON has no form for, an array on a GPU among them, with its place in the report.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numpy.bool_):
        return bool(value)
    if isinstance(value, (int, numpy.integer)):
        return int(value)
    if isinstance(value, (float, numpy.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, numpy.ndarray):
        return plain(value.tolist(), where)
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        return plain_items(value, where)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise TypeError(f"{where} is a {kind}, and JSON has no such value: store numbers, texts, lists or dicts; of a tensor "
                    "or an array of another device store minilora.to_host(it)")


def plain_items(values: dict[Any, Any], where: str) -> dict[str, Any]:
    """A dict as JSON has it: its keys are texts. Numbers become texts; two keys that would become one are refused."""
    items: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(key, (str, int, numpy.integer)) or isinstance(key, bool):
            raise TypeError(f"{where} has the key {key!r}: the keys of a JSON object are texts, write {str(key)!r}")
        if str(key) in items:
            raise TypeError(f"{where} has two keys that are {str(key)!r} as a text: rename one of them")
        items[str(key)] = plain(value, f"{where}[{key!r}]")
    return items


@contextlib.contextmanager
def recording(path: str | os.PathLike[str], report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Keep a report of what runs inside: saved at once, and again at the end, whatever that is.

    The first save makes the folder and finds out, before any work, whether it can be written to. At the end ``"seconds"``
    and ``"status"`` are filled in: "finished", "interrupted" (Ctrl-C), "failed", "diverged: ..." where `minilora.train` says
    so, or what the exception has as its `status`.
    A status that was set inside is kept if nothing was raised.

    Parameters
    ----------
    path : str or path
        Of the JSON file.
    report : dict
        Grows while the work is done; what it holds when an exception comes is what is known.

    Examples
    --------
    >>> import tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "report.json")
    >>> with recording(path, {"steps": 0}) as report:
    ...     report["steps"] = 100
    >>> with open(path) as file:
    ...     json.load(file)["status"]
    'finished'
    """
    began, report["status"] = time.perf_counter(), "running"
    try:
        os.makedirs(os.path.dirname(os.path.realpath(path)), exist_ok=True)
    except OSError as error:
        raise refused(os.path.realpath(path), error) from error
    save(path, report)
    try:
        yield report
        if report["status"] == "running":
            report["status"] = "finished"
    except BaseException as error:
        told = f"diverged: {error}" if isinstance(error, DivergedError) else getattr(error, "status", "failed")
        report["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else told
        raise
    finally:
        report["seconds"] = time.perf_counter() - began
        save(path, report)
