"""What a model consists of, as far as adapters care: layers with paths, kinds and weight shapes; from a model or a list."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Sequence
from typing import Any, NamedTuple, Union

from ... import nn
from ...errors import ConfigError, DTypeError
from ...tensor import Parameter
from ..config_checks import nearest
from ..layers.base import AdaptedLayer
from ..layers.saved import SavedModule
from ...tables import ranges

__all__ = ["ADAPTABLE", "Inventory", "Layer", "Numbers", "Whole", "inventory", "names_in", "near_in", "pattern_of", "tied_head",
           "uneven"]

ADAPTABLE = ("Linear", "Embedding", "Conv1d", "Conv2d")

Shape = tuple[int, ...]
Described = Sequence[Union[tuple[str, Shape], tuple[str, Shape, int], tuple[str, Shape, int, str]]]


class Numbers(NamedTuple):
    """One parameter: the last part of its path, its shape, and the bytes of one of its numbers."""

    name: str
    shape: Shape
    itemsize: int = 4

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize


class Whole(NamedTuple):
    """A module that adapters train as a whole, each in a copy of its own: its path, and the names of the adapters."""

    path: str
    adapters: tuple[str, ...]

    def __str__(self) -> str:
        several = len(self.adapters) > 1
        return (f"{self.path}, which adapter{'s' if several else ''} {', '.join(map(repr, self.adapters))} "
                f"train{'' if several else 's'} as a whole")


class Layer(NamedTuple):
    """One module.

    Attributes
    ----------
    path : str
        Inside a module that is trained as a whole, the one that the original had before.
    kind : str
        One of `ADAPTABLE`, found by the name of the module's class or of one it derives from; for other modules the name of
        their class; empty for what no adapter may be put on: the model itself, and the inside of an adapted layer or of a
        copy.
    module : Module, or None in a list of shapes
    weight : Numbers, or None
        The weight of an adaptable layer, also where it is shared.
    parameters : tuple of Numbers
        Its own parameters, without those counted in an earlier layer that shares them.
    groups : int
        Of a convolution.
    whole : Whole, or None
        If some adapters train this module, or one that holds it, as a whole.
    """

    path: str
    kind: str
    module: nn.Module | None
    weight: Numbers | None
    parameters: tuple[Numbers, ...]
    groups: int = 1
    whole: Whole | None = None

    @property
    def size(self) -> int:
        return sum(p.size for p in self.parameters)

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parameters)


Inventory = list[Layer]


def inventory(model: nn.Module | Described) -> Inventory:
    """The layers of a model in model order. A module or parameter that is shared counts once, at its first place.

    Parameters
    ----------
    model : Module, or list of tuple
        In place of a model, a list of parameters: (path, shape), (path, shape, count) or (path, shape, count, kind). A ``*``
        in the path stands for the numbers 0 .. count - 1. A matrix is a Linear's weight (out, in), an array with three or
        four axes a convolution's, unless `kind` says ``"Embedding"`` or otherwise; a vector belongs to the layer that its
        path names in front of the last dot, if the list has one.

    Raises
    ------
    DTypeError
        If it is neither.
    ConfigError
        If an entry of the list is not of that form, or a path comes twice.

    Examples
    --------
    >>> [layer.path for layer in inventory([("h.*.up", (8, 2), 2), ("h.*.up.bias", (8,), 2)])]
    ['h.0.up', 'h.1.up']
    """
    if isinstance(model, nn.Module):
        return list(_layers(model))
    if isinstance(model, (list, tuple)):
        return _described(model)
    raise DTypeError(f"expected a model or a list of (path, shape, count), got {type(model).__name__}")


def pattern_of(path: str) -> str:
    """A path with ``*`` for its numbers: the same for corresponding layers of a stack."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def names_in(layers: Inventory) -> str:
    """A sentence with the names of the layers that can be adapted, at most eight."""
    names = list(dict.fromkeys(layer.path.split(".")[-1] for layer in layers if layer.kind in ADAPTABLE))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    if not names:
        at_root = any(layer.path == "" and layer.weight is not None for layer in layers)
        return "The model is one layer, without a name: use lora.adapt(layer)" if at_root else \
            f"The model has no layer of the kinds {', '.join(ADAPTABLE)}"
    return f"The layers of the model are called {', '.join(names[:8])}{more}"


def near_in(layers: Inventory, entry: str) -> list[str]:
    """The names nearest to an entry of a config; whole paths if it holds a dot, or says by ^ that it is one."""
    paths = [layer.path for layer in layers if layer.kind in ADAPTABLE]
    plain = entry.strip("^$")
    leaves = close = nearest(plain.split(".")[-1], (path.split(".")[-1] for path in paths))
    if entry.startswith("^"):
        close = list(dict.fromkeys(pattern_of(path) for path in paths if path.split(".")[-1] in leaves))[:3]
    return (nearest(plain, map(pattern_of, paths)) if "." in plain else []) or close


def tied_head(layers: Inventory) -> str:
    """What to say to somebody who looks for the output head of a model that has none of its own; "" if it has one."""
    model: Any = next((layer.module for layer in layers if not layer.path), None)
    table = getattr(model, "embedding", None) if getattr(model, "lm_head", model) is None else None
    path = next((layer.path for layer in layers if table is not None and layer.module is table), "")
    if table is None or not path:
        return ""
    (V, d), dtype = table.weight.shape, table.weight.dtype.name
    return (f": the head of this model is tied, its weight is that of {path}. To adapt both, target {path.split('.')[-1]!r}. "
            f"To adapt the head alone, give the model one first: model.lm_head = minilora.nn.Linear({d}, {V}, bias=False, "
            f"dtype={dtype!r}); model.lm_head.weight.data[...] = model.{path}.weight.data")


