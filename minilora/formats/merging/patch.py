"""The patch beside a merged checkpoint: what leads back to the base, bit for bit. Written while merging, read by unmerging.

A safetensors file, ``minilora_patch.safetensors``:

    correction:NAME   U8 (n,)     what the way back from tensor NAME lacks (`lora.merging.correction`), block by block
    A:NAME, B:NAME    the factors of its update as they were merged; kappa:NAME (out, 1) or (1, in) beside them with DoRA
    original:NAME     U8 (n,)     the bytes of a tensor that was replaced by one of another shape
    header:FILE       U8 (n,)     the header of the base's FILE, where the merged one has another
    file:FILE         U8 (n,)     the base's config.json, index or modules, where the merged ones are others, or none

and in its metadata, under "minilora_patch", a JSON object:

    {"version": 1,
     "files":   {FILE: {"merged": SHA-256 of the header of the merged FILE, "base": the same of the base's}},
     "texts":   {FILE: SHA-256 of the base's config.json, index or module},
     "added":   [FILE, ...]: small files that the base does not have; left out where there is none
     "tensors": {NAME: {"how": "copied" | "merged" | "original", "base": SHA-256 of the base's bytes of it, ...}}}

For "merged" besides: "merged", the SHA-256 of the merged bytes; "dtype" of the base; "rows" of a block; "wide", the dtype of
the arithmetic; and with an update "s", its scaling as a hexadecimal float. So nothing is restored from what is not that merge.

While merging, the parts go to a file of their own as they come, whatever the order, and from there into the patch, sorted: no
part waits in memory, and equal merges give equal patches.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy

from ...lora.merging.arithmetic import bytes_of
from ...lora.merging.arithmetic import Update
from ..tensors.dtypes import file_dtype
from ..tensors.writing import header_bytes, in_file_order
from .plan import Piece

__all__ = ["KEY", "PatchWriter", "Room"]

KEY, VERSION = "minilora_patch", 1
STEP = 1 << 20  # bytes of corrections that are held before they are written


class PatchWriter:
    """A patch that grows. Called from several threads.

    Parameters
    ----------
    spool : Path
        A file to be made, and removed again by `finish`.
    """

    def __init__(self, spool: Path) -> None:
        self._path, self._file = spool, open(spool, "x+b", buffering=0)
        self._at, self._lock = 0, threading.Lock()
        self._entries: dict[str, tuple[str, tuple[int, ...], int, list[tuple[int, int]]]] = {}
        self._tensors: dict[str, dict[str, Any]] = {}
        self._files: dict[str, dict[str, str]] = {}
        self._texts: dict[str, str] = {}
        self._added: list[str] = []

    def __enter__(self) -> PatchWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, data: Any) -> tuple[int, int]:
        """Put bytes behind what is there; where they are, and how many."""
        view = memoryview(data).cast("B")
        with self._lock:
            begin = self._at
            while len(view):
                done = self._file.write(view)
                view, self._at = view[done:], self._at + done
        return begin, self._at - begin

    def enter(self, key: str, dtype: str, shape: tuple[int, ...], pieces: list[tuple[int, int]]) -> None:
        """Make a tensor of the patch of what was appended."""
        self._entries[key] = (dtype, shape, sum(n for _, n in pieces), pieces)

    def array(self, key: str, array: numpy.ndarray) -> None:
        """Put an array in."""
        whole = numpy.ascontiguousarray(array)
        self.enter(key, file_dtype(whole.dtype) or "", whole.shape, [self.append(bytes_of(whole))] if whole.size else [])

    def text(self, name: str, data: bytes) -> None:
        """Put a whole file in."""
        self._texts[name] = hashlib.sha256(data).hexdigest()
        self.enter(f"file:{name}", "U8", (len(data),), [self.append(data)] if data else [])

    def added(self, name: str) -> None:
        """A small file that the base does not have."""
        self._added.append(name)

    def header(self, name: str, merged: bytes, base: bytes) -> None:
        """Put in what is known of the header of a file: the base's too, where it is another one."""
        self._files[name] = {"merged": hashlib.sha256(merged).hexdigest(), "base": hashlib.sha256(base).hexdigest()}
        if merged != base:
            self.enter(f"header:{name}", "U8", (len(base),), [self.append(base)])

    def copied(self, piece: Piece, digest: str) -> None:
        """A tensor that is what it was."""
        self._tensors[piece.name] = {"how": "copied", "base": digest}

    def original(self, piece: Piece, array: numpy.ndarray, digest: str) -> None:
        """A tensor that is another one altogether: it is kept as it was."""
        self._tensors[piece.name] = {"how": "original", "base": digest}
        data = bytes_of(array)
        places = [self.append(data[i:i + STEP]) for i in range(0, len(data), STEP)]
        self.enter(f"original:{piece.name}", "U8", (len(data),), places)

    def room(self, piece: Piece) -> Room:
        """Where the corrections of a tensor go."""
        return Room(self, piece)

    def fact(self, name: str, fact: dict[str, Any]) -> None:
        """What is to be known about a tensor."""
        self._tensors[name] = fact

    def finish(self, path: Path) -> int:
        """Write the patch, and remove the file of parts; the size of the patch."""
        entries = dict(sorted(self._entries.items(), key=lambda item: in_file_order(item[0], item[1][0])))
        facts = {"version": VERSION, "files": self._files, "texts": self._texts, "tensors": self._tensors,
                 **({"added": sorted(self._added)} if self._added else {})}
        said = json.dumps(facts, sort_keys=True)
        header = header_bytes(path, {key: entry[:3] for key, entry in entries.items()}, {KEY: said})
        with open(path, "xb") as file:
            file.write(header)
            for _, _, _, pieces in entries.values():
                for begin, count in pieces:
                    for at in range(begin, begin + count, STEP):
                        self._file.seek(at)
                        file.write(self._file.read(min(STEP, begin + count - at)))
            size = file.tell()
        self._file.close()
        os.unlink(self._path)
        return size


class Room:
    """The corrections of one tensor, and the digests of what they lead from and to."""

    def __init__(self, patch: PatchWriter, piece: Piece) -> None:
        self._patch, self._piece = patch, piece
        self._base, self._merged = hashlib.sha256(), hashlib.sha256()
        self._held = bytearray()
        self._places: list[tuple[int, int]] = []
        self._dtype = ""
        self.nbytes = 0

    def add(self, before: numpy.ndarray, after: numpy.ndarray, correction: bytes) -> None:
        """Take in a block."""
        self._base.update(bytes_of(before))
        self._merged.update(bytes_of(after))
        self._held += correction
        self.nbytes += len(correction)
        if len(self._held) >= STEP:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            self._places.append(self._patch.append(self._held))
            self._held = bytearray()

    def close(self, rows: int, wide: str, factors: Update | None) -> None:
        """All blocks have been added."""
        self._flush()
        name, patch = self._piece.name, self._patch
        patch.enter(f"correction:{name}", "U8", (self.nbytes,), self._places)
        fact = {"how": "merged", "base": self._base.hexdigest(), "merged": self._merged.hexdigest(), "rows": rows, "wide": wide,
                "dtype": self._piece.was}
        if factors is not None:
            fact["s"] = float(factors.s).hex()
            for letter, array in (("A", factors.A), ("B", factors.B), ("kappa", factors.kappa)):
                if array is not None:
                    patch.array(f"{letter}:{name}", array)
        patch.fact(name, fact)
