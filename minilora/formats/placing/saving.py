"""An adapter of a model as a value, and as a file: from what the adapter is, not from what its config once said."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy

from ... import backend, nn
from ...engine import no_grad
from ...errors import ConfigError, DTypeError
from ...lora.adapters.switching import bias_mode, biases_of, refuse_merged, refuse_running, the_name
from ...lora.config import Config
from ...lora.layers.adapter import Adapter
from ...lora.layers.base import AdaptedLayer
from ...lora.layers.places import layers_of, named_through, saved_of
from ...lora.layers.tokens import TokenTable
from ...nn.state import as_host
from ..adapters.saved import SavedAdapter, TokenRows, Update
from ..adapters.writing import write_adapter
from .fingerprint import FORCED, KEY, fingerprint
from .fitting import kind_of
from .names import NameMapping, rename
from .tied import IN_HEAD, written_heads

__all__ = ["all_channels", "save_adapter", "saved_adapter"]

Array = Any

THEIRS = ("peft", "gguf")  # dialects whose paths are those of transformers' models


def saved_adapter(model: nn.Module, name: str | None = None, *, mapping: NameMapping | None = None,
                  with_fingerprint: bool = True) -> SavedAdapter:
    """One adapter of a model as the value that every dialect is written from: copies on the host.

    Parameters
    ----------
    model : Module
    name : str, optional
        May be left out if there is only one.
    mapping : dict of str to str, or function, optional
        From the model's paths to those in the file, as in `load_adapter`: ``{"": "transformer."}`` puts that in front.
    with_fingerprint : bool
        Say in the metadata which base it belongs to: see `fingerprint`, also for what that costs.

    Returns
    -------
    SavedAdapter
        Each layer with its own s. A frozen start is folded in: [A; A0] and [B, -B0], of rank 2 r with the same s, so that the
        file fits the unchanged base. What is no linear update by itself, a fused or a projected layer, is written as the linear
        one that it equals.

    Raises
    ------
    ConfigError
        If there is no such adapter, or it has no layer.
    StateError
        If a layer is merged.

    Examples
    --------
    >>> import minilora
    >>> from minilora import lora
    >>> model = minilora.nn.Sequential(minilora.nn.Linear(3, 2, rng=0))
    >>> report = lora.inject(model, lora.Config(r=1, lora_alpha=4, target_modules=["0"], init_lora_weights="pissa"))
    >>> {path: (update.r, update.s) for path, update in saved_adapter(model).updates.items()}
    {'0': (2, 4.0)}
    """
    if not isinstance(model, nn.Module):
        raise DTypeError(f"save_adapter: expected a model, got {type(model).__name__}: write save_adapter(model, folder)")
    name = the_name(model, name)
    refuse_merged(model, "save_adapter")
    refuse_running(model, "save_adapter")
    layers = {path: layer for path, layer in layers_of(model).items() if name in layer.adapters}
    if not layers:
        raise ConfigError(f"save_adapter: adapter {name!r} adapts no layer: there is no update to write")
    updates = {path: _update(layer, layer.adapters[name]) for path, layer in layers.items()}
    copies = {place: wrapper.copies[name] for place, wrapper in saved_of(model).items() if name in wrapper.copies}
    tokens = {place: TokenRows(own.indices, _host(own.rows.data)) for place, own in copies.items()
              if isinstance(own, TokenTable)}
    wholes = {place: own for place, own in copies.items() if place not in tokens}
    saved = {path: array for place, own in wholes.items() for path, array in _state(place, own).items()}
    biases = _biases(model, {path: layer.adapters[name] for path, layer in layers.items()})
    config = _config(wholes, tokens, {path: layer.adapters[name] for path, layer in layers.items()}, updates)
    first = next(iter(layers.values())).adapters[name]
    heads, unnamed = written_heads(model, layers, name, updates)
    updates.update(heads)
    owners = dict.fromkeys([*updates, *tokens, *(path.rpartition(".")[0] for path in (*saved, *biases))])
    named = rename(owners, mapping)
    metadata = {key: text for key, text in first.origin.items() if key not in (FORCED, IN_HEAD)}
    if unnamed:
        metadata[IN_HEAD] = json.dumps([named[path] for path in unnamed])
    if with_fingerprint:
        metadata[KEY] = fingerprint({named[path]: layer for path, layer in layers.items()},
                                    {named[path]: updates[path].s for path in layers}, config.use_rslora,
                                    first.origin.get(FORCED, ""))
    return SavedAdapter({named[path]: update for path, update in updates.items()}, config, "peft", _moved(saved, named),
                        _moved(biases, named), {named[path]: rows for path, rows in tokens.items()}, metadata)


def save_adapter(model: nn.Module, path: Any, name: str | None = None, dialect: str = "peft", *,
                 mapping: NameMapping | None = None, with_fingerprint: bool = True, **options: Any) -> tuple[str, ...]:
    """Write one adapter of a model: in one piece and durable, or not at all.

    Parameters
    ----------
    model : Module
    path : path
        A folder, for dialects that have one.
    name, with_fingerprint
        As in `saved_adapter`.
    mapping : dict of str to str, or function, optional
        As in `saved_adapter`. By default the model's own paths; for PEFT and GGUF those that transformers has, where the model
        says that they are others (`names_elsewhere`).
    dialect : str
        ``"peft"``, ``"loralib"``, ``"mlx"``, ``"kohya"``, ``"diffusers"`` or ``"gguf"``.
    **options
        What the dialect needs to know besides.

    Returns
    -------
    tuple of str
        What the dialect had to do that deserves a look.

    Raises
    ------
    ConfigError, StateError
        As in `saved_adapter`.
    FormatError
        If the dialect cannot say what the adapter is.
    FileError
        If it cannot be written. What was at the path before is there still.
    """
    if mapping is None and dialect in THEIRS:
        mapping = _elsewhere(model)
    saved = saved_adapter(model, name, mapping=mapping, with_fingerprint=with_fingerprint)
    return write_adapter(saved, path, dialect, **options)


def _elsewhere(model: Any) -> NameMapping | None:
    """What transformers calls the modules of a model, if the model says so: what each path starts with, there and here."""
    said: Mapping[str, str] = getattr(model, "names_elsewhere", None) or {}

    def named(path: str) -> str:
        start = max((start for start in said if path.startswith(start)), key=len, default="")
        return said.get(start, "") + path[len(start):]

    return named if said else None


def _host(array: Array) -> numpy.ndarray:
    return numpy.array(backend.to_host(array))


def _update(layer: AdaptedLayer, adapter: Adapter) -> Update:
    kind = kind_of(layer)
    with no_grad():
        A, B = (p.data for p in adapter.factors())
        bias = layer.bias_update(adapter)
        if kind == "linear":
            A, B = layer.as_update(A, B)
    A, B = _host(A), _host(B)
    groups = getattr(layer, "groups", 1)
    if groups > 1:
        A = all_channels(A, groups)
    magnitude = adapter.magnitude
    return Update(kind, A, B, adapter.scaling,  # type: ignore[arg-type]
                  None if bias is None else _host(bias), None if magnitude is None else _host(magnitude.data))


def all_channels(A: numpy.ndarray, groups: int) -> numpy.ndarray:
    """A (r, C_in / groups, ...) of a convolution with groups as PEFT has it, (r, C_in, ...): 0 for other groups' channels."""
    ranks, channels = len(A) // groups, A.shape[1]
    whole = numpy.zeros((len(A), channels * groups, *A.shape[2:]), A.dtype)
    for g in range(groups):
        whole[g * ranks:(g + 1) * ranks, g * channels:(g + 1) * channels] = A[g * ranks:(g + 1) * ranks]
    return whole


