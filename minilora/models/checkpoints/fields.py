"""config.json: read with care, in one spelling whichever version wrote it, and refused where it asks for something else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError, FileError, FormatError
from ...formats.json_rules import no_number, once
from ...formats.quantised.settings import FIELD, read_settings
from ..families.contract import Family, Head

__all__ = ["config_of", "one_spelling", "read_fields", "read_json", "read_json_list"]

MOST = 16 << 20  # bytes of a JSON file: real ones have some KB

# Fields of every family that change what is computed: as `Family.fixed`.
FIXED: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,), "add_cross_attention": (False,), "is_decoder": (False,), "pruned_heads": ({},),
    "position_embedding_type": ("absolute",), "auto_map": ({},),
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises
    ------
    FileError
        If it cannot be read.
    FormatError
        If it is no JSON object, names a field twice, or is too large to be what it should be.
    """
    found = _json(path)
    if not isinstance(found, dict):
        raise FormatError(f"{path}: expected a JSON object, {{...}}, got {type(found).__name__}")
    return found


def read_json_list(path: Path) -> list[Any]:
    """A JSON list from a file; the errors are those of `read_json`."""
    found = _json(path)
    if not isinstance(found, list):
        raise FormatError(f"{path}: expected a JSON list, [...], got {type(found).__name__}")
    return found


def _json(path: Path) -> Any:
    try:
        size = path.stat().st_size
        text = path.read_bytes() if size <= MOST else b""
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error
    if size > MOST:
        raise FormatError(f"{path}: {size:,} bytes, where a file of settings has some thousand: this is something else")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_constant=no_number)
    except RecursionError as error:
        raise FormatError(f"{path}: no JSON that is meant for reading: nested too deeply") from error
    except ValueError as error:  # what is no UTF-8 too
        raise FormatError(f"{path}: no JSON: {error}") from error


def read_fields(folder: Path) -> dict[str, Any]:
    """The fields of a checkpoint's config.json in one spelling; what is no checkpoint is refused, with what it is."""
    path = folder / "config.json"
    if not path.is_file():
        raise _no_checkpoint(folder)
    fields = read_json(path)
    if fields.get(FIELD):
        try:
            read_settings(fields[FIELD])
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from error
    try:
        return one_spelling(fields)
    except ConfigError as error:
        raise FormatError(f"{path}: {error}") from error


def _no_checkpoint(folder: Path) -> Exception:
    if not folder.is_dir():
        return FileError(f"{folder}: no such folder. A checkpoint is a folder with config.json and model.safetensors; nothing "
                         "is downloaded here")
    if (folder / "adapter_config.json").is_file():
        return FormatError(f"{folder}: this is an adapter, not a checkpoint: load the model that it was trained on, "
                           f"model = minilora.models.load(base), then minilora.formats.load_adapter(model, {str(folder)!r})")
    return FormatError(f"{folder}: there is no config.json: expected a folder as transformers saves it, config.json and "
                       "model.safetensors")


def one_spelling(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as transformers 5 spells them: ``dtype`` for ``torch_dtype``, ``rope_parameters`` for rope_theta and rope_scaling.

    Raises
    ------
    ConfigError
        If both spellings are there and disagree.
    """
    fields = dict(fields)
    problems = []
    old = fields.pop("torch_dtype", None)
    new = fields.get("dtype", old)
    if old is not None and new != old:
        problems.append(f"torch_dtype is {old!r} and dtype is {new!r}, two names of one thing")
    if new is not None:
        fields["dtype"] = new
    rope, scaling = fields.get("rope_parameters"), fields.pop("rope_scaling", None)
    theta = fields.pop("rope_theta", None)
    if any(part is not None and not isinstance(part, dict) for part in (rope, scaling)):
        problems.append(f"rope_parameters and rope_scaling must be objects, got {rope!r} and {scaling!r}")
    else:
        before = dict(scaling or {})
        kind = before.pop("type", None)  # older still than rope_type
        if kind is not None:
            before.setdefault("rope_type", kind)
        if theta is not None:
            before["rope_theta"] = theta
        rope = rope or {}
        for name, value in before.items():
            if rope and rope.get(name) != value:
                problems.append(f"{name} is {value!r} in the old spelling (rope_theta, rope_scaling) and {rope.get(name)!r} in "
                                "rope_parameters")
        if rope or before:
            fields["rope_parameters"] = {"rope_type": "default", **before, **rope}
    if problems:
        raise ConfigError("two spellings disagree: " + "; ".join(problems))
    return fields


def config_of(family: Family, head: Head, fields: Mapping[str, Any], where: Path) -> tuple[Any, list[str]]:
    """The config that a family makes of the fields, and notes about what counts in training and is not computed here.

    Raises
    ------
    FormatError
        With every field that asks for what is not here, or is out of range.
    """
    problems = []
    for name, accepted in {**FIXED, **family.fixed, **head.fixed}.items():
        value = accepted[0] if fields.get(name) is None else fields[name]
        if not any(value == one and type(value) is type(one) for one in accepted):
            problems.append(f"{name} is {value!r}: only {' or '.join(map(repr, accepted))} is computed here")
    config = None
    try:
        config = family.config(**family.read(fields))
    except ConfigError as error:
        problems.append(str(error))
    except TypeError as error:  # a value of a kind that no check of ours expects
        problems.append(f"a field has a value of the wrong kind: {error}")
    if problems:
        raise FormatError("\n  ".join([f"{where}: {head.architecture} ({family.model_type}) cannot be computed as it says:",
                                       *problems]))
    notes = [f"{name} is {fields[name]!r} in config.json, and is not computed here: training lacks it, evaluation does not "
             "need it" for name in family.lacking if fields.get(name)]
    return config, notes
