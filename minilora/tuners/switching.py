"""Put prefixes and prompts into a model, switch between them, and take them out.

>>> from minilora import models, tuners
>>> model = models.GPT2(models.GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=2), rng=0)
>>> prefix = tuners.inject(model, tuners.PrefixConfig(num_virtual_tokens=2, prefix_projection=True), "anna", rng=0)
>>> with tuners.disabled(model):
...     y = model([[1, 2, 3]])
>>> tuners.names(model), tuners.fold(model), tuners.remove(model, "anna"), tuners.names(model)
(['anna'], None, None, [])
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy

from ..errors import ConfigError, DTypeError, StateError
from ..nn.by_row import ByRow, Nobody, opened, rows_of
from ..nn.front import Fronted
from ..nn.module import Module
from ..tensor import Parameter
from .config import CLASSES, HEADS, PrefixConfig, PromptConfig, VirtualConfig
from .fronts import Fronts, Held
from .virtual import Prefix, Virtual, fitted, made

__all__ = ["activate", "attach", "body_of", "check_free", "disabled", "fold", "heads_of", "inject", "names", "of_name",
           "remove"]

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def body_of(model: Any) -> tuple[str, Fronted]:
    """The part of a model that something may stand in front of, with its path.

    Raises
    ------
    DTypeError
        If it is no model, or has no such part.
    """
    if not isinstance(model, Module):
        raise DTypeError(f"expected a model, got {type(model).__name__}")
    for path, module in model.named_modules():
        if isinstance(module, Fronted):
            return path, module
    raise DTypeError(f"nothing can stand in front of a {type(model).__name__}: GPT-2, the Llama family, BERT and RoBERTa allow "
                     "it, and models of your own that derive from minilora.nn.front.Fronted")


def names(model: Module) -> list[str]:
    """The names of all prefixes and prompts of a model."""
    front = body_of(model)[1].front
    return [] if front is None else list(front.own)


def of_name(model: Module, name: str | None = None) -> tuple[str, Virtual]:
    """One of them: by its name, or the only one; `ConfigError` if there is none, or it is to be said which."""
    there = names(model)
    if name is None and len(there) == 1:
        name = there[0]
    if name is None or name not in there:
        said = "say which prefix or prompt" if name is None else f"no prefix or prompt of the name {name!r}"
        raise ConfigError(f"{said}: there {'is' if len(there) == 1 else 'are'} {', '.join(map(repr, there)) or 'none'}")
    return name, body_of(model)[1].front.own[name]


def inject(model: Module, config: VirtualConfig, name: str = "default", *, rng: numpy.random.Generator | int | None = None,
           token_ids: Any = None) -> Virtual:
    """Put a prefix or a prompt in front of a model, make it the active one, and freeze the base.

    Parameters
    ----------
    model : Module
        GPT-2, the Llama family, BERT or RoBERTa, with or without a head. It may have others, and adapters of other kinds,
        which stay as they are.
    config : PrefixConfig or PromptConfig
    name : str
        1 to 64 of the characters A-Z a-z 0-9 . _ -
    rng : numpy.random.Generator or int, optional
    token_ids : sequence of int, optional
        For a prompt: the tokens whose vectors it begins with.

    Returns
    -------
    Prefix or Prompt

    Raises
    ------
    ConfigError
        If the name is taken or cannot be one, the config is for another model, or names a module that is not there.
    DTypeError
        If nothing can stand in front of this model. After any of these errors nothing has changed.

    Notes
    -----
    Make the optimizer afterwards. Where other adapters are in the model, they have frozen its base, and what they train goes on
    being trained. Modules in modules_to_save are trained where they are: the base is then another one.

    Examples
    --------
    >>> import minilora
    >>> from minilora import tuners
    >>> config = minilora.nn.GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=2)
    >>> model = minilora.nn.GPT2(config, rng=0)
    >>> tuners.inject(model, tuners.PrefixConfig(num_virtual_tokens=3), rng=1)
    Prefix(1 layers, 3 virtual tokens, 3, 8)
    >>> model([[1, 2]]).shape, [name for name, p in model.named_parameters() if p.trainable]
    ((1, 2, 11), ['front.own.default.embedding'])
    """
    if not isinstance(config, (PrefixConfig, PromptConfig)):
        raise DTypeError(f"inject: expected a tuners.PrefixConfig or PromptConfig, got {type(config).__name__}")
    _, body = body_of(model)
    check_free(model, name)
    heads = heads_of(model, config)
    config = fitted(config, body.front_sizes)
    table: Any = getattr(body, "embedding", None)
    own = made(config, body.front_sizes, table.weight, numpy.random.default_rng(rng), token_ids)
    own.heads = tuple(heads)
    attach(model, name, own)
    activate(model, name)
    return own


def check_free(model: Module, name: Any) -> None:
    """Raise `ConfigError` if this cannot be the name of a new one, `StateError` within a context."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == "__base__" or not name.strip("."):
        raise ConfigError(f"the name of a prefix consists of 1 to 64 of the characters A-Z a-z 0-9 . _ -, got {name!r}")
    if name in names(model):
        raise ConfigError(f"there is a prefix or prompt {name!r} already: choose another name, or tuners.remove(model, "
                          f"{name!r}) first")
    _refuse_running(model)


