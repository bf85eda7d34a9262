"""Temporary files and folders beside what they will replace: names that cannot be guessed, locks, and what killed runs left."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["beside", "remove_leftovers", "reserve_file", "reserve_folder"]

_DAY = 86400.0  # where there are no locks, a leftover is what has not been touched for a day


def reserve_file(target: Path) -> tuple[Path, int]:
    """A new temporary file beside a target and its descriptor, locked. The umask holds."""
    while True:
        temporary = _name(target)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if _is_ours(descriptor):
            return temporary, descriptor
        os.close(descriptor)


def reserve_folder(target: Path) -> tuple[Path, int | None]:
    """A new temporary folder beside a target and its descriptor, locked; no descriptor where folders have none."""
    while True:
        temporary = _name(target)
        os.mkdir(temporary)
        if os.name == "nt":
            return temporary, None
        try:
            descriptor = os.open(temporary, os.O_RDONLY)
        except OSError:
            os.rmdir(temporary)
            raise
        if _is_ours(descriptor):
            return temporary, descriptor
        os.close(descriptor)


def beside(target: Path, kinds: str) -> list[Path]:
    """The temporary files and folders of a target; `kinds` is a pattern for their endings."""
    pattern = re.compile(re.escape(_prefix(target)) + rf"[0-9a-f]{{16}}\.({kinds})")
    with os.scandir(target.parent) as entries:
        return [Path(entry.path) for entry in entries if pattern.fullmatch(entry.name)]


def remove_leftovers(target: Path) -> None:
    """Remove what killed runs left beside a target. What a run that is alive works on is locked, and stays."""
    for path in beside(target, "tmp|old|new"):
        with contextlib.suppress(OSError):
            if os.name == "nt":
                _remove(path, None)
                continue
            descriptor = os.open(path, os.O_RDONLY)
            try:
                _remove(path, _lock(descriptor))
            finally:
                os.close(descriptor)


def _remove(path: Path, locked: bool | None) -> None:
    if locked or locked is None and time.time() - os.stat(path).st_mtime > _DAY:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _prefix(target: Path) -> str:
    """How the temporary names of a target begin; short enough to be a name where the target's is as long as may be."""
    name = os.fsencode(target.name)
    return f".{target.name}." if len(name) <= 200 else f".{hashlib.sha256(name).hexdigest()}."


def _name(target: Path) -> Path:
    return target.with_name(f"{_prefix(target)}{secrets.token_hex(8)}.tmp")


def _is_ours(descriptor: int) -> bool:
    """Whether a new temporary is locked and still there: another save may have taken it for a leftover before it was."""
    return _lock(descriptor) is not False and os.fstat(descriptor).st_nlink > 0


def _lock(descriptor: int) -> bool | None:
    """Take the lock: True, or False if a run that is alive has it, or None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
