"""The files of sentence-transformers: modules.json and what it names, read and written.

The modules are run one after the other: a transformer, a pooling, and, optionally, a normalisation. Their settings stand in
files of the folders that modules.json names.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ...errors import FormatError
from ..heads.sentences import POOLINGS, SentenceEncoder
from .fields import read_json, read_json_list

__all__ = ["Pooling", "read_pooling", "write_pooling"]

KINDS = ("Transformer", "Pooling", "Normalize")
MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


class Pooling(NamedTuple):
    """What modules.json says.

    Attributes
    ----------
    folder : Path
        Where the transformer's checkpoint is.
    pooling, normalize, max_tokens
        Arguments of `SentenceEncoder`.
    """

    folder: Path
    pooling: str = "mean"
    normalize: bool = False
    max_tokens: int | None = None


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
    if kinds not in (list(KINDS[:2]), list(KINDS)):
        raise FormatError(f"{path}: expected the modules {', '.join(KINDS[:2])} and, optionally, {KINDS[2]}, got "
                          f"{', '.join(kinds)}: the others are not computed here")
    places = [_inside(folder, path, module.get("path", "")) for module in modules]
    return Pooling(places[0], _mode(places[1] / "config.json"), len(kinds) == 3, _most(places[0] / "sentence_bert_config.json"))


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


def write_pooling(encoder: SentenceEncoder, folder: Path) -> None:
    """Write modules.json and what it names, beside the transformer's checkpoint."""
    kinds = KINDS if encoder.normalize else KINDS[:2]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [{"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{kind}"}
               for i, kind in enumerate(kinds)]
    pooling: dict[str, Any] = {"word_embedding_dimension": encoder.width, "pooling_mode_max_tokens": False,
                               "pooling_mode_mean_sqrt_len_tokens": False}
    pooling.update({name: mode == encoder.pooling for name, mode in MODES.items()})
    files: dict[str, Any] = {"modules.json": modules, "1_Pooling/config.json": pooling}
    if encoder.max_tokens is not None:
        files["sentence_bert_config.json"] = {"do_lower_case": False, "max_seq_length": encoder.max_tokens}
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
