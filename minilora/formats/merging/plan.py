"""What is to be written: every file with its header, every tensor with its place, and how each comes about."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy

from ...errors import ConfigError
from ...flags import option
from ...stored import Transposed
from ..quantised.settings import FIELD
from ..tensors.dtypes import DTYPES, array_dtype, file_dtype
from ..tensors.header import Header
from ..tensors.writing import header_bytes, in_file_order
from .checkpoint import Checkpoint
from .fitting import FLOATS, FOUR_BITS
from .site import Site, as_matrix, wide_name

__all__ = ["OUT", "File", "Piece", "config_text", "decoded_dtype", "files_of", "index_text", "out_dtype", "rows_of"]

OUT = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


@dataclass(frozen=True)
class Piece:
    """One tensor of what is written.

    Attributes
    ----------
    name : str
    file : str
        The name of the file.
    start : int
        The byte of the file where its numbers begin.
    dtype : str
        The file's word for it.
    shape : tuple of int
    source : str or None
        The tensor of the base that it comes from.
    site : Site or None
        What changes it; None if its numbers stay.
    was : str
        The source's dtype, "" without one.
    """

    name: str
    file: str
    start: int
    dtype: str
    shape: tuple[int, ...]
    source: str | None
    site: Site | None
    was: str = ""
    resized: bool = False

    @property
    def nbytes(self) -> int:
        return _nbytes(self.dtype, self.shape)

    @property
    def copied(self) -> bool:
        """Whether its bytes are those of the source."""
        return self.site is None and self.dtype == self.was

    @property
    def fresh(self) -> bool:
        """Whether it is another array altogether, of another shape or under a new name."""
        return self.site is not None and self.site.whole is not None and \
            (self.source is None or self.resized or self.was not in FLOATS)

    @property
    def stream(self) -> int:
        """The stream of random bits for stochastic rounding: by the name, so that it hangs on nothing else."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "little")


class File(NamedTuple):
    """One file: its name, its header with the length in front, and its size. `same`: the header is the base's."""

    name: str
    header: bytes
    size: int
    same: bool


def out_dtype(dtype: Any) -> str | None:
    """The file's word for a dtype that somebody asks for; None for None."""
    name = getattr(dtype, "__name__", None) or getattr(dtype, "name", None) or dtype
    if dtype is not None and name not in OUT:
        raise ConfigError(f"dtype must be None or one of {', '.join(OUT)}, got {dtype!r}")
    return OUT[str(name)] if dtype is not None else None


def decoded_dtype(base: Checkpoint, dtype: Any, dequantize: Any) -> str | None:
    """The file's word for the dtype to convert to: that of a base in 4 bits is what it is decoded to."""
    to, decoded = out_dtype(dtype), out_dtype(dequantize)
    if decoded is not None and not base.four_bits:
        raise ConfigError(f"dequantize: {base.path} is not in 4 bits: "
                          f"{option(f'dtype={dequantize!r}', f'--dtype {dequantize}')} converts it")
    if decoded is not None and to not in (None, decoded):
        raise ConfigError(f"dequantize={dequantize!r} and dtype={dtype!r}: all that is written has one dtype: give the first")
    return decoded or to


def files_of(base: Checkpoint, sites: Mapping[str, Site], dtype: str | None) -> tuple[list[File], list[Piece]]:
    """The files to write, and their tensors."""
    left = dict(sites)
    groups: dict[str, tuple[Header, bytes, dict[str, Piece]]] = {}
    for part in base.state.parts:
        mine = {name: _piece(base, name, left.pop(name, None), dtype) for name in part.header.entries if name in base.state}
        groups[part.path.name] = (part.header, bytes(part.data[:part.header.start]), mine)
    for name, site in left.items():  # new tensors: beside their source, or in the last file
        owner = base.state.place(site.source)[0].path.name if site.source else base.state.parts[-1].path.name
        groups[owner][2][name] = _piece(base, name, site, dtype)
    files, pieces = [], []
    for file, (header, raw, mine) in groups.items():
        entries = header.entries
        same = mine.keys() == entries.keys() and all((p.dtype, p.shape) == entries[n][:2] for n, p in mine.items())
        if not same:
            mine = dict(sorted(mine.items(), key=lambda item: in_file_order(item[0], item[1].dtype)))
            described = {name: (piece.dtype, piece.shape, piece.nbytes) for name, piece in mine.items()}
            raw = header_bytes(file, described, header.metadata)
        at = len(raw)
        for name in entries if same else mine:
            piece = mine[name]
            pieces.append(dataclasses.replace(piece, file=file, start=at))
            at += piece.nbytes
        files.append(File(file, raw, at, same))
    return files, pieces


