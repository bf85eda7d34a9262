"""What walks the graph and uses it up: `backward`. What only looks at it is in `ledger`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any, NamedTuple, NoReturn

from . import backend, replay
from .errors import GraphError, ShapeError
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


class Gathered(NamedTuple):
    """What a walk came to: the parameters' gradients, and those parameters whose gradient the walk alone holds."""

    leaves: dict[Any, Array]
    owned: set[Op | Parameter]


def collect(loss: Tensor, gradient: Array | None = None, rooms: bool = True) -> Gathered:
    """The walk of `backward`, without its end: no `grad` changes.

    Without `rooms` nothing is written into an optimizer's flat array either. So several threads can walk at once, each a graph
    of its own over the same parameters.
    """
    root = loss.node
    if root is None:
        raise GraphError("backward() has nothing to do: no trainable parameter took part in this tensor, or it was made "
                         "under no_grad(). Check that some parameter has trainable=True")
    dy = _cotangent(loss, gradient)
    table: dict[Op | Parameter, Array] = {}  # node -> the gradient of its output, as far as known
    owned: set[Op | Parameter] = set()  # nodes whose entry the walk made, or a room: it may be added to in place
    widened: set[Op | Parameter] = set()  # nodes whose gradients are float16, and their sum float32
    heap: list[Op] = []
    if isinstance(root, Parameter):
        _receive(table, owned, root, dy, None, rooms)
    else:
        table[root] = dy
        heap.append(root)
    while heap:
        op = heappop(heap)
        dy = narrow(table.pop(op)) if op in widened else table.pop(op)
        sources = op.sources
        if sources is None:
            _refuse_used(op)
        if op.saved:
            for leaf, array, version in op.leaves:
                if leaf.version != version:
                    _check_unwritten(op, leaf, array, version)
            op.gathered = table if rooms else None
        gradients = op.backward(dy if op.shape else op.xp.asarray(dy))  # NumPy's 0-d arithmetic gives scalars
        if len(gradients) != len(sources):
            _refuse_gradient(op, sources, gradients)
        for source, dx in zip(sources, gradients):
            if source is None:
                continue
            if dx is None or dx.shape != source.shape:
                if dx is None and op.composed and isinstance(source, Parameter):
                    continue  # it did not take part after all
                _refuse_gradient(op, sources, gradients)
            if source in table:
                if source in owned:
                    table[source] += dx
                else:
                    table[source] = _first_sum(table[source], dx, source, widened)
                    owned.add(source)
            elif isinstance(source, Parameter):
                _receive(table, owned, source, dx, op.lent.get(source), rooms)
            else:
                table[source] = dx
                heappush(heap, source)
        op.sources = None
        if op.saved:
            op.saved, op.leaves, op.gathered, op.lent = (), (), None, {}
    return Gathered(table, owned)


def _first_sum(one: Array, other: Array, source: Op | Parameter, widened: set[Op | Parameter]) -> Array:
    """The sum of a node's first two gradients; it is written down where that is wider than they are."""
    if other.dtype == "float16":
        widened.add(source)
    return added(one, other)


def _receive(table: dict[Op | Parameter, Array], owned: set[Op | Parameter], parameter: Parameter, dx: Array,
             lent: Array | None, rooms: bool) -> None:
    """Enter a parameter's first contribution: in its room, if that waits for a gradient; else as it is.

    That is the walk's own if the op wrote it into the array that `Op.into` lent it, and borrowed otherwise.
    """
    if dx.dtype != parameter.data.dtype:
        raise GraphError(f"an operation's backward gave a gradient of dtype {dx.dtype} for a parameter of dtype "
                         f"{parameter.dtype}: write its constants as Python floats")
    if dx is lent:
        owned.add(parameter)
    elif rooms and parameter.room is not None and parameter.gathered is None:
        parameter.room[...] = dx
        dx = parameter.room
        owned.add(parameter)
    table[parameter] = dx


