"""The files of sentence-transformers: modules.json and what it names, read and written.

The modules are run one after the other: a transformer, a pooling, and, optionally, a normalisation or a linear layer: Dense,
the classifier of a `SentenceClassifier`. Their settings stand in files of the folders that modules.json names.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy

from ... import backend
from ...errors import FormatError
from ...formats.sentences import CLASSES, DENSE, MODES, dense_fields, module_fields, pooling_fields
from ..heads.pooled import POOLINGS, SentenceClassifier, width_of
from ..heads.sentences import SentenceEncoder
from .fields import read_json, read_json_list

__all__ = ["Pooling", "fill_classifier", "read_pooling", "write_pooling"]

KINDS = ("Transformer", "Pooling", "Normalize")


class Pooling(NamedTuple):
    """What modules.json says.

    Attributes
    ----------
    folder : Path
        Where the transformer's checkpoint is.
    pooling, normalize, max_tokens
        Arguments of `SentenceEncoder`.
    dense : Path, optional
        The folder of a linear layer behind the pooling: then it is a classifier.
    """

    folder: Path
    pooling: str = "mean"
    normalize: bool = False
    max_tokens: int | None = None
    dense: Path | None = None


def read_pooling(folder: Path) -> Pooling:
    """What a folder's modules.json says; without one the mean over the tokens, as sentence-transformers takes it.

    Raises
    ------
    FormatError
        If there is a module that is not here, or they come in another order.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return Pooling(folder)
    modules = read_json_list(path)
    kinds = [str(module.get("type", "")).rpartition(".")[2] if isinstance(module, dict) else "?" for module in modules]
    if kinds not in (list(KINDS[:2]), list(KINDS), list(CLASSES)):
        raise FormatError(f"{path}: expected the modules {', '.join(KINDS[:2])} and, optionally, {KINDS[2]} or {CLASSES[2]}, "
                          f"got {', '.join(kinds)}: the others are not computed here")
    places = [_inside(folder, path, module.get("path", "")) for module in modules]
    return Pooling(places[0], _mode(places[1] / "config.json"), kinds == list(KINDS),
                   _most(places[0] / "sentence_bert_config.json"), places[2] if kinds == list(CLASSES) else None)


def _inside(folder: Path, path: Path, name: Any) -> Path:
    parts = PurePosixPath(name).parts if isinstance(name, str) else ("..",)
    if any(part in ("..", "/") or "\\" in part or ":" in part or "\0" in part for part in parts):
        raise FormatError(f"{path}: the path {name!r} is not that of a folder in this one")
    return folder.joinpath(*parts)


def _mode(path: Path) -> str:
    """How a pooling module pools: the old spelling has a field for each way, the new one a word or a list of them."""
    fields = read_json(path)
    given = fields.get("pooling_mode")
    if given is None:
        modes = [MODES.get(name, name) for name, on in fields.items() if name.startswith("pooling_mode_") and on]
    else:
        modes = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise FormatError(f"{path}: pools by {modes}: one of {', '.join(POOLINGS)} is computed here")
    return str(modes[0])


def _most(path: Path) -> int | None:
    value = read_json(path).get("max_seq_length") if path.is_file() else None
    if value is not None and (type(value) is not int or value < 1):
        raise FormatError(f"{path}: max_seq_length must be an int >= 1, got {value!r}")
    return value


def fill_classifier(model: SentenceClassifier, folder: Path) -> None:
    """Put the numbers of a Dense in the place of a classifier's.

    Raises
    ------
    FormatError
        If it is no linear layer of this size.
    """
    from ...formats.tensors.reading import open_state

    said, head = read_json(folder / "config.json"), model.classifier
    assert head.bias is not None
    expected = dense_fields(*head.weight.shape)
    problems = [f"{name} is {said.get(name)!r}, expected {value!r}" for name, value in expected.items()
                if said.get(name) != value or type(said.get(name)) is not type(value)]
    state = open_state(folder / "model.safetensors")
    shapes = {"linear.weight": head.weight.shape, "linear.bias": head.bias.shape}
    problems += [f"{name}: expected {shape}, got {state.shapes.get(name)}" for name, shape in shapes.items()
                 if state.shapes.get(name) != shape]
    problems += [f"{name}: unexpected" for name in state.shapes if name not in shapes]
    problems += [f"{name}: expected numbers of a float, got {state.dtypes[name]}" for name in shapes
                 if not state.dtypes.get(name, "F").startswith(("F", "BF"))]
    if problems:
        raise FormatError("\n  ".join([f"{folder}: not the classifier of {head.weight.shape[0]} classes ("
                                       f"{', '.join(model.labels.names)}) that config.json tells:", *problems]))
    for name, p in (("linear.weight", head.weight), ("linear.bias", head.bias)):
        p.data = backend.to_device(numpy.require(state[name].astype(p.dtype, copy=False), requirements="A"))


def write_pooling(model: SentenceEncoder | SentenceClassifier, folder: Path) -> None:
    """Write modules.json and what it names, beside the transformer's checkpoint."""
    from ...formats.tensors.writing import save_state

    kinds: tuple[str, ...] = CLASSES
    if isinstance(model, SentenceEncoder):
        kinds = KINDS if model.normalize else KINDS[:2]
    files: dict[str, Any] = {"modules.json": module_fields(kinds),
                             "1_Pooling/config.json": pooling_fields(width_of(model.config), model.pooling)}
    if model.max_tokens is not None:
        files["sentence_bert_config.json"] = {"do_lower_case": False, "max_seq_length": model.max_tokens}
    if isinstance(model, SentenceClassifier):
        files[f"{DENSE}/config.json"] = dense_fields(*model.classifier.weight.shape)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if isinstance(model, SentenceClassifier):
        head = model.classifier
        save_state(folder / DENSE / "model.safetensors", {"linear.weight": head.weight, "linear.bias": head.bias},
                   {"format": "pt"})
