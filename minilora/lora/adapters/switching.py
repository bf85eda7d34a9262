"""Which adapters take part: `activate`, `disabled` and `mixed`. None of them touches a weight of the base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from ... import nn
from ...errors import ConfigError, DTypeError, StateError
from ...nn.by_row import ByRow, Nobody, opened, rows_of
from ...tensor import Parameter
from ..algebra.factors import check_factor
from ..config_checks import nearest
from ..layers.adapter import BASE, Adapter
from ..layers.places import layers_of, saved_of
from ..layers.rows import Rows
from ..layers.saved import SavedModule
from ..undo import all_or_nothing

__all__ = ["activate", "adapter_names", "bias_mode", "biases_of", "disabled", "freeze",
           "known", "mixed", "refuse_merged", "refuse_running", "refuse_taken",
           "the_name", "trained_numbers"]


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters of a model, in the order in which they came."""
    names = [name for layer in layers_of(model).values() for name in layer.adapters]
    return list(dict.fromkeys(names + [name for wrapper in saved_of(model).values() for name in wrapper.copies]))


def known(model: nn.Module, names: Iterable[str], others: Iterable[str] = ()) -> None:
    """Raise `ConfigError` if a name is no adapter of the model and none of the others, `DTypeError` if it is no model."""
    if not isinstance(model, nn.Module):
        raise DTypeError(f"expected a model, got {type(model).__name__}")
    names, there = list(names), list(dict.fromkeys([*adapter_names(model), *sorted(others)]))
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"expected names of adapters, got {names!r}")
    if not there:
        raise ConfigError(f"{type(model).__name__} has no adapters: put some in with lora.inject")
    wrong = [name for name in dict.fromkeys(names) if name not in there]
    if wrong:
        lines = []
        for name in wrong:
            close = nearest(str(name), there, 1)
            lines.append(f"{name!r}" + (f" (is {close[0]!r} meant?)" if close else ""))
        raise ConfigError(f"no adapter of the name {', '.join(lines)}. There are: {', '.join(map(repr, there)) or 'none'}")


def the_name(model: nn.Module, name: str | None) -> str:
    """This name of an adapter, or that of the only one; `ConfigError` if there is none or it is to be said which."""
    names = adapter_names(model)
    if name is None and len(names) == 1:
        return names[0]
    if name is None:
        raise ConfigError(f"say which adapter: there are {', '.join(map(repr, names)) or 'none'}")
    known(model, [name])
    return name


def refuse_taken(model: nn.Module, name: str) -> None:
    """Raise `ConfigError` if the model has an adapter of that name."""
    if name in adapter_names(model):
        raise ConfigError(f"there is an adapter {name!r} already: choose another name, or lora.remove(model, {name!r}) first")


def refuse_merged(model: nn.Module, what: str) -> None:
    """Raise `StateError` if a layer is merged."""
    merged = [path or "the model" for path, layer in layers_of(model).items() if layer.merged]
    if merged:
        raise StateError(f"{what}: layers are merged ({', '.join(merged[:3])}{' ...' if len(merged) > 3 else ''}): their "
                         "weights hold the update. Call lora.unmerge(model) first")


def refuse_running(model: nn.Module, what: str) -> None:
    """Raise `StateError` within `disabled` or `mixed`, which would not know of what is done to the model inside."""
    if any(rows_of(place) is not None for place in _places(model)):
        raise StateError(f"{what}: not within lora.disabled or lora.mixed: leave the with block first")


def _places(model: nn.Module) -> list[nn.Module]:
    """What a context concerns: LoRA layers, modules that are trained as a whole, and what else has named parts, as prefixes."""
    return [*layers_of(model).values(), *saved_of(model).values(), *_others(model)]


def _others(model: nn.Module) -> list[ByRow]:
    """What else gives each row its own."""
    return [module for _, module in model.named_modules() if isinstance(module, ByRow)]


def trained_numbers(model: nn.Module) -> tuple[int, int]:
    """How many numbers of a model are trained, and how many there are."""
    parameters = list(model.parameters())
    return sum(p.size for p in parameters if p.trainable), sum(p.size for p in parameters)


