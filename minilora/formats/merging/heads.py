"""A classifier's head that an adapter brings along: what the merged folder must say, to be read as the classifier that it is.

Such a head is saved whole in the adapter. transformers has it beside the body, and config.json names the class of the model and
the labels. An encoder of sentences has it as a module Dense behind the pooling: a file of its own, which modules.json names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy

from ...errors import FormatError
from ...lora.merging.arithmetic import bytes_of
from ..adapters.beside import classes_beside
from ..sentences import CLASSES, DENSE, dense_fields, module_fields, pooling_fields
from ..tensors.dtypes import array_dtype, file_dtype
from ..tensors.writing import header_bytes, in_file_order
from .checkpoint import Checkpoint
from .fitting import Fitting
from .site import Given, Site

__all__ = ["files_of_head"]

ENDINGS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
POOLED = "FEATURE_EXTRACTION"  # an adapter of the encoder alone, as a classifier of pooled vectors is saved
CLASS = re.compile(r"([A-Z]\w*?)(Model|LMHeadModel|DoubleHeadsModel|For[A-Z]\w*)")
LAST = (".classifier.weight", ".score.weight", ".classifier.out_proj.weight")  # (classes, in)
PARTS = ("classifier.weight", "classifier.bias")
MODULES = "modules.json"


# -- what the folder says -----------------------------------------------------------------------------------------------

def files_of_head(fitting: Fitting, to: str | None) -> dict[str, bytes | None]:
    """Change what config.json will say; the other files that a head needs, and None for those that must not be copied.

    Parameters
    ----------
    fitting : Fitting
        That fits; `changes`, `sites`, `notes` and `problems` of it are changed.
    to : str or None
        The file's word for the dtype that all is converted to.
    """
    found = None if fitting.problems else _head(fitting)
    if found is None:
        _note_new(fitting)
        return {}
    given, site = found
    base, task = fitting.base, str(given.saved.config.task_type)
    pooled = task == POOLED and all(name in fitting.sites for name in PARTS) and site.name == PARTS[0]
    if not base.path.is_dir() or base.config is None or not (pooled or task in ENDINGS):
        _note_new(fitting)
        return {}
    try:
        stem = _stem(base)
        files = _dense(fitting, to) if pooled else _no_modules(base)
    except FormatError as error:
        fitting.problems.append(f"{given.label}: its head {site.name} cannot be said in the files of the base: {error}")
        return {}
    assert site.whole is not None
    said: dict[str, Any] = {"architectures": [stem + ("Model" if pooled else ENDINGS[task])]}
    said.update(_labels(given, base.config, len(site.whole), task != "TOKEN_CLS"))
    fitting.changes.update({name: value for name, value in said.items() if base.config.get(name) != value})
    names = list(said["id2label"].values())
    shown = f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
    what = f"the module Dense behind the pooling, in {DENSE}" if pooled else said["architectures"][0]
    fitting.notes.append(f"the head of {given.label}: {what}; {len(names)} outputs: {shown}")
    return files


def _note_new(fitting: Fitting) -> None:
    if not fitting.problems and any(site.source is None for site in fitting.sites.values()):
        fitting.notes.append("config.json does not say what is new: architectures is yours to change. Of a classifier's head "
                             'merge does it, where adapter_config.json says "task_type": "SEQ_CLS" or "TOKEN_CLS", and the '
                             "base is a folder with a config.json")


def _head(fitting: Fitting) -> tuple[Given, Site] | None:
    """The matrix that makes the classes, and the adapter that it is from."""
    for given in fitting.given:
        paths = fitting.mapped[given.label]
        for name in given.saved.saved:
            owner, _, last = name.rpartition(".")
            site = fitting.sites.get(f"{paths[owner]}.{last}")
            if site is not None and site.whole is not None and site.whole.ndim == 2 and f".{site.name}".endswith(LAST):
                return given, site
    return None


def _stem(base: Checkpoint) -> str:
    """``Bert`` of BertModel, BertForMaskedLM and so on."""
    named = (base.config or {}).get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    found = CLASS.fullmatch(first) if isinstance(first, str) else None
    if found is None:
        raise FormatError(f"{base.folder / 'config.json'}: architectures is {named!r}: write the class of the model there, "
                          'such as ["BertModel"], and merge again; or leave the adapter beside the base')
    return found[1]


def _labels(given: Given, config: Mapping[str, Any], n: int, of_texts: bool) -> dict[str, Any]:
    """The classes: as the run said, else as the base had them if it had as many, else by number."""
    run, own = classes_beside(Path(given.label)), config.get("id2label")
    names = run.names
    if names is None or len(names) != n:
        names = list(map(str, own.values())) if isinstance(own, dict) and len(own) == n else [f"LABEL_{i}" for i in range(n)]
    fields: dict[str, Any] = {"id2label": {str(i): name for i, name in enumerate(names)},
                              "label2id": {name: i for i, name in enumerate(names)}}
    if "num_labels" in config:
        fields["num_labels"] = n
    if of_texts:
        before = config.get("problem_type") if fields["id2label"] == own else None
        fields["problem_type"] = run.problem_type or ("regression" if n == 1 else before)
    return fields


def _no_modules(base: Checkpoint) -> dict[str, bytes | None]:
    """A classifier of transformers is no encoder of sentences, as which modules.json would have it read."""
    return {MODULES: None} if (base.folder / MODULES).is_file() else {}


# -- an encoder of sentences --------------------------------------------------------------------------------------------

def _dense(fitting: Fitting, to: str | None) -> dict[str, bytes | None]:
    """Take a classifier out of the tensors of the base's files: the files of the module that it becomes."""
    W, b = (fitting.sites[name].whole for name in PARTS)
    if W is None or b is None or b.shape != W.shape[:1]:
        raise FormatError(f"expected one linear layer with a bias, got {[getattr(x, 'shape', None) for x in (W, b)]}")
    n, d = map(int, W.shape)
    path = fitting.base.folder / MODULES
    files: dict[str, Any] = {f"{DENSE}/config.json": dense_fields(n, d), MODULES: module_fields(CLASSES)}
    if path.is_file():
        files[MODULES] = [*_modules(path), files[MODULES][2]]
    else:
        files["1_Pooling/config.json"] = pooling_fields(d, "mean")
        fitting.notes.append(f"the base has no {MODULES}: the mean over the tokens is pooled, as where the adapter was trained")
    for name in PARTS:
        del fitting.sites[name]
    fitting.notes = [note for note in fitting.notes if not note.startswith(tuple(f"{name} " for name in PARTS))]
    texts = {name: (json.dumps(said, indent=2) + "\n").encode() for name, said in files.items()}
    return {**texts, f"{DENSE}/model.safetensors": _stored({"linear.weight": W, "linear.bias": b}, to)}


