"""What walks the graph and uses it up: `backward`. What only looks at it is in `ledger`."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Any

import numpy

from . import backend, complaints, replay
from .errors import GraphError, ShapeError
from .gathered import Gathered
from .half import added, narrow

__all__ = ["backward", "collect", "deliver"]

Array = Any


def backward(loss: Tensor, gradient: Array | None = None) -> None:
    """Add the gradient of `loss` with respect to every trainable parameter it depends on to that parameter's `grad`.

    Walks the graph once, newest operation first. Creation order is a topological order, so an operation is reached only
    when all its consumers have contributed. Each operation's arrays are released right after its backward.

    Parameters
    ----------
    loss : Tensor
        A scalar, or any tensor together with `gradient`.
    gradient : array, optional
        The cotangent dL/d(loss), same shape and dtype as `loss`.

    Raises
    ------
    GraphError
        If nothing trainable took part, if the graph was used before, if a cotangent is missing, or if a parameter's array
        was written in place (`Parameter.version`) after an operation had saved it.
    ShapeError
        If the cotangent's shape differs from the tensor's.

    Notes
    -----
    Gradients reach the parameters only when the whole walk has succeeded: after an error no `grad` has changed.

    What a backward returns is only borrowed: others may hold the same array, so nothing is ever added to it. The first sum
    makes a new array, and that one, which the walk alone holds, takes all further contributions in place. So do a parameter's
    room in an optimizer's flat array, and what `Op.into` lent. A parameter's only contribution, if borrowed, is copied.

    Gradients in float16 are added in float32: the sum for a tensor is rounded when all are there, that for a parameter when
    somebody reads its `grad`.
    """
    deliver(collect(loss, gradient))


def collect(loss: Tensor, gradient: Array | None = None, rooms: bool = True) -> Gathered:
    """The walk of `backward`, without its end: no `grad` changes.

    Without `rooms` nothing is written into an optimizer's flat array either. So several threads can walk at once, each a graph
    of its own over the same parameters.
    """
    root, dy = _root_of(loss, gradient)
    table, owned, retained = found = Gathered({}, set(), [])  # node -> its output's gradient so far; what may be added to
    widened: set[Op | Parameter] = set()  # nodes whose gradients are float16, and their sum float32
    heap = _start(table, owned, root, dy, rooms)
    array_type = loss.data.__class__
    while heap:
        op = heappop(heap)
        dy = narrow(table.pop(op)) if op in widened else table.pop(op)
        sources = op.sources
        if sources is None:
            complaints.refuse_used(op)
        if op.saved:
            for leaf, array, version in op.leaves:
                if leaf.version != version:
                    _check_unwritten(op, leaf, array, version)
            op.gathered = table if rooms else None
        try:
            if dy.__class__ is not array_type:
                dy = op.xp.asarray(dy)  # NumPy's 0-d arithmetic gives scalars
            gradients: Any = op.backward(dy)
        except Exception as error:
            complaints.explain(op, dy, error)
            raise
        if gradients.__class__ is not tuple or len(gradients) != len(sources):
            complaints.check_returned(op, sources, gradients)
        for source, dx in zip(sources, gradients):
            if source is None:
                continue
            if dx.__class__ is not array_type and not isinstance(dx, numpy.generic) or dx.shape != source.shape:
                if dx is None and op.composed and isinstance(source, Parameter):
                    continue  # it did not take part after all
                complaints.check_gradients(op, sources, gradients, array_type)
            if source in table:
                if source in owned:
                    table[source] += dx
                else:
                    table[source] = _first_sum(table[source], dx, source, widened)
                    owned.add(source)
            elif isinstance(source, Parameter):
                _receive(table, owned, source, dx, op, rooms)
            else:
                table[source] = dx
                heappush(heap, source)
        if op.retained is not None:
            retained += op.retained.given(op.xp, dy)
        op.sources = None
        if op.saved:
            op.saved, op.leaves, op.gathered, op.lent = (), (), None, {}
    return found


def _start(table: dict[Op | Parameter, Array], owned: set[Op | Parameter], root: Op | Parameter, dy: Array,
           rooms: bool) -> list[Op]:
    """Enter the walk's first gradient. What there is to walk: nothing behind a parameter."""
    if isinstance(root, Parameter):
        _receive(table, owned, root, dy, None, rooms)
        return []
    table[root] = dy
    return [root]


def _first_sum(one: Array, other: Array, source: Op | Parameter, widened: set[Op | Parameter]) -> Array:
    """The sum of a node's first two gradients; it is written down where that is wider than they are."""
    if other.dtype == "float16":
        widened.add(source)
    return added(one, other)


