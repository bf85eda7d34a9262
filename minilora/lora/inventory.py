"""What a model consists of, as far as adapters care: layers with paths, kinds and weight shapes; from a model or a list."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Union

from .. import nn
from ..errors import ConfigError, DTypeError
from ..tensor import Parameter
from .adapted import AdaptedLayer
from .saved import SavedModule

__all__ = ["ADAPTABLE", "Inventory", "Layer", "Numbers", "inventory", "pattern_of"]

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


class Layer(NamedTuple):
    """One module.

    Attributes
    ----------
    path : str
    kind : str
        One of `ADAPTABLE`, found by the name of the module's class or of one it derives from; for other modules the name of
        their class; empty for what no adapter may be put on: the model itself, and the inside of an adapted layer.
    module : Module, or None in a list of shapes
    weight : Numbers, or None
        The weight of an adaptable layer, also where it is shared.
    parameters : tuple of Numbers
        Its own parameters, without those counted in an earlier layer that shares them.
    groups : int
        Of a convolution.
    """

    path: str
    kind: str
    module: nn.Module | None
    weight: Numbers | None
    parameters: tuple[Numbers, ...]
    groups: int = 1

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


def kind_of(module: nn.Module) -> str:
    """See `Layer.kind`."""
    names = [cls.__name__ for cls in type(module).__mro__]
    known = [name for name in names if name in ADAPTABLE]
    return known[0] if known and isinstance(getattr(module, "weight", None), Parameter) else names[0]


def _layers(model: nn.Module) -> Iterator[Layer]:
    modules: set[int] = set()
    parameters: set[int] = set()
    inside = ""  # path of an adapted layer or a wrapper, with a dot, whose children come now
    for path, module in model.named_modules():
        if id(module) in modules:
            continue
        modules.add(id(module))
        own = []
        for name, value in module.own_parameters():
            if id(value) not in parameters:
                parameters.add(id(value))
                own.append(_numbers(name, value))
        hidden = not path or (inside and path.startswith(inside))
        if not hidden and isinstance(module, (AdaptedLayer, SavedModule)):
            inside = f"{path}."
        seen = module.original if isinstance(module, SavedModule) else module  # a wrapper stands for what it wraps
        kind = kind_of(seen)
        weight = _numbers("weight", seen.weight) if kind in ADAPTABLE else None  # type: ignore[attr-defined]
        yield Layer(path, "" if hidden else kind, seen, weight, tuple(own), int(getattr(seen, "groups", 1)))


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
