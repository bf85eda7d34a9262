"""A walk through a copy of a graph that writes down what came by. The graph itself is not used up, and no `grad` changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..engine import Op
from ..errors import GraphError
from ..tensor import Parameter, Tensor
from ..walk import collect
from .numbers import norm, rows

__all__ = ["Arrived", "operations", "walked"]

Array = Any


class Arrived(NamedTuple):
    """What a walk came by.

    Attributes
    ----------
    totals : dict
        Operation or parameter -> the gradient of its output: its rows if they are few, and its norm.
    parts : dict
        (operation, i) -> the norm of what its backward gave for input i.
    """

    totals: dict[Any, tuple[tuple[str, ...], str]]
    parts: dict[tuple[Op, int], str]


def operations(loss: Tensor) -> list[Op]:
    """All operations behind a tensor, oldest first."""
    found: set[Op] = set()
    frontier: list[Any] = [loss.node]
    while frontier:
        node = frontier.pop()
        if not isinstance(node, Op) or node in found:
            continue
        if node.sources is None:
            raise GraphError("draw: this graph was used by an earlier backward() and is gone. Draw it before backward(), which "
                             "it leaves as it is; or let draw compute it: minilora.draw(f, x=x) for a function f(x)")
        found.add(node)
        frontier.extend(node.sources)
    return sorted(found, key=lambda op: op.order)


def walked(loss: Tensor, gradient: Array) -> Arrived:
    """The gradients on the edges of a graph, from that of its end."""
    arrived = Arrived({}, {})
    twins = _twins(loss.node)
    try:
        for op, twin in twins.items():
            vars(twin)["backward"] = _watched(op, twin.backward, arrived)
        end = Tensor(loss.data)
        end.node = twins[loss.node] if isinstance(loss.node, Op) else loss.node
        found = collect(end, gradient, rooms=False)
    finally:
        for twin in twins.values():
            vars(twin).pop("backward", None)  # a circle of references
    arrived.totals.update({parameter: (rows(dx), norm(dx)) for parameter, dx in found.leaves.items()})
    return arrived


def _watched(op: Op, backward: Callable[[Array], Any], arrived: Arrived) -> Callable[[Array], Any]:
    sources: Sequence[Op | Parameter | None] = op.sources or ()

    def called(dy: Array) -> Any:
        gradients = backward(dy)
        arrived.totals[op] = rows(dy), norm(dy)
        if isinstance(gradients, (tuple, list)):  # else the walk has something to say
            arrived.parts.update({(op, i): norm(dx) for i, (source, dx) in enumerate(zip(sources, gradients))
                                  if source is not None and hasattr(dx, "dtype")})
        return gradients
    return called


def _twins(root: Any) -> dict[Op, Op]:
    """A copy of each operation, which shares its arrays; also of those that an operation holds, as a graph of its own."""
    twins: dict[Op, Op] = {}
    frontier = [root]
    while frontier:
        op = frontier.pop()
        if isinstance(op, Op) and op not in twins:
            twins[op] = object.__new__(type(op))
            frontier += [*(op.sources or ()), *vars(op).values()]
    for op, twin in twins.items():
        for name, value in vars(op).items():
            vars(twin)[name] = twins[value] if isinstance(value, Op) else value
        if op.sources is not None:
            twin.sources = [twins[source] if isinstance(source, Op) else source for source in op.sources]
        twin.retained = None  # what somebody asked for comes with the graph's own backward
    return twins
