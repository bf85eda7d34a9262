"""What an adapter file replaces as a whole: modules (`modules_to_save`), and biases of the base (`bias`)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy

from ... import backend, nn
from ...errors import FormatError
from ...lora.adapters.switching import biases_of
from ...lora.config import Config
from ...lora.layers.base import AdaptedLayer
from ...lora.layers.places import layers_of, named_through, saved_of
from ...tensor import Parameter
from .fitting import on_host

__all__ = ["as_base", "bias_mode", "copies_of", "missing_biases", "places_of"]

Array = Any

# An attribute that says how long the first axis of the weight is: the one that a head of another size changes.
SIZES = ("out_features", "num_embeddings", "out_channels")


def places_of(paths: Iterable[str], model: nn.Module, config: Config, adapted: Iterable[str]) -> dict[str, list[str]]:
    """The modules to copy, each with those of these parameter paths that lie inside it.

    A module that `modules_to_save` names is copied whole, by PEFT's rule: its path ends with the entry, be there a dot in front
    or not. What the config does not name is copied by itself. A module that holds an adapted layer, of this adapter (`adapted`)
    or another, or something that another adapter copied, is not copied: then those inside are.
    """
    modules, entries = named_through(model), tuple(config.modules_to_save or ())
    held = [*adapted, *layers_of(model)]
    copied = [*saved_of(model)]
    found: dict[str, list[str]] = {}
    for path in paths:
        owner = path.rpartition(".")[0]
        parts = owner.split(".")
        outer = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
        whole = [module for module in outer if module.endswith(entries) and module in modules
                 and not any(f"{layer}.".startswith(f"{module}.") for layer in held)
                 and not any(other.startswith(f"{module}.") for other in copied)] if entries else []
        found.setdefault(whole[0] if whole else owner, []).append(path)
    return found


def copies_of(place: str, module: nn.Module, given: Mapping[str, Array]) -> tuple[nn.Module, list[str]]:
    """A copy of a module that holds these arrays, by their path inside it, and notes on what else it holds.

    The shapes are the file's: a head with three rows in the place of one with two is another head.

    Raises
    ------
    FormatError
        With one line for every array that no such module can hold.
    """
    own = copy.deepcopy(module)
    inside, state = dict(own.named_modules()), dict(own.named_state())
    problems, notes, turned = [], [], set()
    for name, array in given.items():
        owner, _, last = name.rpartition(".")
        there = inside.get(owner)
        value = getattr(there, last, None) if there is not None else None
        shape = getattr(value, "shape", None)
        if isinstance(value, Parameter) and shape != array.shape and _resized(there, last, array.shape):
            turned.add(owner)
        if there is None or not (isinstance(value, Parameter) or name in state or (value is None and last == "bias")):
            problems.append(f"{place}.{name} {array.shape}: {type(module).__name__} has no {name}")
        elif isinstance(value, Parameter) or value is None:
            if value is not None and shape != array.shape and owner not in turned:
                problems.append(f"{place}.{name}: expected {shape}, got {array.shape}")
                continue
            near: Any = value if isinstance(value, Parameter) else getattr(there, "weight")
            setattr(there, last, Parameter(backend.to_device(on_host(array, near.dtype), near.device)))
        else:
            notes += _set_state(there, last, value, array, problems, f"{place}.{name}")
    for owner in turned:
        problems += _settle(place, inside[owner], owner, given)
    if problems:
        raise FormatError("\n  ".join(problems))
    lacking = [name for name, _ in own.named_parameters() if name not in given]
    notes += [f"{place}: the file lacks {', '.join(lacking)} of this module, which stay the base's"] if lacking else []
    return own, notes


def _resized(module: Any, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a layer may have this parameter with another number of rows."""
    own = getattr(module, name).shape
    return any(hasattr(module, size) for size in SIZES) and len(shape) == len(own) and shape[1:] == own[1:] and \
        getattr(module, "groups", 1) == 1 and shape[0] > 0


def _settle(place: str, module: Any, owner: str, given: Mapping[str, Array]) -> list[str]:
    """Let a layer with other numbers of rows agree with itself; what does not, in words."""
    rows = module.weight.shape[0]
    bias = f"{owner}.bias".lstrip(".")
    if getattr(module, "bias", None) is not None:
        if bias not in given:
            module.bias = None  # the one of the base has another length: this head has none
        elif module.bias.shape != (rows,):
            return [f"{place}.{bias}: expected ({rows},) beside the weight, got {module.bias.shape}"]
    for size in SIZES:
        if hasattr(module, size):
            setattr(module, size, rows)
    padding = getattr(module, "padding_idx", None)
    if padding is not None and padding >= rows:
        return [f"{place}: padding_idx is {padding}, and the file's table has {rows} rows"]
    return []


def _set_state(module: Any, name: str, value: Any, array: Array, problems: list[str], path: str) -> list[str]:
    """Set what is no parameter, such as running means: a number, or an array of the same shape."""
    if numpy.shape(value) != array.shape:
        problems.append(f"{path}: expected {numpy.shape(value)}, got {array.shape}")
    elif hasattr(value, "dtype"):
        setattr(module, name, backend.to_device(on_host(array, value.dtype), backend.device_of(value)))
    else:
        setattr(module, name, type(value)(numpy.asarray(array).item()))
    return []


def as_base(place: str, module: Any, key: str, array: Array) -> str:
    """The line to type that makes an array of a file, such as a longer table of tokens, the weight of a base's layer."""
    plain = isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and module.bias is None)
    if not plain or not key.endswith(".weight") or array.shape[1:] != module.weight.shape[1:]:
        return ""
    here = "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in place.split("."))
    sizes = f"nn.Embedding{tuple(array.shape)}" if isinstance(module, nn.Embedding) else \
        f"nn.Linear({array.shape[1]}, {array.shape[0]}, bias=False)"
    return (f". If it is to be the base's: W = minilora.formats.read_adapter(path).saved[{key!r}]; "
            f"{here} = minilora.{sizes}; {here}.weight.data = minilora.backend.asarray(W)")


def bias_mode(paths: Iterable[str], config: Config, adapted: Iterable[str]) -> tuple[str, list[str]]:
    """Which biases an adapter trains, by the biases that its file holds, and a note if its config says otherwise."""
    paths, layers = list(paths), set(adapted)
    if not paths:
        return "none" if config.bias == "none" else config.bias, []
    mode = "all" if any(path.rpartition(".")[0] not in layers for path in paths) else "lora_only"
    if config.bias == "none":
        return mode, [f"the config says bias='none', and the file holds {len(paths)} biases: they are taken, as "
                      f"bias={mode!r}"]
    return ("all" if "all" in (mode, config.bias) else mode), []


def missing_biases(mode: str, paths: Iterable[str], model: nn.Module, layers: Mapping[str, AdaptedLayer],
                   without: Iterable[str]) -> list[str]:
    """The biases that a file of this mode should hold and does not; those of whole modules are not among them."""
    if mode == "none":
        return []
    there, replaced = set(paths), tuple(f"{path}." for path in without)
    if mode == "lora_only":
        wanted = {f"{path}.bias" for path, layer in layers.items() if layer.bias is not None}
    else:
        biases = {id(p) for p in biases_of(model)}
        wanted = {f"{path}.bias".lstrip(".") for path, module in named_through(model).items()
                  for name, p in module.own_parameters() if name == "bias" and id(p) in biases}
    return sorted(path for path in wanted - there if not path.startswith(replaced or ("\0",)))
