"""Paths of an adapter that the base does not know: modules that are saved whole and that it lacks, a classifier's head say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import FormatError
from ..adapters.saved import SavedAdapter
from ..placing.names import resolve_in

__all__ = ["is_new", "without_prefix"]


def is_new(saved: SavedAdapter, path: str, layers: Mapping[str, Any], mapped: bool) -> bool:
    """Whether a path has nothing but whole parameters, and no layer of the base is meant by it.

    Its last word is none of the base's, or it belongs to a module that is saved whole (``classifier`` of ``classifier.dense``,
    ``pooler.dense``) whose name has a word that the base does not know; `mapped`: the caller names what is meant otherwise.
    """
    if path in saved.updates or path in saved.tokens or any(name.rpartition(".")[0] == path for name in saved.biases):
        return False
    if not any(layer.rpartition(".")[2] == path.rpartition(".")[2] for layer in layers):
        return True
    words = {word for layer in layers for word in layer.split(".")}
    whole = [entry for entry in saved.config.modules_to_save or () if f".{entry}." in f".{path}."]
    if mapped or all(words.issuperset(entry.split(".")[-2:]) for entry in whole):
        return False
    try:
        resolve_in({path: ""}, layers)
    except FormatError:
        return True
    return False


def without_prefix(new: Iterable[str], found: Mapping[str, str]) -> dict[str, str]:
    """What new paths are called in the base: without what was taken from all the others."""
    path, here = next(iter(found.items()), ("", ""))
    prefix = path.removesuffix(here) if path.endswith(here) else ""
    if not prefix or any(path != prefix + here for path, here in found.items()):
        prefix = ""
    return {path: path.removeprefix(prefix) for path in new}