def _cotangent(loss: Tensor, gradient: Array | None) -> Array:
    if gradient is None:
        if loss.size != 1:
            raise GraphError(f"backward() starts from a scalar, got shape {loss.shape}: reduce it first, for instance "
                             "with .mean(), or pass backward(gradient=...) of that shape")
        return loss.device.xp.ones_like(loss.data)
    if isinstance(gradient, Tensor):
        gradient = gradient.data
    backend.device_of(gradient)
    if gradient.shape != loss.shape:
        raise ShapeError(f"backward: the tensor has shape {loss.shape}, its gradient must too, got {gradient.shape}")
    if type(gradient) is not type(loss.data) or gradient.dtype != loss.dtype:
        check_alike(type(loss.node), loss.data, gradient)
    return gradient


def _refuse_used(op: Op) -> NoReturn:
    raise GraphError(f"this graph was used by an earlier backward() and is gone (reached {type(op).__name__} with output "
                     f"{op.shape}): run the forward pass again, or add the losses first and call backward() once")


def _refuse_gradient(op: Op, sources: Sequence[Op | Parameter | None], gradients: Sequence[Array | None]) -> NoReturn:
    if len(gradients) != len(sources):
        raise GraphError(f"{type(op).__name__}.backward returned {len(gradients)} gradients for {len(sources)} inputs: "
                         "return one, or None, for each")
    for i, (source, dx) in enumerate(zip(sources, gradients)):
        got = "None" if dx is None else f"shape {dx.shape}"
        if source is not None and (dx is None or dx.shape != source.shape):
            raise GraphError(f"{type(op).__name__}.backward: input {i} has shape {source.shape} and wants a gradient of that "
                             f"shape, got {got}. Are the gradients in input order?")
    raise GraphError(f"{type(op).__name__}.backward returned a gradient that does not fit")


def refuse_older(loss: Tensor, before: int, what: str, cure: str) -> None:
    """Refuse a graph that goes back to what was computed before that creation number: another walk would use it up too."""
    seen: set[Any] = set()
    frontier: list[Any] = [loss.node]
    while frontier:
        node = frontier.pop()
        if not isinstance(node, Op) or node in seen:
            continue
        if node.order < before:
            name = (type(node).reference or type(node)).__name__
            raise GraphError(f"{what} goes back to {name} with output {node.shape}, which was computed before, outside of it: "
                             f"{cure}, or pass tensor.detach()")
        seen.add(node)
        frontier.extend(node.sources or ())


def _check_unwritten(op: Op, leaf: Parameter, array: Array, version: int) -> None:
    """Refuse an op that would read a parameter's array as it was in its forward pass, and is no longer."""
    if not any(op.xp.may_share_memory(kept, array) for kept in op.saved if hasattr(kept, "shape")):
        return
    name, writes = (type(op).reference or type(op)).__name__, leaf.version - version
    raise GraphError(f"{name}: backward needs a parameter {array.dtype} {array.shape} as it was in the forward pass, but its "
                     f"array was written in place {writes} time{'' if writes == 1 else 's'} since (by an optimizer's step, by "
                     "load_state_dict, or by another change of the weights): run the forward pass again after that, or call "
                     "backward() before it. No grad has changed")


def deliver(walked: Gathered) -> None:
    """Add a walk's gradients to those of the parameters; what is borrowed is copied, unless it is added at once."""
    leaves, owned = walked
    for parameter, dx in leaves.items():
        gathered = parameter.gathered
        alike = dx.dtype == parameter.dtype or dx.dtype.char + parameter.dtype.char == "fe"
        if not alike or gathered is not None and gathered.shape != dx.shape:
            raise GraphError(f"backward: a parameter {parameter.dtype} {parameter.shape} got a gradient {dx.dtype} {dx.shape}"
                             + ("" if gathered is None else f", to be added to {gathered.dtype} {gathered.shape}")
                             + ": were its data replaced, or an operation's constants no Python floats?")
    recording = replay.current()
    for parameter, dx in leaves.items():
        if recording is not None:
            recording.settled[parameter] = None
            if parameter not in recording.zeroed:
                replay.expect(functools.partial(getattr, parameter, "gathered"))
        if parameter.gathered is not None and parameter.gathered.dtype == "float16":
            parameter.gathered = added(parameter.gathered, dx)
        elif parameter.gathered is not None:
            parameter.gathered += dx
        else:
            parameter.gathered = parameter.device.xp.asarray(dx) if parameter in owned else parameter.device.xp.array(dx)


from .engine import Op, check_alike  # noqa: E402  (last: see there)
from .tensor import Parameter, Tensor  # noqa: E402
