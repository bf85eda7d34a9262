"""write_adapter: a SavedAdapter as the files of some dialect, all of them or none."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from .found import CONFIG, NAMES, PICKLES
from .registry import check_options, dialect_named
from .saved import SavedAdapter

__all__ = ["write_adapter"]


def write_adapter(adapter: SavedAdapter, path: str | PathLike[str], dialect: str = "peft", **options: Any
                  ) -> tuple[str, ...]:
    """Write an adapter so that the programs of that dialect compute the same updates from it.

    Parameters
    ----------
    adapter : SavedAdapter
    path : str or path
        A folder, or, for a dialect without a config file, a file with the ending of its files. What stood there is replaced
        when all is on the disk; other files in the folder stay.
    dialect : str
        One of `registry.DIALECTS`.
    **options
        Of the dialect.

    Returns
    -------
    tuple of str
        What the dialect had to do that deserves a look.

    Raises
    ------
    FormatError
        If the dialect cannot say it. Nothing is written then.
    FileError
        If the operating system refuses.
    ConfigError
        If there is no such dialect, it has no such option, or the path is a file where the dialect has a folder.
    """
    from ..tensors.durable import replace_folder
    from ..tensors.writing import save_state

    target = Path(path)
    writer = dialect_named(dialect)
    check_options(dialect, writer.write, options)
    written = writer.write(adapter, **options)
    tensors_name, config_name = written.names
    pack = written.pack or (lambda place: save_state(place, written.tensors, written.metadata))
    if target.suffix == Path(tensors_name).suffix:
        if written.config is not None:
            raise ConfigError(f"path: the dialect {dialect!r} has a config beside its tensors: give a folder, such as "
                              f"{str(target.with_suffix(''))!r}, not {target.name!r}")
        pack(target)
        return written.notes
    # Else a reader could find the adapter of before in one of those, or take its config for that of this one.
    drop = {*PICKLES, *NAMES, CONFIG, "lora.safetensors", "adapter.gguf"} - {tensors_name, config_name}
    with replace_folder(target, drop=sorted(drop)) as folder:
        pack(folder / tensors_name)
        if written.config is not None:
            text = json.dumps(written.config, indent=2, sort_keys=True, allow_nan=False)
            (folder / config_name).write_text(text, encoding="utf-8")
    return written.notes