def _piece(base: Checkpoint, name: str, site: Site | None, dtype: str | None) -> Piece:
    source = site.source if site is not None else name
    was = base.state.dtypes[source] if source is not None else ""
    shape = base.state.shapes[source] if source is not None else ()
    resized = False
    if site is not None and site.whole is not None:
        resized = source is not None and site.whole.shape != shape
        shape = tuple(map(int, site.whole.shape))
    own = was
    if source is None and site is not None and site.whole is not None:
        own = file_dtype(site.whole.dtype) or "F32"
    to = dtype if dtype is not None and own in (*FLOATS, *FOUR_BITS) else own
    return Piece(name, "", 0, to, shape, source, site, was, resized)


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return int(numpy.prod(shape, dtype="int64")) * DTYPES[dtype].bits // 8


def rows_of(piece: Piece, base: Checkpoint) -> tuple[Any, Any, str]:
    """The source as a matrix, the dtype to write, and the dtype to compute in."""
    to = array_dtype(piece.dtype)
    if piece.source is None or piece.fresh:
        assert piece.site is not None and piece.site.whole is not None
        given = as_matrix(piece.site.whole)
        return given, to, wide_name(given.dtype, to)
    W = as_matrix(base.state[piece.source])
    if isinstance(W, Transposed):  # row by row it would be decoded as a whole each time
        W = W.dense()
    return W, to, wide_name(W.dtype, to)


def index_text(base: Checkpoint, pieces: list[Piece]) -> bytes | None:
    """The index of what is written; None if there is none, or it is the base's."""
    if not base.indexed:
        return None
    raw = base.main.read_bytes()
    said = json.loads(raw)
    where = {piece.name: piece.file for piece in pieces}
    total = sum(piece.nbytes for piece in pieces)
    metadata = said.get("metadata") if isinstance(said.get("metadata"), dict) else {}
    before = sum(entry.end - entry.begin for part in base.state.parts for entry in part.header.entries.values())
    if where == said["weight_map"] and total == before:
        return None
    text = json.dumps({**said, "metadata": {**metadata, "total_size": total}, "weight_map": where}, indent=2, sort_keys=True)
    return (text + "\n").encode()


def config_text(base: Checkpoint, changes: Mapping[str, Any], dtype: str | None) -> bytes | None:
    """config.json of what is written; None if it is the base's, or there is none."""
    if base.config is None or not (changes or dtype):  # a base in 4 bits is decoded to a dtype, always
        return None
    said: dict[str, Any] = json.loads((base.folder / "config.json").read_bytes().decode("utf-8-sig"))
    if dtype is not None:
        name = next(name for name, word in OUT.items() if word == dtype)
        for fields in _with_dtype(said):
            fields.update({key: name for key in ("torch_dtype", "dtype") if isinstance(fields.get(key), str)})
        if not {"torch_dtype", "dtype"} & said.keys():
            said["dtype"] = name
    said.update(changes)
    if base.four_bits:
        said.pop(FIELD)
    return (json.dumps(said, indent=2, ensure_ascii=False) + "\n").encode()


def _with_dtype(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield fields
    for name, inner in fields.items():
        if name.endswith("_config") and isinstance(inner, dict):
            yield from _with_dtype(inner)
