"""A base as files: its tensors, mapped; its config; and what else lies beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import FileError, FormatError
from ..adapters.found import read_json
from ..quantised.file import QuantisedFile, as_said
from ..quantised.settings import FIELD, read_settings
from ..tensors.durable import recover_folder
from ..tensors.reading import StateFile, open_state

__all__ = ["Checkpoint", "OF_A_RUN", "PATCH", "RECORD", "TRANSPOSED", "TRANSPOSED_NAMES", "open_checkpoint"]

PATCH, RECORD = "minilora_patch.safetensors", "minilora_merge.json"
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")  # model types with matrices stored (in, out)
TRANSPOSED_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
STEMS = ("model", "diffusion_pytorch_model")
# Weights in other forms: they would not be the merged ones.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5", ".gguf", ".onnx", ".onnx_data", ".npz", ".mlmodel",
                 ".safetensors", ".index.json")

# What `train` writes into the folder of a run beside a model: the run's own, and no part of the model.
OF_A_RUN = ("checkpoints", "metrics.jsonl", "report.json", "report.png", "run.json", "state.safetensors")


class Beside(NamedTuple):
    """Files to copy, by their path inside the folder; and what is left where it is."""

    copied: dict[str, Path]
    left: list[str]


class Checkpoint:
    """The tensors of a base and the files around them.

    Attributes
    ----------
    path : Path
        What was given: a folder, a file, or an index.
    folder : Path
        Where the files lie.
    state : StateFile or QuantisedFile
        The latter of a base in 4 bits, as its config says.
    config : mapping or None
        What config.json says.
    """

    def __init__(self, path: Path, main: Path) -> None:
        self.path, self.folder, self.main = path, main.parent, main
        file: StateFile = open_state(main)
        config = self.folder / "config.json"
        self.config: Mapping[str, Any] | None = read_json(config) if config.is_file() else None
        self.state: Any = file
        if not self.quantised() or self.settings is not None:
            self.state = as_said(file, self.config, turned_by(self.config))

    @property
    def indexed(self) -> bool:
        return self.main.suffix == ".json"

    def files(self) -> list[str]:
        """The names of the files of weights, the index among them."""
        return [part.path.name for part in self.state.parts] + ([self.main.name] if self.indexed else [])

    def beside(self) -> Beside:
        """What belongs to the model besides its weights: config, tokenizer, licence ...; of a single file, nothing does.

        Not what a run left in the folder, which is told.
        """
        found = Beside({}, [])
        if self.path.is_dir():
            taken = {*self.files(), PATCH, RECORD}
            found.left.extend(name for name in OF_A_RUN if name not in taken and (self.folder / name).exists())
            for name, path in _walk(self.folder, ""):
                if name in taken or name.partition("/")[0] in OF_A_RUN:
                    continue
                inner = "/" in name and path.suffix == ".safetensors"  # a part with weights of its own, such as 2_Dense
                if path.is_dir() or (name.endswith(OTHER_WEIGHTS) and not inner):
                    found.left.append(name)
                else:
                    found.copied[name] = path
        return found

    @property
    def settings(self) -> Any:
        """What config.json says of a base in 4 bits; None of any other."""
        try:
            return read_settings((self.config or {})[FIELD])
        except (KeyError, FormatError):
            return None

    @property
    def four_bits(self) -> bool:
        """Whether weights are in 4 bits that can be decoded."""
        return isinstance(self.state, QuantisedFile)

    def quantised(self) -> str:
        """How the base is quantised, by its config; "" if it is not."""
        said = (self.config or {}).get("quantization_config") or (self.config or {}).get("quantization")
        if not said:
            return ""
        method = said.get("quant_method") if isinstance(said, Mapping) else None
        return str(method or "some method")


def turned_by(config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Endings of the names of matrices that the unquantised file has as (in, out); by the config."""
    kind = (config or {}).get("model_type")
    return tuple(f".{name}.weight" for name in TRANSPOSED_NAMES) if isinstance(kind, str) and kind in TRANSPOSED else ()


def _walk(folder: Path, before: str) -> Iterator[tuple[str, Path]]:
    """Files below a folder, and links to folders, which are not followed: they may lead in a circle. Nothing hidden."""
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name.startswith(".") and (path.is_dir() or name.endswith(".tmp")):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path, f"{before}{name}/")
        elif path.is_dir() or path.is_file():
            yield before + name, path


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The base at a path: a folder, a file ``*.safetensors``, or an index of several.

    Raises
    ------
    FileError, FormatError
        If nothing is there, it is damaged, or there are no tensors in safetensors files, or more than one set of them.
    """
    given = Path(os.fsdecode(path))
    found = recover_folder(given)
    if not found.exists():
        raise FileError(f"{given}: there is no such file or folder: expected a folder with config.json and *.safetensors")
    return Checkpoint(found, _weights_in(found)) if found.is_dir() else Checkpoint(given, given)


def _weights_in(folder: Path) -> Path:
    names = {entry.name for entry in folder.iterdir() if entry.is_file()}
    for stem in STEMS:
        for ending in (".safetensors", ".safetensors.index.json"):
            if stem + ending in names:
                return folder / (stem + ending)
    if "adapter_config.json" in names:
        raise FormatError(f"{folder}: this is an adapter, and a base is expected here: BASE comes first, then its adapters")
    indexes = sorted(name for name in names if name.endswith(".safetensors.index.json"))
    single = sorted(name for name in names if name.endswith(".safetensors") and name != PATCH)
    for found in (indexes, single):
        if len(found) == 1:
            return folder / found[0]
    if indexes or single:
        raise FormatError(f"{folder}: which of {', '.join([*indexes, *single][:8])}? Give the path of the file")
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".gguf")))
    told = f": there is {pickles[0]}, which minilora does not merge into" if pickles else ""
    raise FormatError(f"{folder}: no *.safetensors in this folder{told}")