def freeze(model: nn.Module) -> None:
    """Let nothing be trained but what other tuners put beside the base, and forget all other gradients."""
    theirs = {id(p) for module in _others(model) for p in module.trained_apart()}
    for p in model.parameters():
        if id(p) not in theirs:
            p.trainable, p.grad = False, None


def activate(model: nn.Module, *names: str, weights: Sequence[float] | None = None,
             trainable: bool | Sequence[str] = True) -> None:
    """Let these adapters take part, and no others; without a name, none. What takes part is trained, all else is frozen.

    Parameters
    ----------
    model : Module
    *names : str
        Their updates are added up.
    weights : sequence of float, optional
        Factors of the updates, one for each name; 1 by default.
    trainable : bool or list of str
        With False nothing is trained: to use the model. A list names those of the adapters that are trained; the others take
        part and stay as they are.

    Raises
    ------
    ConfigError
        If the model has no adapters, a name is unknown or comes twice, or the weights do not fit.
    StateError
        If a layer is merged; or if two of the adapters have a copy of the same module (modules_to_save).

    Notes
    -----
    Swaps a few references: no weight is copied or computed. An adapter that was switched off keeps its weights. Parameters keep
    their places in an optimizer; one that is not active gets no gradient and is left alone by `step`.
    """
    known(model, names)
    factors, trained = _weights(names, weights), _trained(names, trainable)
    refuse_merged(model, "activate")
    wrappers = saved_of(model)
    chosen: dict[str, str] = {}
    for path, wrapper in wrappers.items():
        mine = [name for name in names if name in wrapper.copies]
        if len(mine) > 1:
            raise StateError(f"activate: {' and '.join(map(repr, mine))} have each a copy of {path}: only one can be used")
        beside = [name for name in names if any(name in layer.adapters for layer in layers_of(wrapper.original).values())]
        if mine and beside:
            raise StateError(f"activate: {mine[0]!r} has a copy of {path}, which would be used in place of the layer that "
                             f"{beside[0]!r} adapts: the two do not go together")
        chosen.update({path: name for name in mine})
    copies = [(wrapper, chosen.get(path)) for path, wrapper in wrappers.items()]
    all_or_nothing(lambda: _switch(model, factors, copies, trained), [model])


def _switch(model: nn.Module, factors: dict[str, float], copies: list[tuple[SavedModule, str | None]],
            trained: frozenset[str]) -> None:
    """Let the adapters in `factors` take part, and of each wrapper the copy of the adapter beside it, or none."""
    freeze(model)
    modes: set[str] = set()
    for layer in layers_of(model).values():
        layer.active = {name: weight for name, weight in factors.items() if name in layer.adapters}
        for name in layer.active:
            layer.adapters[name].set_trainable(name in trained)
        mine = {bias_mode(layer.adapters[name]) for name in layer.active if name in trained}
        bias = getattr(layer, "bias", None)
        if bias is not None and "lora_only" in mine:
            bias.trainable = True
        modes |= mine
    for wrapper, owner in copies:
        wrapper.active = owner
        if wrapper.active is not None:
            wrapper.copies[wrapper.active].requires_grad(wrapper.active in trained)
    if "all" in modes:
        for p in biases_of(model):
            p.trainable = True


def bias_mode(adapter: Adapter) -> str:
    """Which biases of the base are trained with an adapter: "none", "all" or "lora_only"."""
    return "none" if adapter.config is None else adapter.config.bias


def biases_of(model: nn.Module) -> list[Parameter]:
    """The biases of the base that are in use: not those of copies, nor of a module in whose place a copy is used."""
    apart = {id(p) for wrapper in saved_of(model).values()
             for module in (*wrapper.copies.values(), *([wrapper.original] if wrapper.active else []))
             for p in module.parameters()}
    return [p for path, p in model.named_parameters() if path.split(".")[-1] == "bias" and id(p) not in apart]


