"""read_adapter: what lies at a path, in whichever dialect, as a SavedAdapter. No model is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy

from ...errors import FormatError
from .dialect import Dialect, Source
from .faults import Faults, shortened
from .foreign import foreign
from .found import find
from .registry import DIALECTS, check_options, dialect_named
from .saved import SavedAdapter

__all__ = ["nonfinite", "read_adapter", "read_source", "recognised"]

Array = Any
ROWS = 1 << 20  # numbers looked at together for NaN: 1 MB of flags


def read_adapter(path: str | PathLike[str], *, name: str | None = None, dialect: str | None = None,
                 allow_nonfinite: bool = False, **options: Any) -> SavedAdapter:
    """Read an adapter that any of the known programs wrote, without a model.

    Parameters
    ----------
    path : str or path
        A folder with a file of tensors and, for most dialects, a config; or the file of tensors itself.
    name : str, optional
        Of one of several adapters in sub-folders.
    dialect : str, optional
        One of `registry.DIALECTS`, for files that do not tell.
    allow_nonfinite : bool
        Take NaN and inf too; a note says where they are.
    **options
        Of the dialect, such as r and lora_alpha for loralib, whose files do not say them.

    Returns
    -------
    SavedAdapter
        Its arrays are read-only views of the file.

    Raises
    ------
    FileError
        If the operating system cannot give the file.
    FormatError
        If the file is damaged, of a method that is not LoRA, of two dialects, or not understood in every part.
    ConfigError
        If there is no such dialect, or it has no such option.

    Notes
    -----
    Nothing in a file is run, and nothing is looked for elsewhere: no pickle, no network.
    """
    return read_source(find(path, name), dialect=dialect, allow_nonfinite=allow_nonfinite, **options)


def read_source(source: Source, *, dialect: str | None = None, allow_nonfinite: bool = False, **options: Any) -> SavedAdapter:
    """`read_adapter` for tensors and config that are in memory already."""
    chosen = dialect_named(dialect) if dialect is not None else recognised(source)
    bad = nonfinite(source.tensors)
    if bad and not allow_nonfinite:
        faults = Faults()
        for key, text in bad.items():
            faults.add(key, text, source.tensors[key])
        faults.refuse(source.path, "To read it all the same: allow_nonfinite=True")
    check_options(chosen.name, chosen.read, options)
    adapter = chosen.read(source, **options)
    notes = [*adapter.notes, *(f"{shortened(key)}: {text}" for key, text in bad.items())]
    if not (adapter.updates or adapter.saved or adapter.biases or adapter.tokens):
        raise FormatError(f"{source.path}: no part of an adapter is in it")
    if adapter.updates and not any(bool(u.A.any()) and bool(u.B.any()) for u in adapter.updates.values()):
        notes.append("untrained: every update is 0")
    return dataclasses.replace(adapter, notes=tuple(notes))


def recognised(source: Source) -> Dialect:
    """The one dialect that says that this is its file."""
    other = foreign(source)
    if other:
        raise FormatError(other)
    found = [known for known in map(dialect_named, DIALECTS) if known.recognise(source)]
    if len(found) == 1:
        return found[0]
    if found:
        signs = [f"{known.name} ({_sign(known, source)})" for known in found]
        raise FormatError(f"{source.path}: two dialects in one file: {' and '.join(signs)}. If it is of one program, say "
                          f"which: dialect={found[0].name!r}")
    config = "no config beside it" if source.config is None else \
        f"a config with {', '.join(map(shortened, list(source.config)[:5])) or 'nothing in it'}"
    raise FormatError(f"{source.path}: no adapter in a dialect that minilora reads ({', '.join(DIALECTS)}): "
                      f"{_first(source.tensors)}, {config}")


def _sign(known: Dialect, source: Source) -> str:
    """What a dialect knows a file by: a key, or else the config."""
    for key in source.tensors:
        if known.recognise(source._replace(tensors={key: source.tensors[key]}, config=None)):
            return shortened(key)
    return "by the config"


def _first(tensors: Mapping[str, Array]) -> str:
    names = [shortened(key) for key, _ in zip(tensors, range(3))]
    return f"{len(tensors)} tensors, {', '.join(names)}{' ...' if len(tensors) > 3 else ''}" if names else "no tensors"


def nonfinite(tensors: Mapping[str, Array]) -> dict[str, str]:
    """Which tensors hold NaN or inf, and how many. Everything is read, a block at a time."""
    found = {}
    for key in tensors:
        array = tensors[key]
        if array.dtype.kind in "biu":
            continue
        flat, nans, infs = array.reshape(-1), 0, 0
        for start in range(0, flat.size, ROWS):
            part = flat[start:start + ROWS]
            if not numpy.isfinite(part).all():
                nans += int(numpy.isnan(part).sum())
                infs += int(numpy.isinf(part).sum())
        if nans or infs:
            found[key] = " and ".join([*([f"{nans} NaN"] if nans else []), *([f"{infs} inf"] if infs else [])])
    return found
