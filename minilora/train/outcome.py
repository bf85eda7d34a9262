"""What a run leaves in its folder: run.json at its beginning, and what it trained at its end."""

from __future__ import annotations

import datetime
import json
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

from ..errors import DTypeError, FileError, StateError
from ..formats.placing.prefixes import save_prefix
from ..formats.placing.saving import save_adapter
from ..formats.subspaces import save_subspace
from ..formats.tensors.durable import replace_folder
from ..formats.tensors.writing import save_state
from ..lora.adapters.switching import adapter_names, bias_mode, biases_of
from ..lora.layers.places import layers_of, saved_of
from ..tuners.fronts import Fronts
from ..nn.module import Module
from ..release import __version__
from ..tuners.intrinsic.subspace import Subspace
from .beside import Beside
from .checkpoints.identity import held_kinds
from .metrics import plain
from .run import Run

__all__ = ["Outcome", "written"]

STATE = "state.safetensors"
# What a tokenizer reads: it goes with a whole model, so that the folder is one that `models.load` and a tokenizer take.
BESIDE_WEIGHTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "vocab.txt",
                  "added_tokens.json", "chat_template.jinja", "generation_config.json")


class Outcome(Beside):
    """Writes run.json before the first step, and at the end what was trained.

    The folder is replaced as a whole at the beginning already: where that cannot be done at the end, nobody trains in vain.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, run: Run) -> None:
        with replace_folder(self.folder) as new:
            (new / "run.json").write_text(json.dumps(plain(described(run)), indent=2) + "\n", encoding="utf-8")

    def end(self, run: Run) -> None:
        if run.finished:
            run.notes += written(run.model, self.folder)


def described(run: Run) -> dict[str, Any]:
    """What a run is, for people and for whoever wants to do it again."""
    device = next(run.model.parameters()).device
    trained = sum(group.data.size for group in run.optimizer.groups)
    return {
        "schema": "minilora.run/1", "command": sys.argv,
        "began": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "settings": run.settings.as_dict(), "steps": run.total, "resumed_after": run.step, "threads": run.threads,
        "processes": run.comm.size, "device": device.name, "model": type(run.model).__name__, "trained": trained,
        "total": sum(p.size for p in run.model.parameters()), "stored": held_kinds(run.model),
        "adapters": adapter_names(run.model),
        "labels": getattr(getattr(run.model, "labels", None), "names", None),
        "problem_type": getattr(getattr(run.model, "labels", None), "problem_type", None),
        "origin": getattr(getattr(run.model, "origin", None), "folder", None),
        "data": {"rows": len(run.data), "fingerprint": run.data.fingerprint},
        "versions": {"minilora": __version__, "numpy": numpy.__version__, "python": platform.python_version()},
    }


def written(model: Module, folder: Path) -> list[str]:
    """Write what is trained in a model: adapters as PEFT folders, else the whole model, else its state.

    One adapter lies in the folder itself, several each in a folder of its own name. Trained numbers that belong to no adapter,
    and that a PEFT folder therefore cannot hold, are written as state.safetensors beside it.

    Returns
    -------
    list of str
        What deserves a look.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, Subspace):
        save_subspace(model, folder)
        beside = {path: p for path, p in model.named_parameters() if p.trainable and not any(p is one for one in model.own())}
        if beside:
            save_state(folder / STATE, beside)
        return [f"{len(beside)} parameters were trained beside the subspace: they are in {STATE}"] if beside else []
    names = [name for name in adapter_names(model) if any(p.trainable for p in parts_of(model, name))]
    front = next((module for _, module in model.named_modules() if isinstance(module, Fronts)), None)
    fronts = {} if front is None else {name: list(front.parts(name)) for name in front.names}
    fronts = {name: parts for name, parts in fronts.items() if any(p.trainable for p in parts)}
    alone = len(names) + len(fronts) == 1
    notes = [note for name in names for note in save_adapter(model, folder if alone else folder / name, name)]
    for name in fronts:
        save_prefix(model, folder if alone else folder / (f"{name}.prefix" if name in names else name), name)
    covered = {id(p) for name in names for p in parts_of(model, name)} | {id(p) for parts in fronts.values() for p in parts}
    left = {path: p for path, p in model.named_parameters() if p.trainable and id(p) not in covered}
    if not names and not fronts and hasattr(model, "save"):
        try:
            model.save(folder)
        except (DTypeError, StateError) as error:
            notes.append(f"{STATE} holds what was trained, since it is no checkpoint as transformers has it: {error}")
        else:
            take_along(getattr(getattr(model, "origin", None), "folder", None), folder)
            return notes
    if not names and not fronts:
        save_state(folder / STATE, model.state_dict())
    elif left:
        save_state(folder / STATE, left)
        notes.append(f"{len(left)} trained parameters belong to no adapter ({', '.join([*left][:3])}"
                     f"{' ...' if len(left) > 3 else ''}): they are in {STATE}, and PEFT does not read them")
    return notes


def parts_of(model: Module, name: str) -> Iterator[Any]:
    """The parameters that an adapter file holds."""
    for layer in layers_of(model).values():
        if name in layer.adapters:
            yield from layer.adapters[name].parameters()
            if bias_mode(layer.adapters[name]) != "none":
                yield from biases_of(model)
    for wrapper in saved_of(model).values():
        if name in wrapper.copies:
            yield from wrapper.copies[name].parameters()


def take_along(source: Path | None, folder: Path) -> None:
    """Copy the files of a tokenizer beside the weights."""
    for name in BESIDE_WEIGHTS if source is not None and source.resolve() != folder.resolve() else ():
        if (source / name).is_file():  # type: ignore[operator]
            try:
                shutil.copyfile(source / name, folder / name)  # type: ignore[operator]
            except OSError as error:
                raise FileError(f"cannot copy {name} of {source} into {folder}: {error.strerror}") from error