def _receive(table: dict[Op | Parameter, Array], owned: set[Op | Parameter], parameter: Parameter, dx: Array,
             op: Op | None, rooms: bool) -> None:
    """Enter a parameter's first contribution: in its room, if that waits for a gradient; else as it is.

    That is the walk's own if the op wrote it into the array that `Op.into` lent it, and borrowed otherwise.
    """
    if dx.dtype != parameter.data.dtype:
        complaints.refuse_dtype(op, dx.dtype, parameter)
    if op is not None and dx is op.lent.get(parameter):
        owned.add(parameter)
    elif rooms and parameter.room is not None and parameter.gathered is None and parameter.room.shape == dx.shape:
        parameter.room[...] = dx
        dx = parameter.room
        owned.add(parameter)
    table[parameter] = dx


def _root_of(loss: Tensor, gradient: Array | None) -> tuple[Op | Parameter, Array]:
    """Where a walk begins, and with which gradient."""
    if loss.node is None:
        raise GraphError("backward() has nothing to do: no trainable parameter took part in this tensor, or it was made "
                         "under no_grad(). Check that some parameter has trainable=True")
    return loss.node, _cotangent(loss, gradient)


def _cotangent(loss: Tensor, gradient: Array | None) -> Array:
    if gradient is None:
        if loss.size != 1:
            raise GraphError(f"backward() starts from a scalar, got shape {loss.shape}: reduce it first, for instance "
                             "with .mean(), or pass backward(gradient=...) of that shape")
        one = loss.device.one(loss.dtype)
        return one.reshape(loss.shape) if loss.shape else one
    if isinstance(gradient, Tensor):
        gradient = gradient.data
    backend.device_of(gradient)
    if gradient.shape != loss.shape:
        raise ShapeError(f"backward: the tensor has shape {loss.shape}, its gradient must too, got {gradient.shape}")
    if type(gradient) is not type(loss.data) or gradient.dtype != loss.dtype:
        check_alike(type(loss.node), loss.data, gradient)
    return gradient


def refuse_older(loss: Tensor, before: int, what: str, cure: str) -> None:
    """Refuse a graph that goes back to what was computed before that creation number: another walk would use it up too."""
    seen: set[Any] = set()
    frontier: list[Any] = [loss.node]
    while frontier:
        node = frontier.pop()
        if not isinstance(node, Op) or node in seen:
            continue
        if node.order < before:
            raise GraphError(f"{what} goes back to {complaints.name_of(node)} with output {node.shape}, which was computed "
                             f"before, outside of it: {cure}, or pass tensor.detach()")
        seen.add(node)
        frontier.extend(node.sources or ())


def _check_unwritten(op: Op, leaf: Parameter, array: Array, version: int) -> None:
    """Refuse an op that would read a parameter's array as it was in its forward pass, and is no longer."""
    if not any(op.xp.may_share_memory(kept, array) for kept in op.saved if hasattr(kept, "shape")):
        return
    writes = leaf.version - version
    raise GraphError(f"{complaints.name_of(op)}: backward needs a parameter {array.dtype} {array.shape} as it was in the "
                     f"forward pass, but its array was written in place {writes} time{'' if writes == 1 else 's'} since (by an "
                     "optimizer's step, by load_state_dict, or by another change of the weights): run the forward pass again "
                     "after that, or call backward() before it. No grad has changed")


def deliver(walked: Gathered) -> None:
    """Add a walk's gradients to those of the parameters; what is borrowed is copied, unless it is added at once."""
    leaves, owned, retained = walked
    for parameter, dx in leaves.items():
        gathered = parameter.gathered
        alike = dx.dtype == parameter.dtype or dx.dtype.char + parameter.dtype.char == "fe"
        if not alike or gathered is not None and gathered.shape != dx.shape:
            raise GraphError(f"backward: a parameter {parameter.dtype} {parameter.shape} got a gradient {dx.dtype} {dx.shape}"
                             + ("" if gathered is None else f", to be added to {gathered.dtype} {gathered.shape}")
                             + ": were its data replaced, or an operation's constants no Python floats?")
    for place, dy in retained:
        place.gradient = dy
    for parameter, dx in leaves.items():
        replay.found_gradient(parameter)
        if parameter.gathered is not None and parameter.gathered.dtype == "float16":
            parameter.gathered = added(parameter.gathered, dx)
        elif parameter.gathered is not None:
            parameter.gathered += dx
        else:
            own = parameter in owned and not isinstance(dx, numpy.generic)  # NumPy's 0-d sums are scalars
            parameter.gathered = dx if own else parameter.device.xp.array(dx)


from .engine import Op, check_alike  # noqa: E402  (last: see there)
from .tensor import Parameter, Tensor  # noqa: E402