def _state(place: str, module: nn.Module) -> dict[str, numpy.ndarray]:
    return {f"{place}.{path}": as_host(value) for path, value in
            (*((path, p.data) for path, p in module.named_parameters()), *module.named_state())}


def _biases(model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, numpy.ndarray]:
    """The biases of the base that belong to an adapter."""
    modes = {bias_mode(adapter) for adapter in adapters.values()}
    if modes == {"none"}:
        return {}
    wanted = {id(p) for p in biases_of(model)}
    return {f"{path}.bias".lstrip("."): _host(p.data) for path, module in named_through(model).items()
            for name, p in module.own_parameters()
            if name == "bias" and id(p) in wanted and ("all" in modes or path in adapters)}


def _config(wholes: Iterable[str], tokens: Mapping[str, TokenRows], adapters: Mapping[str, Adapter],
            updates: Mapping[str, Update]) -> Config:
    """The adapter's config, as far as it holds for what the adapter is now."""
    update = next(iter(updates.values()))
    config = next(iter(adapters.values())).config or \
        Config(r=update.r, lora_alpha=update.s * update.r, target_modules=list(updates))
    changes: dict[str, Any] = {}
    if any(adapter.start_A is not None for adapter in adapters.values()):
        changes["init_lora_weights"] = True
    for field, has in (("use_dora", any(u.magnitude is not None for u in updates.values())),
                       ("lora_bias", any(u.bias is not None for u in updates.values()))):
        if getattr(config, field) != has:
            changes[field] = has
    entries = list(config.modules_to_save or ())
    unnamed = [place for place in wholes if not place.endswith(tuple(entries) or ("\0",))]
    if unnamed:
        changes["modules_to_save"] = entries + unnamed
    if not tokens and config.trainable_token_indices is not None:
        changes["trainable_token_indices"] = None
    elif tokens and config.trainable_token_indices is None:
        changes["trainable_token_indices"] = {path: list(rows.indices) for path, rows in tokens.items()}
    return dataclasses.replace(config, **changes) if changes else config


def _moved(arrays: Mapping[str, Array], named: Mapping[str, str]) -> dict[str, Array]:
    return {f"{named[path.rpartition('.')[0]]}.{path.rpartition('.')[2]}": array for path, array in arrays.items()}
