"""One process in a run's folder: a lock file that says which. It stands beside the folder, which is replaced as a whole.

The lock is the system's (flock), which ends with the process however that ends: a file that a killed run left behind is no
lock, and no process that got the number of a dead one is mistaken for it. Where a disk knows no such lock, the number in the
file decides, if it is of this machine.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from ...errors import FileError
from ...formats.tensors.faults import file_error

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["alone", "lock_of"]


def lock_of(folder: Path) -> Path:
    """The lock file of a folder."""
    return folder.with_name(os.fsdecode(b"." + os.fsencode(folder.name)[:240] + b".lock"))


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a run's folder; its parents are made if they are not there.

    Raises
    ------
    FileError
        If another process holds it, or the folder cannot be written to.
    """
    path = lock_of(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _taken(path)
    except FileError:
        raise
    except OSError as error:
        raise file_error(error, path, "write") from error
    try:
        yield
    finally:
        if os.name == "nt":
            os.close(descriptor)  # an open file has no end there
        with contextlib.suppress(OSError):
            path.unlink()
        if os.name != "nt":
            os.close(descriptor)


def _taken(path: Path) -> int:
    """The descriptor of the lock file, locked, with our number in it."""
    while True:
        if os.name == "nt":
            _remove_left(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _is_held(descriptor):
                raise FileError(f"{path}: another process trains in this folder ({_said(descriptor) or 'it does not say'}): "
                                "wait for its end, stop it, or choose another folder. If it is gone, remove that file")
            if _is_at(path, descriptor):
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()} {platform.node()}\n".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # who had it was just leaving, and took the file along


def _is_held(descriptor: int) -> bool:
    """Whether another process has the lock. If not, it is ours now."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass  # a disk that knows no locks
        else:
            return False
    number, _, host = _said(descriptor).partition(" ")
    if not number.isdecimal() or os.name == "nt":
        return False
    if host != platform.node():
        return True
    return int(number) != os.getpid() and _lives(int(number))  # ours: of a process before this one, in a container say


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # there, and not ours
    return True


def _said(descriptor: int) -> str:
    """The number and the machine in a lock file."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, 200).decode("ascii", "replace").strip()


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_left(path: Path) -> None:
    """Where open files cannot be removed: remove a lock file that nobody holds open."""
    try:
        path.unlink()
    except FileNotFoundError:
        pass
    except PermissionError as error:
        raise FileError(f"{path}: another process trains in this folder: wait for its end, stop it, or choose another folder"
                        ) from error
