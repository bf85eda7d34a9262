"""Activation checkpointing: a part of a network of which only the input is kept, and which backward computes again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextvars import copy_context
from typing import Any

from .. import parts
from ..engine import Op, apply, newest, recording
from ..errors import DTypeError, GraphError
from ..gathered import pass_on
from ..tensor import Parameter, Tensor
from ..walk import collect, refuse_older

__all__ = ["Recompute", "recompute"]

Array = Any


class Recompute(Op):
    """y = f(x1 ... xn; θ1 ... θm), computed twice: the graph of the first pass is dropped, that of the second is walked.

    The inputs are the x, then the θ. Forward keeps the x alone, and what f drew: the steps of dropout's counters, and the
    contexts in which it ran. Backward gives f the same x as leaves once more, and walks the graph that it makes, from dy:

        dx_i = (∂y/∂x_i)ᵀ dy        dθ_j = (∂y/∂θ_j)ᵀ dy

    Each is what the graph of the first pass would have given, to the bit: the same operations on the same numbers. (Without a
    graph some operations round otherwise, in place or fused; so the first pass makes one too.) A θ that f did not use has no
    gradient.

    Costs one more forward pass of f. Kept: the x; what f keeps, only while f itself runs or is walked. Over L blocks in a row
    that is L inputs and one block's activations, in place of L blocks' activations.
    Source: Chen et al. 2016, arXiv 1604.06174.
    """

    composed = True
    widens = False
    function: Callable[[Sequence[Tensor]], Any]
    parameters: tuple[Parameter, ...]

    def forward(self, *arrays: Array) -> Array:
        self.save(*arrays)  # the θ too: written in place before backward, they would give another y
        self.steps: list[int] = []
        self.context = copy_context()
        with parts.remembering(self.steps):
            y = self.function(self._given())
        if not isinstance(y, Tensor):
            raise DTypeError(f"recompute: expected one Tensor, got {type(y).__name__}: of a part with several outputs, such as "
                             "one that fills a cache, everything has to be kept. Leave grad_checkpoint off there")
        return y.data

    def backward(self, dy: Array) -> list[Array | None]:
        for parameter, array in zip(self.parameters, self.saved[len(self.saved) - len(self.parameters):]):
            if parameter.data is not array:
                raise GraphError(f"recompute: the array of a parameter of shape {parameter.shape} was replaced after the "
                                 "forward pass: run the forward pass again, or call backward() before it. No grad has changed")
        given, before = self._given(), newest()
        with recording():
            y = self.context.run(self._again, given)
        if y.shape != self.shape or y.dtype != dy.dtype:
            raise GraphError(f"recompute: the second pass gave {y.dtype} {y.shape}, the first {dy.dtype} {self.shape}: it "
                             "reads something that has changed in between. Leave grad_checkpoint off for this part")
        refuse_older(y, before, "recompute: what is computed again", "give it as an argument")
        walked = collect(y, dy, rooms=False)
        found = walked.leaves
        strangers = found.keys() - {*given, *self.parameters}
        if strangers:
            shapes = ", ".join(str(p.shape) for p in strangers)
            raise GraphError(f"recompute: trainable parameters of shape {shapes} took part that belong to another module: "
                             "their gradient would be lost. Make them attributes of the module that is computed again")
        pass_on(self, walked)
        return [found[leaf].astype(leaf.dtype, copy=False) if need and leaf in found else None
                for leaf, need in zip([*given, *self.parameters], self.needs)]

    def _again(self, given: Sequence[Any]) -> Any:
        with parts.repeating(self.steps):
            return self.function(given)

    def _given(self) -> list[Any]:
        """The x as leaves of a graph of their own."""
        count = len(self.saved) - len(self.parameters)
        return [Parameter(x) if need else Tensor(x) for x, need in zip(self.saved[:count], self.needs)]


class _Place:
    """Where the i-th tensor of the arguments stands."""

    def __init__(self, i: int) -> None:
        self.i = i


def recompute(function: Callable[..., Any], parameters: Iterable[Parameter], *args: Any, **kwargs: Any) -> Tensor:
    """Call a function of tensors, and keep nothing of it but its inputs: backward calls it again.

    Parameters
    ----------
    function : callable
        Gives one Tensor. Called again, it must do the same; masks of dropout are seen to.
    parameters : iterable of Parameter
        All that it reads, trainable or not.
    *args, **kwargs
        For the function. Tensors among them, also in tuples, lists and dicts, get their gradients.

    Returns
    -------
    Tensor

    Raises
    ------
    DTypeError
        If the function gives something else than one Tensor.
    GraphError
        In backward: if the second pass gives another shape, or reads parameters or tensors with a graph that it was not given.

    Examples
    --------
    >>> import minilora
    >>> layer = minilora.nn.Linear(3, 3, rng=0)
    >>> y = recompute(lambda x: minilora.ops.gelu(layer(x)), layer.parameters(), minilora.tensor([[1.0, 2.0, 3.0]]))
    >>> print(minilora.engine.ledger(y))
    op             output           keeps for backward                         bytes
    Recompute      (1, 3)           (1, 3) float32                                12
    total                                                                         12
    """
    tensors, filled = taken_apart(function, args, kwargs)
    owned = tuple(dict.fromkeys([*parameters, *parameters_in((args, kwargs))]))
    return apply(Recompute, *tensors, *owned, function=filled, parameters=owned)


def taken_apart(function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[list[Tensor], Callable[[Sequence[Any]], Any]]:
    """The tensors among the arguments of a function, and the function of these alone."""
    tensors: list[Tensor] = []

    def emptied(tensor: Tensor) -> _Place:
        tensors.append(tensor)
        return _Place(len(tensors) - 1)

    template = _exchanged((args, kwargs), Tensor, emptied)

    def filled(given: Sequence[Any]) -> Any:
        args, kwargs = _exchanged(template, _Place, lambda place: given[place.i])
        return function(*args, **kwargs)

    return tensors, filled


def _exchanged(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """`value` with another in the place of each object of a class, in tuples, lists and dicts at any depth."""
    if isinstance(value, kind) and not isinstance(value, Parameter):
        return change(value)
    if isinstance(value, dict):
        return {key: _exchanged(item, kind, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_exchanged(item, kind, change) for item in value]
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    return value


def parameters_in(value: Any) -> Iterable[Parameter]:
    if isinstance(value, Parameter):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from parameters_in(item)
