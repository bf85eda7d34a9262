"""Find: which file of tensors and which config a path means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from ...errors import ConfigError, FileError, FormatError
from ..json_rules import TwiceError, once
from .dialect import Source
from .faults import shortened

__all__ = ["CONFIG", "find", "read_json"]

CONFIG = "adapter_config.json"
# What the programs call their file of tensors inside a folder.
NAMES = ("adapter_model.safetensors", "adapters.safetensors", "pytorch_lora_weights.safetensors")
WITH_CONFIG = ("adapter_model.safetensors", "adapters.safetensors")  # those beside which CONFIG belongs to them
PICKLES = ("adapter_model.bin", "pytorch_lora_weights.bin", "pytorch_model.bin")
LONGEST_CONFIG = 1 << 21  # bytes
MOST_VALUES = 50_000  # in a config: as Python's objects, lists in lists would be thirty times as large as the text
DEEPEST = 16


def find(path: str | PathLike[str], name: str | None = None) -> Source:
    """What lies at a path, unread.

    Raises
    ------
    FileError
        If nothing is there, or it cannot be read.
    FormatError
        If tensors or config are missing or damaged, or there are several adapters and no name.
    """
    from ..tensors.durable import read_steadily  # here, because values in memory need no file

    here = Path(path)
    return read_steadily(here, lambda: _found(here, name))  # config and weights of one save, also while it is replaced


def _found(here: Path, name: str | None) -> Source:
    if not here.exists():
        raise FileError(f"{here}: there is no such file or folder")
    if here.is_dir():
        return _in_folder(here, name)
    if name is not None:
        raise ConfigError(f"name: {here} is one file; a name is for a folder with several adapters in it")
    beside = here.with_name(CONFIG)
    config = read_json(beside) if here.name.endswith(WITH_CONFIG) and beside.is_file() else None
    return _source(here, config)


def _in_folder(folder: Path, name: str | None) -> Source:
    inside = sorted(sub.name for sub in folder.iterdir() if sub.is_dir() and _holds_adapter(sub))
    if name is not None and name in inside:
        return _in_folder(folder / name, None)
    if name is not None and not (name == "default" and _holds_adapter(folder)):
        raise FormatError(f"{folder}: there is no adapter {name!r} in it; there {_listed(inside, _holds_adapter(folder))}")
    tensors = _tensors_in(folder)
    if tensors is None and inside:
        line = f"read_adapter({str(folder)!r}, name={inside[0]!r})"
        raise FormatError(f"{folder}: the adapters are in folders of their own, {', '.join(map(shortened, inside))}: {line}")
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
    if tensors is None:
        there = ", ".join(sorted(shortened(p.name) for p in folder.iterdir())[:8]) or "nothing"
        what = f"{CONFIG} without weights: {NAMES[0]} is missing. Was the folder copied whole?" if config is not None \
            else "no adapter"
        raise FormatError(f"{folder}: {what} (there is {there})")
    return _source(tensors, config)


def _listed(names: list[str], default: bool) -> str:
    names = [*(["default"] if default else []), *map(shortened, names)]
    return f"{'is' if len(names) == 1 else 'are'} {', '.join(names)}" if names else "is none"


def _holds_adapter(folder: Path) -> bool:
    return any((folder / known).is_file() for known in (CONFIG, *NAMES, *PICKLES))


def _tensors_in(folder: Path) -> Path | None:
    """The file of tensors in a folder; a pickle if there is nothing else, so that the reader of tensors can say the way out."""
    for known in NAMES:
        if (folder / known).is_file():
            return folder / known
    others = sorted(p for ending in ("safetensors", "gguf") for p in folder.glob(f"*.{ending}") if p.is_file())
    if len(others) > 1:
        raise FormatError(f"{folder}: which of {', '.join(shortened(p.name) for p in others[:8])}? Give the path of one file")
    pickled = [folder / known for known in PICKLES if (folder / known).is_file()]
    return next(iter([*others, *pickled]), None)


def _source(path: Path, config: Mapping[str, Any] | None) -> Source:
    from ..tensors.reading import open_state
    from .gguf.layout import is_gguf, open_gguf

    if is_gguf(path):
        return open_gguf(path)
    state = open_state(path)
    return Source(path, state, state.metadata, config)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises
    ------
    FileError
        If the operating system cannot give it.
    FormatError
        If it is no JSON object, has a name twice, or is far larger or deeper than any config.
    """
    try:
        size = path.stat().st_size
        if size > LONGEST_CONFIG:
            raise FormatError(f"{path}: {size:,} bytes, far more than a config has")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: no text in UTF-8 at byte {error.start}") from None
    if sum(map(text.count, "[{,")) > MOST_VALUES:
        raise FormatError(f"{path}: more than {MOST_VALUES:,} values, far more than a config has")
    try:
        data = json.loads(text, object_pairs_hook=once)
    except TwiceError as error:
        raise FormatError(f"{path}: the name {shortened(error.name)!r} comes twice") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: no JSON: {shortened(error) if text.strip() else 'the file is empty'}") from None
    if not isinstance(data, dict):
        raise FormatError(f"{path}: expected a JSON object, got a {type(data).__name__}")
    if _depth(data) > DEEPEST:
        raise FormatError(f"{path}: values inside values, more than {DEEPEST} deep")
    return data


def _depth(value: Any) -> int:
    """How many objects and lists lie inside each other; one more than `DEEPEST` is as good as any number."""
    level, inside = 0, [value]
    while inside and level <= DEEPEST:
        level += 1
        inside = [v for outer in inside if isinstance(outer, (dict, list))
                  for v in (outer.values() if isinstance(outer, dict) else outer)]
    return level
