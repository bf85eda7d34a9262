"""Writing safetensors: tensor by tensor, the same bytes for the same tensors, whole or not at all.

The header is known before the first number is written, since it follows from names, dtypes and shapes. Order and spelling
are those of the format's own library: the widest dtypes first, so that every tensor is aligned; then by name. Metadata is
sorted. So equal tensors give equal files, whatever the order they come in.

In several files (`max_shard_bytes`) the index is what counts: new shards are written under names that are not in use, the
index is replaced, and only then are the old shards removed. Whoever looks, and whenever the program is killed, finds the old
checkpoint or the new one. Where a single file and an index are both there, the single file holds, here as in transformers.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy

from ... import backend
from ...errors import ConfigError, FormatError
from ...tensor import Tensor
from .durable import new_file, replace_file
from .dtypes import DTYPES, check_byte_order, file_dtype
from .faults import file_error, place
from .header import LONGEST_HEADER
from .temporary import remove_leftovers
from .tree import sync_folder

__all__ = ["header_bytes", "in_file_order", "save_state"]

Array = Any
_PIECE = 1 << 24  # bytes that leave a device, or are put in order, at a time
_RANK = {name: rank for rank, name in enumerate(DTYPES)}


class _Source(NamedTuple):
    """A tensor that is to be written."""

    array: Array
    dtype: str
    nbytes: int


def save_state(path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None,
               max_shard_bytes: int | None = None) -> None:
    """Write tensors to a safetensors file; the old file stays until the new one is whole and on the disk.

    Saving views of a file (`open_state`) over that file works: they keep showing the old one.

    Parameters
    ----------
    path : path-like
    tensors : mapping of str to array
        Arrays of any strides and byte order, on any device, and tensors and parameters. bfloat16 and float8 are dtypes of
        the package ml_dtypes. Never more than one piece of 16 MB is held beside them.
    metadata : mapping of str to str, optional
    max_shard_bytes : int, optional
        Write several files of at most so many bytes of numbers (a larger tensor has one of its own) with an index,
        ``model.safetensors.index.json`` for ``model.safetensors``, if one does not hold all. In the order of the mapping.

    Raises
    ------
    FormatError
        If the format cannot hold something; all of it is listed, and nothing is written.
    FileError
        If the file cannot be written; the old one is as it was.

    Examples
    --------
    >>> import numpy
    >>> save_state("numbers.safetensors", {"a": numpy.arange(3.0)}, metadata={"format": "pt"})
    """
    target = place(path)
    if target.suffix == ".json":
        raise FormatError(f"{os.fsdecode(path)}: the index is written with its shards: give the name of a single file, such as "
                          "model.safetensors, and max_shard_bytes=...")
    check_byte_order(target)
    sources = _sources(path, tensors, metadata)
    if max_shard_bytes is not None and not (type(max_shard_bytes) is int and max_shard_bytes > 0):
        raise ConfigError(f"max_shard_bytes must be a positive whole number of bytes, or None, got {max_shard_bytes!r}")
    shards = _split(sources, max_shard_bytes)
    headers = [header_bytes(path, {name: (source.dtype, source.array.shape, source.nbytes) for name, source in shard.items()},
                            metadata) for shard in shards]
    if len(shards) == 1:
        with replace_file(target) as file:
            _write(file, headers[0], shards[0])
        written = {target.name}
    else:
        written = _write_shards(target, shards, headers)
    _remove_other_forms(target, written)


def _sources(path: Any, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None) -> dict[str, _Source]:
    """What is to be written, or an error with all that cannot be."""
    problems = []
    sources = {}
    for name, value in tensors.items():
        array = value.data if isinstance(value, Tensor) else value
        array = numpy.asarray(array) if isinstance(array, numpy.generic) else array
        problem = _name_problem(name) or _array_problem(array)
        if problem:
            problems.append(f"{name!r:.80}: {problem}")
        else:
            dtype = file_dtype(array.dtype) or ""
            sources[name] = _Source(array, dtype, int(array.size) * DTYPES[dtype].bits // 8)
    for key, text in (metadata or {}).items():
        if not (_is_text(key) and _is_text(text)):
            problems.append(f"metadata {key!r:.80}: keys and values must be texts, got {text!r:.80}")
    if problems:
        raise FormatError(f"{os.fsdecode(path)}: a safetensors file cannot hold this: " + "; ".join(problems))
    return sources


def _is_text(value: Any) -> bool:
    """Whether a value is a str that UTF-8 can write: no half of a surrogate pair."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _name_problem(name: Any) -> str:
    if not _is_text(name):
        return "a name must be a text"
    return "this name is that of the metadata" if name == "__metadata__" else ""