def uneven(layers: Inventory, adapted: Container[str], chosen: Sequence[int]) -> list[str]:
    """Notes for names that are adapted in some layers of a stack and missing in others; in the chosen layers, or in all."""
    stacks: dict[str, set[int]] = {}
    hits: dict[tuple[str, str], set[int]] = {}
    for layer in layers:
        found = re.match(r"(?:(.*?)\.)?(\d+)\.(.*)", layer.path)
        if not found or (chosen and int(found[2]) not in chosen):
            continue
        stack = f"{found[1]}." if found[1] else ""
        stacks.setdefault(stack, set()).add(int(found[2]))
        if layer.path in adapted:
            hits.setdefault((stack, found[3]), set()).add(int(found[2]))
    return [f"uneven: {stack}*.{name} is adapted in {len(there)} of {len(stacks[stack])} layers, not in "
            f"{ranges(sorted(stacks[stack] - there))}"
            for (stack, name), there in hits.items() if len(there) > 1 and there != stacks[stack]]


def kind_of(module: nn.Module) -> str:
    """See `Layer.kind`."""
    names = [cls.__name__ for cls in type(module).__mro__]
    known = [name for name in names if name in ADAPTABLE]
    return known[0] if known and isinstance(getattr(module, "weight", None), Parameter) else names[0]


def _layers(model: nn.Module) -> Iterator[Layer]:
    modules: set[int] = set()
    parameters: set[int] = set()
    closed = ""  # path of an adapted layer, with a dot, whose children come now
    whole: Whole | None = None  # the wrapper whose inside comes now
    for path, module in model.named_modules():
        if id(module) in modules:
            continue
        modules.add(id(module))
        own = []
        for name, value in module.own_parameters():
            if id(value) not in parameters:
                parameters.add(id(value))
                own.append(_numbers(name, value))
        if whole and not path.startswith(f"{whole.path}."):
            whole = None
        place = _place(path, whole)
        hidden = not place or (closed and path.startswith(closed))
        if not hidden and isinstance(module, SavedModule):
            whole = Whole(path, tuple(module.copies))
        if not hidden and isinstance(module.original if isinstance(module, SavedModule) else module, AdaptedLayer):
            closed = f"{path}."
        seen = module.original if isinstance(module, SavedModule) else module  # a wrapper stands for what it wraps
        kind = kind_of(seen)
        weight = _numbers("weight", seen.weight) if kind in ADAPTABLE else None  # type: ignore[attr-defined]
        yield Layer(place or path, "" if hidden else kind, seen, weight, tuple(own), int(getattr(seen, "groups", 1)), whole)


def _place(path: str, whole: Whole | None) -> str:
    """The path that a module had before one around it was wrapped; "" for the wrapped module itself and for copies."""
    if whole is None:
        return path
    original = f"{whole.path}.original."
    return f"{whole.path}.{path[len(original):]}" if path.startswith(original) else ""


def _numbers(name: str, parameter: Parameter) -> Numbers:
    return Numbers(name, parameter.shape, parameter.dtype.itemsize)


def _described(entries: Sequence[Any]) -> Inventory:
    layers: dict[str, Layer] = {}
    vectors = []
    for entry in entries:
        path, shape, count, kind = _entry(entry)
        if not kind and len(shape) == 1:
            vectors.append((path, shape, count))
            continue
        kind = kind or {2: "Linear", 3: "Conv1d", 4: "Conv2d"}.get(len(shape), "Parameter")
        for one in _paths(path, count):
            if one in layers:
                raise ConfigError(f"the path {one!r} comes twice in the list of shapes")
            weight = Numbers("weight", shape)
            layers[one] = Layer(one, kind, None, weight if kind in ADAPTABLE else None, (weight,))
    for path, shape, count in vectors:
        for one in _paths(path, count):
            owner, _, name = one.rpartition(".")
            layer = layers.get(owner) or Layer(owner or one, "Parameter", None, None, ())
            if any(p.name == name for p in layer.parameters):
                raise ConfigError(f"the path {one!r} comes twice in the list of shapes")
            layers[layer.path] = layer._replace(parameters=(*layer.parameters, Numbers(name, shape)))
    return list(layers.values())


def _entry(entry: Any) -> tuple[str, Shape, int, str]:
    form = "expected (path, shape), (path, shape, count) or (path, shape, count, kind)"
    if not isinstance(entry, (tuple, list)) or not 2 <= len(entry) <= 4:
        raise ConfigError(f"{form}, got {entry!r}")
    defaults: list[Any] = [1, ""]
    given: list[Any] = [*entry, *defaults[len(entry) - 2:]]
    path, shape, count, kind = given
    sizes = [*shape, count] if isinstance(shape, (tuple, list)) and shape else [None]
    if not isinstance(path, str) or not path or not isinstance(kind, str):
        raise ConfigError(f"{form}, got {entry!r}")
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise ConfigError(f"{form} with sizes that are ints >= 1, got {entry!r}")
    if kind in ADAPTABLE and len(shape) != {"Conv1d": 3, "Conv2d": 4}.get(kind, 2):
        raise ConfigError(f"a {kind} cannot have a weight of shape {tuple(shape)} ({path!r})")
    return path, tuple(shape), count, kind


def _paths(path: str, count: int) -> list[str]:
    if "*" in path:
        return [path.replace("*", str(i)) for i in range(count)]
    return [path] if count == 1 else [f"{i}.{path}" for i in range(count)]
