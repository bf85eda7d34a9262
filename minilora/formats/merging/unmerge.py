"""unmerge_files: the base again, bit for bit, from a merged checkpoint and the patch beside it."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from ...errors import FileError, FormatError, MiniloraError, StateError
from ...flags import option
from ...lora.merging.arithmetic import Factored, bytes_of, rows_of_block
from ...lora.merging.blockwise import unmerged_blocks
from ...parallel import cores, spread_out
from ...shown import shown
from ..tensors.dtypes import array_dtype
from ..tensors.durable import replace_folder
from ..tensors.header import Entry, read_header
from ..tensors.reading import StateFile, open_state
from .checkpoint import PATCH, Checkpoint, open_checkpoint
from .patch import KEY, VERSION
from .places import DROPPED, check_out, check_room
from .plan import File, Piece
from .rows import Kept
from .sinks import STEP, Files, Nowhere
from .site import as_matrix

__all__ = ["UnmergeReport", "unmerge_files"]

WIDE = ("float32", "float64")


@shown
class UnmergeReport(NamedTuple):
    """What `unmerge_files` restored: how many tensors in which way, and the bytes of the files of weights."""

    merged: str
    out: str
    restored: int
    copied: int
    removed: tuple[str, ...]
    nbytes: int
    seconds: float

    def __str__(self) -> str:
        lines = [f"tensors restored: {self.restored}, copied: {self.copied}, each that of the base by its SHA-256; "
                 f"{self.nbytes:,} bytes"]
        return "\n".join([*lines, *(f"removed: {name}, which the base does not have" for name in self.removed)])


def unmerge_files(merged: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool = False,
                  dry_run: bool = False, progress: Callable[[str, int], Any] | None = None) -> UnmergeReport:
    """Write the base that `merge_files` was given, bit for bit: weights, index and config.

    Parameters
    ----------
    merged : path
        What `merge_files` wrote, with its patch.
    out : path
        A folder that is not there yet, or with `overwrite` one to be replaced.
    dry_run : bool
        Restore and compare everything, and write nothing.
    progress : callable, optional
        Called with the name and the bytes of each tensor that is done.

    Raises
    ------
    FileError
        If there is no patch, or something cannot be read or written.
    FormatError
        If the patch is damaged.
    StateError
        If the merged files are not those of the patch, or the original does not come out. Nothing has been written then.

    Examples
    --------
    >>> import numpy
    >>> from minilora import formats, lora
    >>> W, A, B = numpy.eye(3, dtype="float32"), numpy.ones((1, 3), "float32"), numpy.ones((3, 1), "float32")
    >>> formats.save_state("model.safetensors", {"fc.weight": W})
    >>> adapter = formats.SavedAdapter({"fc": formats.Update("linear", A, B, s=0.3)}, lora.Config(r=1, target_modules=["fc"]))
    >>> merge = formats.merge_files("model.safetensors", adapter, "merged")
    >>> print(unmerge_files("merged", "again"))
    tensors restored: 1, copied: 0, each that of the base by its SHA-256; 116 bytes
    >>> Path("again/model.safetensors").read_bytes() == Path("model.safetensors").read_bytes()
    True
    """
    begun = time.perf_counter()
    there = open_checkpoint(merged)
    work = _Unmerge(there, _patch_of(there))
    target = check_out(out, [there.path], overwrite or dry_run)
    if dry_run:
        files, pieces = work.files(target)
        work.run(Nowhere(), pieces, progress)
        return work.report(target, files, pieces, time.perf_counter() - begun)
    others = there.beside().copied
    check_room(target, sum(len(part.data) for part in there.state.parts))
    with replace_folder(target, drop=DROPPED) as folder:
        files, pieces = work.files(folder)
        with Files(folder, files) as sink:
            work.run(sink, pieces, progress)
        if there.indexed:
            others[there.main.name] = there.main
        for name in {**others, **work.texts}:
            place = folder / name
            kept = work.kept(f"file:{name}", work.texts.get(name))
            if name in work.added:
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            if kept is not None:
                place.write_bytes(kept)
            elif name in others:
                shutil.copyfile(others[name], place)
    return work.report(target, files, pieces, time.perf_counter() - begun)


def _patch_of(there: Checkpoint) -> StateFile:
    path = there.folder / PATCH
    if not path.is_file():
        raise FileError(f"{there.path}: there is no {PATCH} in it, without which nothing leads back: it was merged with "
                        f"{option('patch=False', '--no-patch')}, by another program, or the patch was not copied along")
    return open_state(path)


def _inside(name: Any) -> bool:
    """Whether a name is that of a file in a folder, and leads to no other place."""
    return isinstance(name, str) and bool(name) and not re.search(r"[\\:\0]|^/|(^|/)\.\.?(/|$)", name)


class _Unmerge:
    """Restores the tensors of a base. Called with each of them, in any thread."""

    def __init__(self, there: Checkpoint, patch: StateFile) -> None:
        self.there, self.patch = there, patch
        self.said, self.headers, self.texts, self.added = self._facts()
        self.sink: Any = None
        self.progress: Any = None
        self._lock = threading.Lock()

    def _facts(self) -> tuple[Any, ...]:
        """What the patch says, checked: it comes from a file."""
        try:
            said = json.loads(self.patch.metadata[KEY])
            added = said.get("added", [])
            sound = said["version"] == VERSION and isinstance(said["texts"], dict) and isinstance(added, list) and \
                all(map(_inside, [*said["texts"], *added])) and \
                all(isinstance(each["merged"], str) and isinstance(each["base"], str) for each in said["files"].values()) and \
                all(each["how"] in ("copied", "merged", "original") and isinstance(each["base"], str)
                    for each in said["tensors"].values())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise FormatError(f"{self.patch.path}: this is no patch of version {VERSION}: it was damaged, or a newer minilora "
                              "wrote it")
        for part in self.there.state.parts:
            fact = said["files"].get(part.path.name)
            if fact is None or fact["merged"] != hashlib.sha256(part.data[:part.header.start]).hexdigest():
                raise StateError(f"{part.path}: this is not the file that the patch beside it belongs to")
        return said["tensors"], said["files"], said["texts"], added

    def kept(self, key: str, digest: Any) -> bytes | None:
        """A file, or its header, that the patch holds as the base has it; None if the merged one is that."""
        array = self.patch.get(key)
        if array is None:
            return None
        data = array.tobytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise FormatError(f"{self.patch.path}: {key} is damaged")
        return data

    def run(self, sink: Any, pieces: list[Piece], progress: Any) -> None:
        """Restore all tensors, the largest first."""
        self.sink, self.progress = sink, progress
        spread_out(self, sorted(pieces, key=lambda piece: -piece.nbytes), cores())

    def report(self, target: Path, files: list[File], pieces: list[Piece], seconds: float) -> UnmergeReport:
        base = {piece.name for piece in pieces}
        copied = sum(self.said[name]["how"] == "copied" for name in base)
        removed = tuple(name for name in self.there.state if name not in base)
        return UnmergeReport(str(self.there.path), str(target), len(base) - copied, copied, removed,
                             sum(file.size for file in files), round(seconds, 3))

    def files(self, folder: Path) -> tuple[list[File], list[Piece]]:
        """The files of the base and their tensors; their headers are the merged ones', or kept in the patch."""
        files, pieces = [], []
        for part in self.there.state.parts:
            name = part.path.name
            kept = self.kept(f"header:{name}", self.headers[name]["base"])
            raw = bytes(part.data[:part.header.start]) if kept is None else kept
            entries = part.header.entries if kept is None else _entries(raw, folder / name)
            size = len(raw) + max((entry.end for entry in entries.values()), default=0)
            files.append(File(name, raw, size, kept is None))
            for tensor, entry in entries.items():
                if tensor not in self.said:
                    raise FormatError(f"{self.patch.path}: nothing is said of {tensor!r}: the patch is damaged")
                pieces.append(Piece(tensor, name, len(raw) + entry.begin, entry.dtype, entry.shape,
                                    tensor if tensor in self.there.state else None, None, entry.dtype))
        return files, pieces

    def __call__(self, piece: Piece) -> None:
        fact, found = self.said[piece.name], hashlib.sha256()
        try:
            with numpy.errstate(all="ignore"):
                getattr(self, f"_{fact['how']}")(piece, fact, found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, MiniloraError):
                raise
            raise FormatError(f"{self.patch.path}: {piece.name}: the patch is damaged ({error})") from error
        if found.hexdigest() != fact["base"]:
            raise StateError(f"unmerge: {piece.name}: the original did not come out: the merged tensor was changed since, the "
                             "patch is damaged, or this process flushes subnormal numbers to zero")
        if self.progress is not None:
            with self._lock:
                self.progress(piece.name, piece.nbytes)

    def _copied(self, piece: Piece, fact: Mapping[str, Any], found: Any) -> None:
        state = self.there.state
        if piece.source is None or (state.dtypes[piece.name], state.shapes[piece.name]) != (piece.dtype, piece.shape):
            raise ValueError("no such tensor to copy")
        self.sink.copy(piece, state)
        part, entry = state.place(piece.name)
        start = part.header.start + entry.begin
        for begin in range(0, piece.nbytes, STEP):
            n = min(STEP, piece.nbytes - begin)
            found.update(memoryview(part.data)[start + begin:start + begin + n])
            state.let_go(piece.name, begin, begin + n)

    def _original(self, piece: Piece, fact: Mapping[str, Any], found: Any) -> None:
        data = self.patch[f"original:{piece.name}"]
        if data.nbytes != piece.nbytes:
            raise ValueError("of another size")
        for begin in range(0, data.nbytes, STEP):
            block = data[begin:begin + STEP]
            found.update(block)
            self.sink.rows(piece, begin, block)

    def _merged(self, piece: Piece, fact: Mapping[str, Any], found: Any) -> None:
        name, wide, dtype, seen = piece.name, fact["wide"], array_dtype(piece.dtype), hashlib.sha256()
        M = as_matrix(self.there.state[name])
        if wide not in WIDE or self.there.state.shapes[name] != piece.shape or \
                fact["rows"] != rows_of_block(M.shape) or dtype.kind not in "fV":
            raise ValueError("of another shape")
        D: Any = Kept()
        if "s" in fact:
            kappa = self.patch.get(f"kappa:{name}")
            D = Factored(self.patch[f"A:{name}"], self.patch[f"B:{name}"], float.fromhex(fact["s"]), M.shape, wide, kappa)
        data = self.patch[f"correction:{name}"].data
        size, itemsize = max(1, M.shape[1]), dtype.itemsize
        for block in unmerged_blocks(M, D, dtype, wide, fact["rows"], data):
            seen.update(bytes_of(block.after))
            found.update(bytes_of(block.before))
            self.sink.rows(piece, block.low * size * itemsize, block.before)
        self.there.state.let_go(name, 0, M.nbytes)
        if seen.hexdigest() != fact["merged"]:
            raise StateError(f"unmerge: {name} was changed since it was merged: the original cannot be computed from it")


def _entries(raw: bytes, path: Path) -> Mapping[str, Entry]:
    """The tensors of a header that the patch holds, checked as that of any file: beside numbers that are not there yet."""
    body = json.loads(raw[8:])
    size = max((each["data_offsets"][1] for name, each in body.items() if name != "__metadata__"), default=0)
    if not isinstance(size, int) or not 0 <= size < 2 ** 62:
        raise FormatError(f"{path.name}: the header in the patch is damaged")
    with open(path, "x+b") as file:  # of that size, and sparse: no byte of it is on the disk
        file.write(raw)
        file.truncate(len(raw) + size)
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = read_header(data, path)
    path.unlink()
    return header.entries