def _array_problem(array: Any) -> str:
    try:
        backend.device_of(array)
    except TypeError as error:
        return str(error)
    if file_dtype(array.dtype) is None:
        return (f"arrays of dtype {array.dtype} have no place in the format: convert it with astype to one of "
                "float64, float32, float16, complex64, int8 to int64, uint8 to uint64, bool")
    return ""


def _split(sources: Mapping[str, _Source], limit: int | None) -> list[dict[str, _Source]]:
    """The shards: filled in the order of the mapping, none empty, each within the limit unless one tensor is larger."""
    shards: list[dict[str, _Source]] = [{}]
    filled = 0
    for name, source in sources.items():
        if limit is not None and shards[-1] and filled + source.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = source
        filled += source.nbytes
    return [dict(sorted(shard.items(), key=lambda item: in_file_order(item[0], item[1].dtype))) for shard in shards]


def in_file_order(name: str, dtype: str) -> tuple[int, str]:
    """What the tensors of a file are sorted by."""
    return -_RANK[dtype], name


def header_bytes(path: Any, tensors: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str] | None
                 ) -> bytes:
    """The length and the header of a file; `tensors` are (dtype, shape, bytes) in the order of the file."""
    members: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    at = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        members[name] = {"dtype": dtype, "shape": [int(length) for length in shape], "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    if len(text) > LONGEST_HEADER:
        raise FormatError(f"{os.fsdecode(path)}: names and metadata make a header of {len(text)} bytes, and readers take at "
                          f"most {LONGEST_HEADER}: save fewer tensors, shorter metadata, or in parts with max_shard_bytes=...")
    return len(text).to_bytes(8, "little") + text


def _write(file: BinaryIO, header: bytes, sources: Mapping[str, _Source]) -> None:
    file.write(header)
    for source in sources.values():
        for part in _parts(source.array):
            file.write(_little_endian(backend.to_host(part)))


def _parts(array: Array) -> Iterator[Array]:
    """An array in pieces that are not large, in C order, without a copy."""
    if array.nbytes <= _PIECE or array.ndim == 0:
        yield array
        return
    rows = _PIECE * array.shape[0] // array.nbytes
    for i in range(0, array.shape[0], max(rows, 1)):
        if rows > 1:
            yield array[i:i + rows]
        else:
            yield from _parts(array[i, ...])


def _little_endian(array: numpy.ndarray) -> memoryview:
    """The bytes of an array as the file has them. The bits of a NaN stay."""
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return numpy.ascontiguousarray(array).reshape(-1).view("uint8").data


def _write_shards(target: Path, shards: list[dict[str, _Source]], headers: list[bytes]) -> set[str]:
    """Write the shards, then the index; their names."""
    names = _free_names(target, len(shards))
    try:
        for name, header, shard in zip(names, headers, shards):
            with new_file(target.with_name(name)) as file:
                _write(file, header, shard)
        total = sum(source.nbytes for shard in shards for source in shard.values())
        index = {"metadata": {"total_size": total},
                 "weight_map": {tensor: name for name, shard in zip(names, shards) for tensor in shard}}
        sync_folder(target.parent)  # the names of the shards, before anything refers to them
        with replace_file(_index(target)) as file:
            file.write((json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
    except BaseException:
        for name in names:  # nothing names them
            with contextlib.suppress(OSError):
                target.with_name(name).unlink()
        raise
    return {*names, _index(target).name}


def _index(target: Path) -> Path:
    return target.with_name(f"{target.name}.index.json")


def _free_names(target: Path, count: int) -> list[str]:
    """Names for shards, ``model-00001-of-00002.safetensors``; with more zeros where one of the old checkpoint is so called."""
    for width in itertools.count(5):
        names = [f"{target.stem}-{i:0{width}}-of-{count:0{width}}{target.suffix}" for i in range(1, count + 1)]
        if not any(os.path.lexists(target.with_name(name)) for name in names):
            return names
    raise AssertionError  # itertools.count has no end


def _remove_other_forms(target: Path, written: set[str]) -> None:
    """Remove what else bears the name of this checkpoint: a single file, an index, and shards. The single file first, since
    it is what holds where both are."""
    shard = re.compile(rf"{re.escape(target.stem)}-[0-9]{{5,}}-of-[0-9]{{5,}}{re.escape(target.suffix)}")
    for path in (target, _index(target)):
        remove_leftovers(path)
    forms = [target.name, _index(target).name, *sorted(filter(shard.fullmatch, os.listdir(target.parent)))]
    for name in forms:
        if name not in written and os.path.lexists(target.with_name(name)):
            try:
                target.with_name(name).unlink()
            except OSError as error:
                raise file_error(error, target.with_name(name), "remove the old") from error
            sync_folder(target.parent)
