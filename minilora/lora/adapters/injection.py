"""Put adapters into a model and take them out: `inject` and `remove`. All of it or nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy

from ... import nn
from ...errors import ConfigError, DTypeError, MiniloraError, StateError
from ...nn.contents import exchange
from ...shown import shown
from ..config import Config
from ..layers.adapter import Adapter, check_name, large_note
from ..layers.base import AdaptedLayer
from ..layers.kinds import adapted_layer
from ..layers.places import layers_of, saved_of
from ..layers.saved import SavedModule
from ..layers.start import new_adapter
from ..layers.tokens import TokenTable
from ..undo import all_or_nothing
from .bases import begun_notes, refuse_shared
from .matching import Match, Target, match
from .switching import activate, bias_mode, biases_of, known, refuse_merged, refuse_running, refuse_taken, trained_numbers

__all__ = ["Injection", "inject", "remove"]

T = TypeVar("T")


@shown
class Injection(NamedTuple):
    """What `inject` did. Printed as a table.

    Attributes
    ----------
    name : str
        Of the adapter.
    matched : Match
        The layers that have it now, and what was left out.
    trained, total : int
        Numbers of the model that are trained now, and all.
    notes : tuple of str
        What deserves a look.
    """

    name: str
    matched: Match
    trained: int
    total: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"adapter {self.name!r}: {self.matched}", *(f"note: {note}" for note in self.notes)]
        return "\n".join([*lines, f"trained: {self.trained:,} of {self.total:,} numbers ({self.trained / self.total:.4%})"])


def inject(model: nn.Module, config: Config, name: str = "default", *, rng: numpy.random.Generator | int | None = None,
           exact: bool = False, allow_unmatched: bool = False) -> Injection:
    """Put a named adapter into every layer that a config hits, freeze everything else, and make the adapter the active one.

    Parameters
    ----------
    model : Module
        Changed in place: layers are replaced by LoRA layers with the same Parameters, wherever they stand. A model that has
        adapters already gets one more.
    config : Config
    name : str
        1 to 64 of the characters A-Z a-z 0-9 . _ -
    rng : numpy.random.Generator or int, optional
        Draws the factors, layer by layer in model order, on the host.
    exact : bool
        With use_dora: let the gradient go through the lengths too, see `gradients.dora`.
    allow_unmatched : bool
        As in `match`.

    Returns
    -------
    Injection

    Raises
    ------
    ConfigError
        If config and model do not fit, or the name is taken or cannot be one.
    StateError
        If a layer is merged, or another adapter trains the biases of the base.
    DTypeError
        If a layer cannot be adapted. After any of these errors nothing has changed.

    Notes
    -----
    Make the optimizer afterwards. With bias="all" or "lora_only" the biases of the base itself are trained, as in PEFT: the
    base is then another one, and only one adapter of a model may do that. Parameters are frozen, and merged, where they are:
    also for another model that shares them. fan_in_fan_out is about files: linear layers are (out, in) here.

    Examples
    --------
    >>> import minilora
    >>> from minilora import lora
    >>> model = minilora.nn.SimpleAttention(8, rng=0)
    >>> print(lora.inject(model, lora.Config(r=2, lora_alpha=4, target_modules=["keys", "values"]), "first", rng=1))
    adapter 'first': 2 layers are adapted
    layer   type    r  lora_alpha  s  named by
    ------------------------------------------
    values  Linear  2           4  2  values
    keys    Linear  2           4  2  keys
    trained: 64 of 328 numbers (19.5122%)
    """
    check_name(name)
    if not isinstance(model, nn.Module):
        raise DTypeError(f"inject: expected a model, got {type(model).__name__}")
    if not isinstance(config, Config):
        raise DTypeError(f"inject: expected a lora.Config, got {type(config).__name__}")
    if exact and not config.use_dora:
        raise ConfigError("exact: says how DoRA's gradient is taken: give use_dora=True in the config too")
    matched = match(model, config, allow_unmatched=allow_unmatched)
    _check_free(model, config, name)
    rng = numpy.random.default_rng(rng)
    made: dict[int, tuple[nn.Module, AdaptedLayer, Adapter]] = {}
    for target in matched.targets:
        layer, adapter = _adapted(target, config, exact, rng)
        assert target.module is not None
        made[id(target.module)] = (target.module, layer, adapter)
    modules = dict(model.named_modules())
    wrapped = {id(modules[path]): _wrapper(path, modules[path]) for path in matched.saved}
    tables = [_table(modules[path], indices) for path, indices in matched.tokens]
    notes = [*_tied(model, matched), *_large(made.values(), matched), *begun_notes([made[key][2].begun for key in made])]
    if config.init_lora_weights == "loftq":
        refuse_shared(model, [target.path for target in matched.targets])
    if config.fan_in_fan_out:
        notes.append("fan_in_fan_out: the linear layers of this model are (out, in): the setting has no effect")
    if config.bias != "none":
        notes.append(f"bias={config.bias!r}: biases of the base are trained; without the adapter it is not the base of before")

    def put_in() -> Injection:
        for _, layer, adapter in made.values():
            layer.attach(name, adapter)
        for wrapper in wrapped.values():
            wrapper.add(name)
        for _, wrapper, table in tables:
            wrapper.take(name, table)
        replace(model, {**{key: layer for key, (_, layer, _) in made.items()}, **wrapped,
                        **{key: wrapper for key, wrapper, _ in tables}})
        activate(model, name)
        return Injection(name, matched, *trained_numbers(model), tuple(notes))

    return all_or_nothing(put_in, [model])


def remove(model: nn.Module, name: str) -> None:
    """Take an adapter out of a model. With the last one the layers are plain again; their Parameters stay frozen.

    Raises
    ------
    ConfigError
        If there is no adapter of that name.
    StateError
        If it is merged.

    Notes
    -----
    If it was active, no adapter is afterwards. To train the base: ``model.requires_grad()``. A model that is itself a LoRA
    layer stays one, without adapters.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 3, rng=0))
    >>> report = inject(model, Config(r=2, target_modules=["0"]), "first", rng=0)
    >>> remove(model, "first")
    >>> type(model[0]) is nn.Linear
    True
    """
    known(model, [name])
    refuse_running(model, "remove")
    merged = [path for path, layer in layers_of(model).items() if layer.merged and name in layer.active]
    if merged:
        raise StateError(f"remove: adapter {name!r} is merged into {', '.join(merged[:3])}{' ...' if len(merged) > 3 else ''}: "
                         "call lora.unmerge(model) first")
    all_or_nothing(lambda: _take_out(model, name), [model])


def _take_out(model: nn.Module, name: str) -> None:
    if any(bias_mode(layer.adapters[name]) != "none" for layer in layers_of(model).values() if name in layer.adapters):
        for p in biases_of(model):
            p.trainable, p.grad = False, None
    new: dict[int, nn.Module] = {}
    for layer in layers_of(model).values():
        layer.active = _without(layer.active, name)
        layer.adapters = _without(layer.adapters, name)
        if not layer.adapters:
            new[id(layer)] = layer.plain()
    for wrapper in saved_of(model).values():
        wrapper.active = None if wrapper.active == name else wrapper.active
        wrapper.copies = _without(wrapper.copies, name)
        if not wrapper.copies:
            new[id(wrapper)] = wrapper.original
    replace(model, new)


def _without(entries: dict[str, T], name: str) -> dict[str, T]:
    """A new dict without one entry: another thread may be reading the old one."""
    return {other: value for other, value in entries.items() if other != name}


def replace(model: nn.Module, new: dict[int, Any]) -> None:
    """Exchange modules, found by identity, at every place of a model: attributes, and entries of lists, tuples and dicts.

    Those are the places where `Module.named_modules` looks.
    """
    for _, module in list(model.named_modules()):
        if isinstance(module, SavedModule):  # its copies belong to their adapters
            module.original = new.get(id(module.original), module.original)
            continue
        exchange(module, new)


def _check_free(model: nn.Module, config: Config, name: str) -> None:
    refuse_taken(model, name)
    refuse_merged(model, "inject")
    refuse_running(model, "inject")
    biased = {other for layer in layers_of(model).values() for other, adapter in layer.adapters.items()
              if bias_mode(adapter) != "none"}
    if biased and config.bias != "none":
        raise StateError(f"inject: adapter {biased.pop()!r} trains the biases of the base; a second one with "
                         f"bias={config.bias!r} would train the same ones. Give it bias='none'")


def _adapted(target: Target, config: Config, exact: bool, rng: numpy.random.Generator) -> tuple[AdaptedLayer, Adapter]:
    """The LoRA layer for a target, and its adapter, which is not part of it yet."""
    try:
        assert target.module is not None
        layer = target.module if isinstance(target.module, AdaptedLayer) else adapted_layer(target.module)
        refuse_full(layer)
        adapter = new_adapter(layer, target.r, target.lora_alpha, config.lora_dropout, rng=rng, exact=exact,
                              init_lora_weights=config.init_lora_weights, use_rslora=config.use_rslora,
                              use_dora=config.use_dora, lora_bias=config.lora_bias, loftq_config=config.loftq_config)
    except MiniloraError as error:
        error.path = target.path
        raise
    # What LoftQ makes is an ordinary adapter of the base that it makes: nothing is to be begun again from its file.
    adapter.config = config if adapter.begun is None else dataclasses.replace(config, init_lora_weights=True, loftq_config={})
    return layer, adapter


def refuse_full(layer: nn.Module | None) -> None:
    """Raise `DTypeError` if this is a layer that has its one adapter."""
    if isinstance(layer, AdaptedLayer) and not layer.takes_more:
        raise DTypeError(f"inject: {type(layer).__name__} has one adapter and takes no other")


def _wrapper(path: str, module: nn.Module) -> SavedModule:
    wrapper = module if isinstance(module, SavedModule) else SavedModule(module)
    adapted = [*layers_of(wrapper.original)]
    if adapted:
        raise ConfigError(f"modules_to_save: {path} holds adapters already ({adapted[0] or 'itself'}): a copy of it would hold "
                          "them too. Train it as a whole, or adapt it, but not both")
    return wrapper


def _table(module: nn.Module, indices: Sequence[int]) -> tuple[int, SavedModule, TokenTable]:
    """What stands at the place of an embedding, the wrapper that will, and the table with rows of its own."""
    wrapper = module if isinstance(module, SavedModule) else SavedModule(module)
    return id(module), wrapper, TokenTable(wrapper.original, indices)


def _tied(model: nn.Module, matched: Match) -> list[str]:
    """Notes on weights that an adapted layer shares with another one."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, p in module.own_parameters():
            if name == "weight" and path not in owners.setdefault(id(p), []):
                owners[id(p)].append(path)
    modules = dict(model.named_modules())
    notes = []
    for target in matched.targets:
        weight: Any = getattr(target.module, "weight", None)
        others = [path for path in owners.get(id(weight), []) if modules[path] is not target.module]
        if others:
            notes.append(f"tied: {target.path} shares its weight with {', '.join(others)}, which the adapter does not reach; "
                         "merging would change both and is refused")
        elif isinstance(target.module, nn.Embedding) and getattr(model, "lm_head", model) is None and \
                getattr(model, "embedding", None) is target.module:
            notes.append(f"tied: {target.path} makes the logits too; its adapter takes part in both")
    for saved in matched.saved:
        place = modules[saved]
        original = place.original if isinstance(place, SavedModule) else place
        others = [path for path in owners.get(id(getattr(original, "weight", None)), []) if modules[path] is not original]
        if others:
            notes.append(f"tied: the copy of {saved} has a weight of its own; {', '.join(others)}, which shares it now, keeps "
                         "the old one")
    return notes


def _large(made: Iterable[tuple[nn.Module, AdaptedLayer, Adapter]], matched: Match) -> list[str]:
    """Notes on adapters with more numbers than the weight that they adapt."""
    return [note for target, (_, layer, adapter) in zip(matched.targets, made)
            for note in large_note(target.path, target.r, adapter.lora_A.size + adapter.lora_B.size, layer.weight.size)]
