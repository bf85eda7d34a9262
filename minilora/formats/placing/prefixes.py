"""A prefix or prompt into a model, and out of it: PEFT's folders, and beside them what it takes to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from ... import backend, nn
from ...engine import no_grad
from ...errors import ConfigError, DTypeError, FormatError
from ...shown import shown
from ...tensor import Parameter
from ...tuners.config import PrefixConfig, PromptConfig
from ...tuners.switching import activate, attach, body_of, check_free, heads_of, of_name
from ...tuners.virtual import Prefix, Prompt, Virtual, fitted, trained_dtype
from ..adapters.faults import Faults
from ..adapters.found import CONFIG, NAMES, PICKLES
from ..adapters.peft.virtual import FORMAT, MLP, OURS, RESUMABLE, SavedPrefix, read_prefix, settings_of

__all__ = ["LoadedPrefix", "load_prefix", "save_prefix"]

FILE = "adapter_model.safetensors"
NEAR = 1e-3  # what the MLP makes, in another program's float32, and what the file holds, of the largest


@shown
class LoadedPrefix(NamedTuple):
    """What `load_prefix` put into a model. Printed as text.

    Attributes
    ----------
    name : str
    saved : SavedPrefix
    heads : tuple of str
        Paths of the parameters of the model that the file has set.
    trainable : bool
    """

    name: str
    saved: SavedPrefix
    heads: tuple[str, ...]
    trainable: bool

    def __str__(self) -> str:
        lines = [f"{self.name!r} from {self.saved.source}: {self.saved}"]
        lines += [f"set in the model: {', '.join(self.heads)}"] if self.heads else []
        return "\n".join(lines)


def load_prefix(model: nn.Module, source: Any, name: str = "default", *, trainable: bool = False,
                allow_nonfinite: bool = False) -> LoadedPrefix:
    """Put a prefix or a prompt from a folder of PEFT's, or of ours, into a model, and make it the active one.

    Parameters
    ----------
    model : Module
        The base.
    source : path or SavedPrefix
    name : str
        Of it in the model.
    trainable : bool
        Go on training it: with the MLP, where minilora's own file lies beside PEFT's. By default everything is frozen.
    allow_nonfinite : bool
        Take NaN and inf too.

    Returns
    -------
    LoadedPrefix

    Raises
    ------
    FormatError
        If the file is damaged, or for another model: other layers, heads, or numbers of a head. The model is as before then.
    FileError
        If it cannot be read.
    ConfigError
        If the name is taken or cannot be one.
    DTypeError
        If nothing can stand in front of this model.

    Notes
    -----
    Modules that were trained with it (a classifier) are set in the model, where they are: the base is then another one.
    Nothing tells whether the base is the one that it was trained for, if the sizes are the same.
    """
    _, body = body_of(model)
    check_free(model, name)
    if not isinstance(source, SavedPrefix):
        source = read_prefix(source, allow_nonfinite=allow_nonfinite)
    try:
        config = fitted(source.config, body.front_sizes)
    except ConfigError as error:
        raise FormatError(f"{source.source}: {error}") from None
    mlp = dict(source.mlp) if trainable else {}
    if isinstance(config, PromptConfig) and config.task_type == "SEQ_CLS" and not source.ours and hasattr(body, "pool"):
        raise FormatError(f"{source.source}: a prompt for a classifier on an encoder: PEFT's classifier reads the first vector "
                          "of the prompt there, minilora's the first token, so that the classes would be others. Train it "
                          "here, or take prefix tuning")
    table: Any = body.embedding  # type: ignore[attr-defined]
    own = _made(config, source, mlp, table.weight)
    _refuse_other_mlp(own, source)
    parameters = _heads(model, source)
    heads = dict.fromkeys(path.rpartition(".")[0] for path in parameters)
    own.heads = tuple(heads)
    for path, (p, array) in parameters.items():
        new = backend.to_device(numpy.array(array).astype(p.dtype), p.device)
        if p.room is None:  # a new array: the old one may lie in a file
            p.data = new
        else:  # a view of an optimizer's flat array
            p.data[...] = new
    attach(model, name, own)
    activate(model, name, trainable)
    return LoadedPrefix(name, source, tuple(parameters), trainable)


def _made(config: Any, source: SavedPrefix, mlp: dict[str, Any], table: Parameter) -> Virtual:
    dtype = trained_dtype(table.dtype)

    def parameter(array: Any) -> Parameter:
        return Parameter(backend.to_device(numpy.array(array).astype(dtype), table.device), trainable=False)

    if not isinstance(config, PrefixConfig):
        return Prompt(config, parameter(source.values))
    if mlp:
        first, *rest = (parameter(mlp[part]) for part in MLP)
        return Prefix(config, first, (), tuple(rest))  # type: ignore[arg-type]
    return Prefix(config, parameter(source.values))


def _refuse_other_mlp(own: Virtual, source: SavedPrefix) -> None:
    """Raise `FormatError` if the MLP makes something else than what the file holds: one of the two is of another save."""
    if not source.mlp or not isinstance(own, Prefix) or own.hidden_weight is None:
        return
    with no_grad():
        made = backend.to_host(own.values().data).astype("float64")
    held = numpy.asarray(source.values).astype("float64")
    far = float(abs(made - held).max())
    if not far <= NEAR * max(1.0, float(abs(held).max())):
        raise FormatError(f"{source.source}: {RESUMABLE} beside it makes other keys and values, by up to {far:.3g}: the two "
                          "were not saved together. To use what PEFT's file holds, load it with trainable=False, or remove "
                          f"{RESUMABLE}")


def _heads(model: nn.Module, source: SavedPrefix) -> dict[str, tuple[Parameter, Any]]:
    """The parameters of the model that the file sets, with their arrays; `FormatError` with those that do not fit."""
    own, found, faults = dict(model.named_parameters()), {}, Faults()
    for path, array in source.saved.items():
        hits = [other for other in own if other == path or other.endswith(f".{path}")]
        if len(hits) != 1:
            faults.add(path, f"the model has {'no' if not hits else 'several'} such parameters", array)
        elif own[hits[0]].shape != tuple(array.shape):
            faults.add(path, f"expected {own[hits[0]].shape}, as the model has", array)
        else:
            found[hits[0]] = own[hits[0]], array
    faults.refuse(source.source)
    return found


def save_prefix(model: nn.Module, folder: Any, name: str | None = None) -> None:
    """Write a prefix or a prompt as PEFT does, and beside it what makes it, if that is an MLP: to train it on.

    Parameters
    ----------
    model : Module
    folder : path
        Replaced when all is on the disk; other files in it stay.
    name : str, optional
        May be left out if there is only one.

    Raises
    ------
    ConfigError
        If there is none of this name, or it is to be said which.
    FileError
        If it cannot be written. What was there before is there still.
    """
    from ..tensors.durable import replace_folder
    from ..tensors.writing import save_state

    if not isinstance(model, nn.Module):
        raise DTypeError(f"save_prefix: expected a model, got {type(model).__name__}")
    name, own = of_name(model, name)
    with no_grad():
        tensors = {"prompt_embeddings": numpy.array(backend.to_host(own.values().data))}
    modules = dict(model.named_modules())
    for path in own.heads or heads_of(model, own.config):
        tensors.update({f"base_model.{path}.{key}": backend.to_host(p.data)
                        for key, p in modules[path].named_parameters()})
    text = json.dumps(settings_of(own.config, task_of(model)), indent=2, sort_keys=True)  # type: ignore[arg-type]
    drop = sorted({*PICKLES, *NAMES, CONFIG, RESUMABLE} - {FILE, CONFIG})
    with replace_folder(Path(folder), drop=drop) as new:
        save_state(new / FILE, tensors, {"format": "pt", **OURS})
        (new / CONFIG).write_text(text + "\n", encoding="utf-8")
        if isinstance(own, Prefix) and own.hidden_weight is not None:
            mlp = {part: backend.to_host(getattr(own, part).data) for part in MLP}
            save_state(new / RESUMABLE, mlp, {"format": FORMAT})


def task_of(model: Any) -> str:
    """What PEFT calls the task of such a model: it chooses its wrapper by that."""
    if hasattr(model, "logits"):
        return "CAUSAL_LM"
    if hasattr(model, "labels"):
        return "SEQ_CLS" if hasattr(model, "classes") else "TOKEN_CLS"
    return "FEATURE_EXTRACTION"