def _weights(names: Sequence[str], weights: Sequence[float] | None) -> dict[str, float]:
    if len(set(names)) < len(names):
        raise ConfigError(f"activate: a name comes twice in {list(names)}: use weights to add an adapter more than once")
    if weights is not None and not isinstance(weights, (list, tuple)):
        raise ConfigError(f"activate: weights is a list with one number for each name, got {weights!r}")
    weights = [1.0] * len(names) if weights is None else list(weights)
    if len(weights) != len(names):
        raise ConfigError(f"activate: {len(names)} names and {len(weights)} weights: expected one weight for each name")
    return {name: check_factor(f"weights[{i}]", weight) for i, (name, weight) in enumerate(zip(names, weights))}


def _trained(names: Sequence[str], trainable: bool | Sequence[str]) -> frozenset[str]:
    if isinstance(trainable, bool):
        return frozenset(names if trainable else ())
    if not isinstance(trainable, (list, tuple)) or not set(trainable) <= set(names):
        raise ConfigError(f"activate: trainable is True, False or a list of some of the names {list(names)}, got {trainable!r}")
    return frozenset(trainable)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within ``with lora.disabled(model):`` the model computes what its base computes. No weight is touched.

    Raises
    ------
    StateError
        If a layer is merged: its weight then is not the base's.

    Notes
    -----
    Holds in this thread or task, as told in `mixed`.
    """
    refuse_merged(model, "disabled")
    with opened(_places(model), Nobody()):
        yield


@contextmanager
def mixed(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Within ``with lora.mixed(model, adapter_names=[...]):`` each row of a batch gets the adapter named for it.

    Parameters
    ----------
    model : Module
        Whose layers have the batch on their first axis.
    adapter_names : sequence of str
        One for each row of the batch; ``"__base__"`` for none.

    Raises
    ------
    ConfigError
        If a name is unknown.
    StateError
        If a layer is merged; from the model, if a module in modules_to_save gives something else than one tensor.
    ShapeError
        From the model, if the batch has another number of rows.

    Notes
    -----
    The rows of one adapter are gathered and computed together, r (in + out) products a row: what is wrong with one adapter
    stays in its rows. A layer that lacks an adapter does nothing for its rows. The weights given to `activate` do not count.
    Of two contexts the inner one counts.

    A layer whose input has one row gives it to every name: so an adapter of a table of positions takes part, if the model looks
    up the positions as one row (1, T), as the models here do. In a model of your own that looks them up as (T,), write
    ``positions[None]``.

    The context belongs to the thread or the asyncio task that opened it, as `no_grad` does: others run the same model with
    mixes of their own at the same time. What is started inside with a copy of the context, as a task is, goes on in it. A copy
    or a pickle of the model made inside is in no context. What is done to the model itself (`inject`, `remove`, `activate`,
    `merge`, training) holds for all threads: whoever owns the model does it when no request is under way. Nothing waits for
    that here. A request that is under way all the same gets some of its layers before and some after; if they are merged
    meanwhile, an error.

    Examples
    --------
    >>> import numpy, minilora
    >>> from minilora import lora
    >>> model = minilora.nn.Sequential(minilora.nn.Linear(4, 3, rng=0))
    >>> for name in ("one", "two"):
    ...     report = lora.inject(model, lora.Config(r=1, target_modules=["0"]), name, rng=0)
    >>> with lora.mixed(model, adapter_names=["one", "two", "__base__"]):
    ...     y = model(minilora.tensor(numpy.ones((3, 4), "float32")))
    >>> y.shape
    (3, 3)
    """
    if not isinstance(adapter_names, (list, tuple)):
        raise ConfigError(f"adapter_names: expected a list with a name for each row, got {adapter_names!r}")
    others = [name for module in _others(model) for name in module.names] if isinstance(model, nn.Module) else []
    unknown = [name for name in adapter_names if name != BASE and name not in others]
    if unknown or not others:
        known(model, unknown, others)
    refuse_merged(model, "mixed")
    with opened(_places(model), Rows(adapter_names)):
        yield
