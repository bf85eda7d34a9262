"""loralib's calls under loralib's names: freeze all but LoRA, save only LoRA; and a strict way to load it.

    layer = lora.Linear(in_features, out_features, r=16)      # in the place of nn.Linear
    lora.mark_only_lora_as_trainable(model)                   # before the training loop
    state = lora.lora_state_dict(model)                       # when saving
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy

from ... import backend, nn
from ...errors import ConfigError, StateError
from ...tensor import Parameter, Tensor
from ..layers.places import layers_of, saved_of
from ..undo import all_or_nothing
from .finite import nonfinite, refused

__all__ = ["load_lora_state_dict", "lora_state_dict", "mark_only_lora_as_trainable"]


def _selected(model: nn.Module, bias: str) -> Iterator[tuple[str, Parameter, bool]]:
    """Every parameter with its path, and whether it belongs to the adapter or to the biases that `bias` asks for.

    To the adapter belong A, B and what else its layers train, as ``path.lora_A``, and its copies of modules in
    `modules_to_save`, under the names that the originals had.
    """
    from ..config_checks import BIASES  # here, because importing minilora does not need it

    if bias not in BIASES:
        raise ConfigError(f"bias must be one of {', '.join(BIASES)}, got {bias!r}")
    layers = layers_of(model)
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no LoRA layer: put lora.Linear or lora.adapt(layer) in it first")
    wrappers = saved_of(model)
    counts = {path: len(layer.adapters) for path, layer in layers.items()}
    counts.update({path: len(wrapper.copies) for path, wrapper in wrappers.items()})
    several = [path for path, count in counts.items() if count != 1]
    if several:
        raise StateError(f"loralib knows one adapter a layer; {several[0] or 'the model'!r} has {counts[several[0]]}: use "
                         "lora.activate and lora.low_rank_updates, which take names")
    paths = {id(p): f"{path}.{name}" if path else name
             for path, layer in layers.items() for name, p in layer.adapter.own_parameters()}
    for path, wrapper in wrappers.items():
        (own,) = wrapper.copies.values()
        paths.update({id(p): f"{path}.{name}" for name, p in own.named_parameters()})
    chosen = set(paths)
    if bias == "lora_only":
        chosen |= {id(layer.bias) for layer in layers.values() if layer.bias is not None}
    for name, p in model.named_parameters():
        yield paths.get(id(p), name), p, id(p) in chosen or (bias == "all" and name.split(".")[-1] == "bias")


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> list[str]:
    """Freeze every parameter but the A and B of LoRA layers.

    Parameters
    ----------
    model : Module
    bias : {"none", "all", "lora_only"}
        Which biases are trained besides: none, every one, or those of LoRA layers.

    Returns
    -------
    list of str
        The paths of what is trained now.

    Raises
    ------
    ConfigError
        If the model has no LoRA layer (nothing would ever train), or `bias` is unknown.

    Notes
    -----
    LoRA's parameters are found by the type of their layer, not by a part of their name. Optimizers made before keep what they
    were given: make the optimizer afterwards.

    Examples
    --------
    >>> import minilora
    >>> model = minilora.nn.Sequential(minilora.lora.Linear(3, 4, r=2), minilora.nn.Linear(4, 2))
    >>> minilora.lora.mark_only_lora_as_trainable(model, bias="lora_only")
    ['0.bias', '0.lora_A', '0.lora_B']
    """
    chosen = list(_selected(model, bias))

    def mark() -> None:
        for _, p, selected in chosen:
            p.trainable = selected
            p.grad = p.grad if selected else None
        for layer in layers_of(model).values():
            layer.adapter.set_trainable(True)  # but what of it is never trained: the start of A and B, and A under LoRA-FA

    all_or_nothing(mark, [model])
    return [name for name, p, _ in chosen if p.trainable]


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, numpy.ndarray]:
    """Copies of all that the adapter trains on the host, such as ``path.lora_A``; with the biases that `bias` asks for.

    Beside A and B that is DoRA's ``magnitude``, ``lora_bias``, a frozen start, and the copies of modules in `modules_to_save`,
    so that the state makes the same outputs in another model with the same base.

    Raises
    ------
    ConfigError
        If the model has no LoRA layer, or `bias` is unknown.
    StateError
        If biases are asked for while a layer is merged: they may hold a part of the update.

    Notes
    -----
    As in loralib, r and lora_alpha are not part of it: they live in the code that builds the model.

    Examples
    --------
    >>> import minilora
    >>> model = minilora.nn.Sequential(minilora.lora.Linear(3, 4, r=2), minilora.nn.Linear(4, 2))
    >>> {name: array.shape for name, array in minilora.lora.lora_state_dict(model).items()}
    {'0.lora_A': (2, 3), '0.lora_B': (4, 2)}
    """
    merged = [path for path, layer in layers_of(model).items() if layer.merged]
    if merged and bias != "none":
        raise StateError(f"lora_state_dict: merged layers {merged}: their biases may hold a part of it: call unmerge() first")
    return {name: numpy.array(backend.to_host(p.data)) for name, p, selected in _selected(model, bias) if selected}


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Any], bias: str = "none", *,
                         allow_nonfinite: bool = False) -> None:
    """Load what `lora_state_dict` gave into a model with the same LoRA layers: all of it or nothing.

    Parameters
    ----------
    model : Module
    state : mapping of str to array
    bias : {"none", "all", "lora_only"}
        As it was saved.
    allow_nonfinite : bool
        Take NaN and inf too.

    Raises
    ------
    StateDictError
        If a name is missing, unexpected or misshapen, or an array holds NaN or inf; every one is listed.
    StateError
        If a LoRA layer is merged.

    Examples
    --------
    >>> import minilora
    >>> one, two = (minilora.nn.Sequential(minilora.lora.Linear(4, 3, r=2, rng=rng)) for rng in (0, 1))
    >>> load_lora_state_dict(two, lora_state_dict(one))
    >>> bool((two[0].lora_A.data == one[0].lora_A.data).all())
    True
    """
    own = {name: p for name, p, selected in _selected(model, bias) if selected}
    merged = [path for path, layer in layers_of(model).items() if layer.merged]
    if merged:
        raise StateError(f"load_lora_state_dict: merged layers {merged}: call unmerge() first")
    problems = [f"missing    {name}" for name in sorted(own.keys() - state.keys())]
    problems += [f"unexpected {name}" for name in sorted(state.keys() - own.keys())]
    for name in sorted(own.keys() & state.keys()):
        p, given = own[name], state[name].data if isinstance(state[name], Tensor) else state[name]
        array = given if hasattr(given, "dtype") else numpy.asarray(given)
        if array.shape != p.shape or array.dtype != p.dtype:
            problems.append(f"misfit     {name}: expected {p.dtype} {p.shape}, got {array.dtype} {array.shape}")
        elif not allow_nonfinite:
            problems += nonfinite("", {name: array})
    if problems:
        raise refused("LoRA state dict does not fit; nothing was loaded", problems)
    places = {id(p): path for path, p in model.named_parameters()}
    here = {places[id(p)]: state[name] for name, p in own.items()}
    all_or_nothing(lambda: model.load_state_dict(here, strict=False), [model],  # names are checked above
                   [p.data for p in own.values() if p.room is not None])  # written in place, in the optimizer's flat array
