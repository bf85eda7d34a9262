"""Adapters as plain factors, out of a model and into one: `low_rank_updates`, `inject_updates`, `hotswap`.

A mapping from layer paths to `LowRank` is what combines, compresses and compares adapters (the room `algebra`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy

from ... import backend, nn
from ...engine import no_grad
from ...errors import ConfigError, MiniloraError, StateDictError, StateError
from ...tensor import Parameter
from ..algebra.factors import LowRank
from ..layers.adapter import Adapter, check_name
from ..layers.base import AdaptedLayer
from ..layers.kinds import adapted_layer
from ..layers.precision import trained_dtype
from ..layers.places import layers_of, named_through, saved_of
from ..layers.tokens import TokenTable
from ..undo import all_or_nothing
from .finite import nonfinite, refused
from .injection import replace
from .switching import activate, refuse_merged, refuse_running, refuse_taken, the_name

__all__ = ["hotswap", "inject_updates", "low_rank_updates"]

Array = Any


def low_rank_updates(model: nn.Module, name: str | None = None, *, partial: bool = False) -> dict[str, LowRank]:
    """The updates of one adapter by layer path, D = s B A as `LowRank`.

    Parameters
    ----------
    model : Module
    name : str, optional
        May be left out if there is only one.
    partial : bool
        Leave out what is not of the form s B A, instead of refusing: layers with DoRA or a bias, and whole modules and biases
        of the base that the adapter trains.

    Returns
    -------
    dict of str to LowRank
        For a linear layer D is (out, in); for an embedding (d, V); for a convolution (out, in / groups * kernel), and with
        groups B holds the pairs of all of them. The frozen start of "pissa" and "olora" is part of it: then the rank is 2 r,
        and the update belongs to the unchanged base. Arrays of the adapter are shared, not copied: they move on with training.

    Raises
    ------
    ConfigError
        If there is no such adapter.
    StateError
        If a part of the adapter is no low-rank update: all such parts are named.
    """
    name = the_name(model, name)
    found, odd = {}, []
    for path, layer in layers_of(model).items():
        if name not in layer.adapters:
            continue
        adapter = layer.adapters[name]
        why = "use_dora" if adapter.magnitude is not None else "lora_bias" if adapter.lora_bias is not None else \
            "not in the logits, which are made from this table" if not adapter.in_head and \
            getattr(layer, "makes_logits", False) else ""
        if why:
            odd.append(f"{path or '(model)'} ({why})")
            continue
        with no_grad():
            A, B = adapter.factors()
        found[path] = LowRank(*layer.as_update(A.data, B.data), adapter.scaling)
        if adapter.config is not None and adapter.config.bias != "none" and "biases of the base" not in odd:
            odd.append("biases of the base")
    odd += [f"{path} ({'trainable_token_indices' if isinstance(wrapper.copies[name], TokenTable) else 'modules_to_save'})"
            for path, wrapper in saved_of(model).items() if name in wrapper.copies]
    if odd and not partial:
        raise StateError(f"low_rank_updates: the update of {name!r} is more than s B A in {', '.join(odd[:5])}"
                         f"{' ...' if len(odd) > 5 else ''}. With partial=True those parts are left out")
    return found


def inject_updates(model: nn.Module, updates: Mapping[str, LowRank], name: str = "default", *,
                   allow_nonfinite: bool = False) -> None:
    """Put an adapter that is given as factors into a model, and make it the active one: the inverse of `low_rank_updates`.

    Parameters
    ----------
    model : Module
    updates : mapping of str to LowRank
        By layer path, with the shapes that `low_rank_updates` gives. Copied; ranks and scalings may differ from layer to layer.
    name : str
    allow_nonfinite : bool
        Take NaN and inf too.

    Raises
    ------
    StateDictError
        With one line for every path that is no layer, or whose shape does not fit, and for every factor that holds NaN or inf,
        also if its numbers are too large for the layer's dtype. Then nothing has changed.
    ConfigError
        If the name is taken or cannot be one.
    StateError
        If a layer is merged.

    Examples
    --------
    >>> import numpy, minilora
    >>> from minilora import lora
    >>> model = minilora.nn.Sequential(minilora.nn.Linear(4, 3, rng=0))
    >>> D = lora.LowRank(numpy.ones((1, 4), "float32"), numpy.ones((3, 1), "float32"), 0.5)
    >>> lora.inject_updates(model, {"0": D}, "given")
    >>> lora.low_rank_updates(model)["0"]
    LowRank(out=3, in=4, r=1, s=0.5, float32, cpu)
    """
    check_name(name)
    refuse_taken(model, name)
    if not updates:
        raise ConfigError("inject_updates: expected at least one layer, got none")
    modules = named_through(model)
    refuse_merged(model, "inject_updates")
    refuse_running(model, "inject_updates")
    made: dict[str, tuple[AdaptedLayer, Adapter]] = {}
    first: dict[int, str] = {}
    problems = []
    for path, update in updates.items():
        try:
            if path not in modules:
                raise StateDictError("the model has no such layer")
            base = modules[path]
            layer = base if isinstance(base, AdaptedLayer) else adapted_layer(base)
            if layer is not base and base is model:
                raise StateDictError("the model is this layer itself: use lora.adapt")
            if first.setdefault(id(base), path) != path:
                raise StateDictError(f"this is the layer {first[id(base)]} at another place")
            made[path] = layer, _adapter_from(layer, update)
        except MiniloraError as error:
            problems.append(f"{path or '(model)'}: {error}")
        else:
            problems += [] if allow_nonfinite else _nonfinite(path, made[path][1])
    if problems:
        raise refused("inject_updates: the updates do not fit this model; nothing was changed", problems)

    def put_in() -> None:
        for layer, adapter in made.values():
            layer.attach(name, adapter)
        replace(model, {id(modules[path]): layer for path, (layer, _) in made.items()})
        activate(model, name)

    all_or_nothing(put_in, [model])


def _nonfinite(path: str, adapter: Adapter) -> list[str]:
    return nonfinite(path, {"lora_A": adapter.lora_A.data, "lora_B": adapter.lora_B.data})


def _adapter_from(layer: AdaptedLayer, update: LowRank) -> Adapter:
    r = layer.rank_for(_low_rank(update).r)
    shapes = layer.factor_shapes(r)
    A, B = layer.from_update(update.A, update.B)
    if (A.shape, B.shape) != shapes:
        raise StateDictError(f"expected D {(shapes[1][0], math.prod(shapes[0][1:]))}, got {update.shape}")
    device, dtype = layer.weight.device, trained_dtype(layer.weight.dtype)
    with numpy.errstate(over="ignore", invalid="ignore"):  # what does not fit into the dtype becomes inf, and is found as such
        A, B = (Parameter(backend.to_device(backend.to_host(part).astype(dtype), device)) for part in (A, B))
    adapter = Adapter(A, B, r, update.s * r, nn.Dropout(0.0, rng=0))
    adapter.scaling = update.s  # s r / r need not be s to the last bit
    return adapter


def _low_rank(update: Any) -> LowRank:
    if not isinstance(update, LowRank):
        raise StateDictError(f"expected a LowRank, got {type(update).__name__}")
    return update


def hotswap(model: nn.Module, updates: Mapping[str, LowRank], name: str | None = None, *,
            allow_nonfinite: bool = False) -> None:
    """Overwrite the factors of an adapter with others, in place: for serving, where arrays are to stay where they are.

    Parameters
    ----------
    model : Module
    updates : mapping of str to LowRank
        For exactly the layers of the adapter; of its rank at most: what is missing becomes zeros.
    name : str, optional
        May be left out if there is only one.
    allow_nonfinite : bool
        Take NaN and inf too.

    Raises
    ------
    StateDictError
        With one line for every layer that is missing, unexpected or does not fit, and for every factor that holds NaN or inf.
        Then nothing has changed.
    StateError
        If a layer is merged.

    Notes
    -----
    The scaling becomes that of the update, and the arrays of A and B keep their places, also those inside an optimizer. A graph
    that was made before refuses its backward pass, which would read the new numbers. The optimizer's
    moments stay as they were, and so does the adapter's config. For adapters of A and B alone: not with DoRA, a bias, or a
    frozen start. Looking for NaN and inf takes a pass over the numbers, and on a GPU a sync point for each factor.

    Examples
    --------
    >>> import minilora
    >>> served, trained = (minilora.nn.Sequential(minilora.lora.Linear(4, 3, r=2, rng=rng)) for rng in (0, 1))
    >>> hotswap(served, low_rank_updates(trained))
    >>> bool((served[0].lora_A.data == trained[0].lora_A.data).all())
    True
    """
    name = the_name(model, name)
    layers = {path: layer for path, layer in layers_of(model).items() if name in layer.adapters}
    merged = [path for path, layer in layers.items() if layer.merged and name in layer.active]
    if merged:
        raise StateError(f"hotswap: adapter {name!r} is merged ({', '.join(merged[:3])}): call lora.unmerge(model) first")
    problems = [f"missing    {path}" for path in layers if path not in updates]
    problems += [f"unexpected {path}" for path in updates if path not in layers]
    new = []
    for path in layers.keys() & updates.keys():
        layer, update = layers[path], updates[path]
        adapter = layer.adapters[name]
        try:
            if adapter.start_A is not None or adapter.magnitude is not None or adapter.lora_bias is not None:
                raise StateDictError("this adapter is more than A and B: hotswap is for plain ones")
            rank = adapter.lora_A.shape[0]
            if _low_rank(update).r > rank:
                raise StateDictError(f"rank {update.r} does not fit into rank {rank}: lora.recompress can lower it")
            given = _adapter_from(layer, _padded(update, rank))
        except MiniloraError as error:
            problems.append(f"misfit     {path}: {error}")
        else:
            new.append((adapter, given))
            problems += [] if allow_nonfinite else _nonfinite(path, given)
    if problems:
        raise refused(f"hotswap: the updates do not fit adapter {name!r}; nothing was changed", sorted(problems))

    def write() -> None:
        for adapter, given in new:
            for old, numbers in ((adapter.lora_A, given.lora_A.data), (adapter.lora_B, given.lora_B.data)):
                old.data[...] = numbers
                old.version += 1
            adapter.scaling, adapter.lora_alpha, adapter.use_rslora = given.scaling, given.lora_alpha, False

    adapters = [adapter for adapter, _ in new]
    all_or_nothing(write, adapters, [p.data for adapter in adapters for p in (adapter.lora_A, adapter.lora_B)])


def _padded(update: LowRank, r: int) -> LowRank:
    """The same D with rows of A and columns of B that are 0, up to rank r."""
    xp, more = update.device.exact, r - update.r
    A = xp.concatenate([update.A, xp.zeros((more, update.A.shape[1]), dtype=update.A.dtype)])
    B = xp.concatenate([update.B, xp.zeros((update.B.shape[0], more), dtype=update.B.dtype)], axis=1)
    return LowRank(A, B, update.s)
