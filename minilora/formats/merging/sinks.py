"""Where the tensors of a merge go: into files, into a comparison with files, or nowhere."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy

from ...lora.merging.arithmetic import bytes_of
from ..tensors.reading import StateFile
from .plan import File, Piece

__all__ = ["Files", "Compared", "Nowhere", "Sink"]

STEP = 1 << 24  # bytes that are copied, or compared, together
NO_SUCH_CALL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY)


class Sink(Protocol):
    """What takes the numbers. Called from several threads, each with another tensor."""

    def rows(self, piece: Piece, begin: int, block: numpy.ndarray) -> None:
        """A block of a tensor, from byte `begin` of it on."""

    def copy(self, piece: Piece, state: StateFile) -> None:
        """A tensor as the base has it."""


class Nowhere:
    """For a rehearsal."""

    def rows(self, piece: Piece, begin: int, block: numpy.ndarray) -> None:
        pass

    def copy(self, piece: Piece, state: StateFile) -> None:
        pass


class Files:
    """New files in a folder, their headers written and their sizes set; closed by leaving the ``with`` block."""

    def __init__(self, folder: Path, files: Iterable[File]) -> None:
        self._open: dict[str, int] = {}
        self._bases: dict[Path, int] = {}
        self._lock = threading.Lock()
        try:
            for file in files:
                descriptor = os.open(folder / file.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
                self._open[file.name] = descriptor
                _write(descriptor, file.header, 0)
                os.truncate(descriptor, file.size)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. What is in them is brought to the disk by whoever puts the folder in its place."""
        for held in (self._open, self._bases):
            while held:
                with contextlib.suppress(OSError):
                    os.close(held.popitem()[1])

    def rows(self, piece: Piece, begin: int, block: numpy.ndarray) -> None:
        _write(self._open[piece.file], bytes_of(block), piece.start + begin)

    def copy(self, piece: Piece, state: StateFile) -> None:
        assert piece.source is not None
        part, entry = state.place(piece.source)
        copy_range(self._base(part.path), part.data, part.header.start + entry.begin, self._open[piece.file], piece.start,
                   piece.nbytes)

    def _base(self, path: Path) -> int:
        with self._lock:
            if path not in self._bases:
                self._bases[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            return self._bases[path]


class Compared:
    """Compares with what a checkpoint holds. `different`: by name, how many of its numbers, or what else is wrong."""

    def __init__(self, state: StateFile) -> None:
        self.state = state
        self.different: dict[str, int] = {}
        self._lock = threading.Lock()

    def rows(self, piece: Piece, begin: int, block: numpy.ndarray) -> None:
        part, entry = self.state.place(piece.name)
        low = part.header.start + entry.begin + begin
        there = numpy.frombuffer(part.data, numpy.uint8, block.nbytes, low)
        self._count(piece, bytes_of(block), there, block.itemsize)
        self.state.let_go(piece.name, begin, begin + block.nbytes)

    def copy(self, piece: Piece, state: StateFile) -> None:
        assert piece.source is not None
        part, entry = state.place(piece.source)
        size = max(1, piece.nbytes // max(1, int(numpy.prod(piece.shape, dtype="int64"))))
        for begin in range(0, piece.nbytes, STEP):
            n = min(STEP, piece.nbytes - begin)
            own = numpy.frombuffer(part.data, numpy.uint8, n, part.header.start + entry.begin + begin)
            other, place = self.state.place(piece.name)
            there = numpy.frombuffer(other.data, numpy.uint8, n, other.header.start + place.begin + begin)
            self._count(piece, own, there, size)
            state.let_go(piece.source, begin, begin + n)
            self.state.let_go(piece.name, begin, begin + n)

    def _count(self, piece: Piece, own: Any, there: Any, size: int) -> None:
        if not numpy.array_equal(own, there):
            apart = int((own != there).reshape(-1, size).any(axis=1).sum()) if len(own) % size == 0 else 1
            with self._lock:
                self.different[piece.name] = self.different.get(piece.name, 0) + apart


def _write(descriptor: int, data: Any, at: int) -> None:
    view = memoryview(data)
    while len(view):
        done = os.pwrite(descriptor, view, at)
        view, at = view[done:], at + done


def copy_range(source: int, data: Any, begin: int, target: int, at: int, count: int) -> None:
    """Bytes of one file into another: by the system where it can, else from the map `data`."""
    while count and hasattr(os, "copy_file_range"):
        try:
            done = os.copy_file_range(source, target, count, begin, at)
        except OSError as error:
            if error.errno not in NO_SUCH_CALL:
                raise
            break
        if not done:
            break
        begin, at, count = begin + done, at + done, count - done
    while count:
        n = min(STEP, count)
        _write(target, memoryview(data)[begin:begin + n], at)
        begin, at, count = begin + n, at + n, count - n