def heads_of(model: Module, config: VirtualConfig) -> dict[str, Module]:
    """The modules that are trained with it, by path; `ConfigError` if a name in modules_to_save is none."""
    wanted = dict.fromkeys(config.modules_to_save or (), True)
    if config.task_type in CLASSES:
        wanted.update({name: False for name in HEADS if name not in wanted})
    found: dict[str, Module] = {}
    for name, needed in wanted.items():
        hits = {path: module for path, module in model.named_modules() if path == name or path.endswith(f".{name}")}
        if needed and name not in HEADS and not hits:
            raise ConfigError(f"modules_to_save: no module of the model is called {name!r}")
        found.update(hits)
    return found


def attach(model: Module, name: str, own: Virtual) -> None:
    """Take one in, not active yet."""
    body = body_of(model)[1]
    modules = dict(model.named_modules())
    held = Held(tuple(p for path in own.heads for p in modules[path].parameters()))
    front = Fronts() if body.front is None else body.front
    front.training = body.training
    front.heads = {**front.heads, name: held}
    front.own = {**front.own, name: own.train(body.training)}  # a new dict: another thread may be reading this one
    own.requires_grad(False)
    body.front = front


def activate(model: Module, name: str | None = None, trainable: bool = True) -> None:
    """Let this prefix or prompt stand in front, and no other; without a name, none. It is trained, all others are frozen.

    Parameters
    ----------
    model : Module
    name : str, optional
    trainable : bool
        With False it is used and not trained.

    Raises
    ------
    ConfigError
        If there is none of this name.
    StateError
        Within `disabled` or a mixed batch.

    Notes
    -----
    Swaps a reference. Adapters of other kinds stay active, and trained, as they are.
    """
    body = body_of(model)[1]
    if name is not None:
        of_name(model, name)
    _refuse_running(model)
    if body.front is None:
        return
    front: Fronts = body.front
    chosen = {id(p) for p in front.parts(name)} if name is not None and trainable else set()
    ours = {id(p): p for own in front.own for p in front.parts(own)}
    touched = list((ours if _adapted(model) else {id(p): p for p in model.parameters()} | ours).values())

    def switch() -> None:
        for p in touched:
            p.trainable = id(p) in chosen
            p.grad = p.grad if p.trainable else None
        front.active = name

    _undone_on_error(switch, front, touched)


def _adapted(model: Module) -> bool:
    """Whether adapters of another kind are in a model: modules that say what they are without what is put around them."""
    return any(type(module).as_base is not Module.as_base for _, module in model.named_modules())


def _undone_on_error(change: Callable[[], None], front: Fronts, parameters: list[Parameter]) -> None:
    before = front.active, [(p, p.trainable, p.grad) for p in parameters]
    try:
        change()
    except BaseException:  # interrupted
        front.active = before[0]
        for p, trainable, grad in before[1]:
            p.trainable, p.grad = trainable, grad
        raise


def _refuse_running(model: Module) -> None:
    front = body_of(model)[1].front
    if isinstance(front, ByRow) and rows_of(front) is not None:
        raise StateError("not within tuners.disabled or a mixed batch: leave the with block first")


def remove(model: Module, name: str) -> None:
    """Take a prefix or a prompt out of a model. Its numbers are gone, the base is as it was; parameters stay frozen.

    Raises
    ------
    ConfigError
        If there is none of this name.
    StateError
        Within `disabled` or a mixed batch.
    """
    of_name(model, name)
    _refuse_running(model)
    body = body_of(model)[1]
    front: Fronts = body.front
    for p in front.parts(name):
        p.trainable, p.grad = False, None
    front.active = None if front.active == name else front.active
    front.own = {other: own for other, own in front.own.items() if other != name}
    front.heads = {other: held for other, held in front.heads.items() if other != name}
    if not front.own:
        body.front = None


def fold(model: Module, name: str | None = None) -> None:
    """Put what the MLP of a prefix makes in its place: the same keys and values, computed once. It can then be trained on only
    without the MLP, by a new optimizer.

    Raises
    ------
    ConfigError
        If there is none of this name, or it is not made by an MLP.
    """
    name, own = of_name(model, name)
    if not isinstance(own, Prefix) or own.hidden_weight is None:
        raise ConfigError(f"fold: {name!r} has no MLP")
    front: Fronts = body_of(model)[1].front
    twin = own.folded().requires_grad(own.embedding.trainable)
    front.own = {other: twin if other == name else value for other, value in front.own.items()}


@contextmanager
def disabled(model: Module) -> Iterator[None]:
    """Within ``with tuners.disabled(model):`` nothing stands in front. Adapters of other kinds take part as before.

    Holds in this thread or task alone. What gives each row of a batch its own adapter, gives it its own prefix too:
    ``lora.mixed(model, adapter_names=[...])``.
    """
    front = body_of(model)[1].front
    with opened([] if front is None else [front], Nobody()):
        yield
