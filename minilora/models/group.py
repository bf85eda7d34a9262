"""What the three families are built with: modules under one name, and how their weights start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy

from .. import backend
from ..nn.conv import Conv1d
from ..nn.embedding import Embedding
from ..nn.initial import drawing
from ..nn.linear import Linear
from ..nn.module import Module
from ..tensor import Parameter

__all__ = ["Group", "initialise", "zeroed"]

L = TypeVar("L", bound=Module)

ROWS = 1024  # of a weight, drawn at a time


class Group(Module):
    """Modules, and parameters, under one name. It has no forward: its owner calls the parts, and reads like a formula.

    It gives parts the paths that they have in a checkpoint (``attention.output.dense``) without a class for every level.

    Examples
    --------
    >>> import minilora
    >>> mlp = minilora.models.Group(c_fc=minilora.nn.Linear(2, 8, rng=0), c_proj=minilora.nn.Linear(8, 2, rng=1))
    >>> [name for name, p in mlp.named_parameters()]
    ['c_fc.weight', 'c_fc.bias', 'c_proj.weight', 'c_proj.bias']
    """

    def __init__(self, /, **modules: Module | list[Any] | Parameter | None) -> None:
        vars(self).update(modules)

    if TYPE_CHECKING:
        def __getattr__(self, name: str) -> Any: ...


def initialise(model: Module, std: float, rng: numpy.random.Generator, output_std: float | None = None) -> None:
    """Draw all weights of linear layers and embeddings from N(0, std^2) and set biases, and rows of padding, to 0.

    Drawn on the host, in the order of `named_modules`. Layers called c_proj, whose output is added to the residual stream,
    are drawn with `output_std`, where it is given. Within `nn.undrawn` nothing is done.
    """
    if not drawing():
        return
    for path, module in model.named_modules():
        if not isinstance(module, (Linear, Embedding, Conv1d)):
            continue
        weight = module.weight
        own = output_std if output_std is not None and path.endswith(".c_proj") else std
        drawn = numpy.empty(weight.shape, weight.dtype)
        for low in range(0, len(drawn), ROWS):  # float64 numbers for all rows at once would be the peak of a model's memory
            some = drawn[low:low + ROWS]
            some[...] = rng.normal(0.0, own, some.shape)
        if isinstance(module, Embedding) and module.padding_idx is not None:
            drawn[module.padding_idx] = 0.0
        weight.data = backend.asarray(drawn)
        if isinstance(module, (Linear, Conv1d)) and module.bias is not None:
            module.bias.data = backend.asarray(numpy.zeros(module.bias.shape, module.bias.dtype))


def zeroed(layer: L) -> L:
    """The same layer with all its parameters 0: it starts as nothing beside what it is added to."""
    if drawing():
        for p in layer.parameters():
            p.data = backend.asarray(numpy.zeros(p.shape, p.dtype))
    return layer