def _modules(path: Path) -> list[Any]:
    """The transformer and the pooling of a modules.json."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        kinds = [str(each["type"]).rpartition(".")[2] for each in said]
        places = [each["path"] for each in said]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(f"{path}: it is damaged ({error!r:.80})") from error
    if kinds[:2] != list(CLASSES[:2]) or kinds[2:] not in ([], ["Normalize"], ["Dense"]) or places[0] != "":
        raise FormatError(f"{path}: its modules are {', '.join(kinds)}, and a classifier stands behind {CLASSES[0]}, in the "
                          f"folder itself, and {CLASSES[1]}: leave the adapter beside the base")
    if DENSE in places[:2] or kinds[2:] == ["Dense"] and places[2] != DENSE:
        raise FormatError(f"{path}: expected a module Dense in {DENSE}, got {places}: leave the adapter beside the base")
    return list(said[:2])


def _stored(arrays: Mapping[str, Any], to: str | None) -> bytes:
    """A file of these tensors, small ones."""
    ready = {name: numpy.ascontiguousarray(array if to is None else array.astype(array_dtype(to)))
             for name, array in arrays.items()}
    ready = dict(sorted(ready.items(), key=lambda item: in_file_order(item[0], file_dtype(item[1].dtype) or "")))
    described = {name: (file_dtype(array.dtype) or "", array.shape, array.nbytes) for name, array in ready.items()}
    head = header_bytes("model.safetensors", described, {"format": "pt"})
    return b"".join([head, *(bytes(bytes_of(array)) for array in ready.values())])
