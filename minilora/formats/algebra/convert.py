"""An adapter in another program's dialect. What the dialect cannot say is refused by name, and never left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from ...errors import FormatError
from ..adapters.peft.reading import optional_heads
from ..adapters.reading import read_adapter
from ..adapters.saved import SavedAdapter
from ..adapters.scalings import FINGERPRINT, kept
from ..adapters.writing import write_adapter
from ..placing.names import NameMapping, rename
from .bases import moved_start

__all__ = ["convert", "ready_for", "renamed"]


def renamed(adapter: SavedAdapter, mapping: NameMapping | None) -> SavedAdapter:
    """The adapter with other paths: of prefixes, or a function from path to path; see `placing.names.rename`.

    A fingerprint goes, because it speaks of the old names.

    Raises
    ------
    FormatError
        If two paths become one.
    """
    if mapping is None:
        return adapter
    wholes = [path.rpartition(".")[0] for path in (*adapter.saved, *adapter.biases)]
    paths = rename(dict.fromkeys([*adapter.updates, *adapter.tokens, *wholes]), mapping)
    owners: dict[str, str] = {}
    for old, new in paths.items():
        if owners.setdefault(new, old) != old:
            raise FormatError(f"mapping: {owners[new]} and {old} both become {new}")

    def moved(arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {f"{paths[path.rpartition('.')[0]]}.{path.rpartition('.')[2]}": array for path, array in arrays.items()}

    owners_of_saved = [paths[path.rpartition(".")[0]] for path in adapter.saved]
    config = dataclasses.replace(adapter.config, modules_to_save=_entries(adapter, owners_of_saved),
                                 target_modules=sorted(paths[path] for path in adapter.updates) or None,
                                 exclude_modules=None, layers_to_transform=None, layers_pattern=None, rank_pattern={},
                                 alpha_pattern={})
    metadata = {key: text for key, text in adapter.metadata.items() if key != FINGERPRINT}
    return dataclasses.replace(
        adapter, updates={paths[path]: update for path, update in adapter.updates.items()}, saved=moved(adapter.saved),
        biases=moved(adapter.biases), tokens={paths[path]: rows for path, rows in adapter.tokens.items()}, config=config,
        metadata=metadata)


def _entries(adapter: SavedAdapter, owners: Sequence[str]) -> list[str] | None:
    """modules_to_save: the entries that still name a saved module by its end, and the paths of those that none names."""
    entries = [entry for entry in adapter.config.modules_to_save or () if entry in optional_heads(adapter.config)
               or any(owner.endswith(entry) or f"{entry}." in owner for owner in owners)]
    entries += sorted({owner for owner in owners
                       if not any(owner.endswith(entry) or f"{entry}." in owner for entry in entries)})
    return entries or None


def ready_for(adapter: SavedAdapter, to: str) -> SavedAdapter:
    """The adapter, unless only PEFT would compute the same from it.

    Raises
    ------
    FormatError
        If its start was taken out of the base and is not in the file: other programs do not do that when they load it.
    """
    if to != "peft" and moved_start(adapter):
        raise FormatError(f"init_lora_weights={adapter.config.init_lora_weights!r}: PEFT takes the start out of the base when "
                          f"it loads this file, and no program that reads {to!r} does. formats.load_adapter loads it into a "
                          "model, formats.save_adapter then writes it with its start, as an update of the unchanged base")
    if to == "peft" and adapter.dialect != "peft":  # what another dialect's metadata say of the base holds here too
        scalings = {path: update.s for path, update in adapter.updates.items()}
        fingerprint = {key: text for key, text in kept(adapter.metadata, scalings).items() if key == FINGERPRINT}
        return dataclasses.replace(adapter, metadata=fingerprint, dialect="peft")
    return adapter


def convert(source: str | PathLike[str], out: str | PathLike[str], to: str, *, mapping: NameMapping | None = None,
            reading: Mapping[str, Any] | None = None, **options: Any) -> tuple[str, ...]:
    """Read an adapter in whichever dialect it is, and write it in another.

    Parameters
    ----------
    source, out : path
    to : str
        "peft", "loralib", "mlx", "kohya", "diffusers" or "gguf".
    mapping : dict of str to str, or function, optional
        From the file's paths to those of the new one: ``{"transformer.": "model."}``.
    reading : mapping, optional
        Options of `read_adapter`: name, dialect, allow_nonfinite, and those of the dialect.
    **options
        Of the dialect that is written: ``fold=True``, ``pad=True`` ...

    Returns
    -------
    tuple of str
        What deserves a look, from reading and from writing.

    Raises
    ------
    FormatError
        If the dialect cannot say a part of it: each by name, with the way out. Nothing is written then.
    """
    adapter = ready_for(renamed(read_adapter(source, **dict(reading or {})), mapping), to)
    return (*adapter.notes, *write_adapter(adapter, out, to, **options))
