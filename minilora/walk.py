"""What walks the graph: `backward`, which uses it up, and `ledger`, which only looks."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any, NamedTuple, NoReturn

from . import backend
from .engine import Op, check_alike
from .errors import GraphError, ShapeError
from .tensor import Parameter, Tensor

__all__ = ["Ledger", "LedgerRow", "backward", "ledger"]

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
        If nothing trainable took part, if the graph was used before, or if a cotangent is missing.
    ShapeError
        If the cotangent's shape differs from the tensor's.

    Notes
    -----
    Gradients reach the parameters only when the whole walk has succeeded: after an error no `grad` has changed.
    """
    root = loss.node
    if root is None:
        raise GraphError("backward() has nothing to do: no trainable parameter took part in this tensor, or it was made "
                         "under no_grad(). Check that some parameter has trainable=True")
    dy = _cotangent(loss, gradient)
    if isinstance(root, Parameter):
        _deliver({root: dy.copy()})
        return
    table: dict[Op, Array] = {root: dy}  # op -> the gradient of its output, as far as known
    owned: set[Op] = set()  # ops whose entry nobody else holds: it may be added to in place
    leaves: dict[Parameter, Array] = {}
    heap = [root]
    while heap:
        op = heappop(heap)
        dy = table.pop(op)
        sources = op.sources
        if sources is None:
            _refuse_used(op)
        if op.saved:
            op.gathered = leaves
        gradients = op.backward(dy if op.shape else op.xp.asarray(dy))  # NumPy's 0-d arithmetic gives scalars
        if len(gradients) != len(sources):
            _refuse_gradient(op, sources, gradients)
        for source, dx in zip(sources, gradients):
            if source is None:
                continue
            if isinstance(source, Parameter):
                if dx is None or dx.shape != source.data.shape:
                    _refuse_gradient(op, sources, gradients)
                if source in leaves:
                    leaves[source] += dx
                elif dx is source.room or (dx.base is None and dx is not dy):
                    leaves[source] = dx  # made by this op's backward, and no view: nobody else holds it
                else:
                    leaves[source] = dx.copy()
            elif dx is None or dx.shape != source.shape:
                _refuse_gradient(op, sources, gradients)
            elif source not in table:
                table[source] = dx
                heappush(heap, source)
            else:
                table[source] = _sum(table[source], dx, source in owned, dx.base is None and dx is not dy)
                owned.add(source)
        op.sources = None
        if op.saved:
            op.saved, op.leaves, op.gathered = (), (), None
    _deliver(leaves)


def _sum(a: Array, b: Array, a_is_ours: bool, b_is_ours: bool) -> Array:
    """a + b in a place that nobody else holds: a's, or b's if it was made by the last backward and is no view, or a new one."""
    if a_is_ours:
        a += b
        return a
    if b_is_ours:
        b += a
        return b
    return a + b


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


def _root(array: Array) -> Array:
    return array if array.base is None else array.base


def _deliver(leaves: dict[Parameter, Array]) -> None:
    for parameter, dx in leaves.items():
        if dx.dtype != parameter.dtype:
            raise GraphError(f"an operation's backward gave a gradient of dtype {dx.dtype} for a parameter of dtype "
                             f"{parameter.dtype}: write its constants as Python floats")
    for parameter, dx in leaves.items():
        if parameter.grad is not None:
            parameter.grad += dx
        elif parameter.room is None:
            parameter.grad = parameter.device.xp.asarray(dx)
        else:
            if dx is not parameter.room:
                parameter.room[...] = dx
            parameter.grad = parameter.room


class LedgerRow(NamedTuple):
    """What one operation keeps for backward: its name, its output's shape, the arrays kept (shape, dtype) and their bytes."""

    op: str
    shape: tuple[int, ...]
    kept: tuple[tuple[tuple[int, ...], str], ...]
    nbytes: int


class Ledger(NamedTuple):
    """What a graph remembers. Printed as a table, oldest operation first.

    Attributes
    ----------
    rows : tuple of LedgerRow
    nbytes : int
        Bytes of all kept arrays. An array that several operations keep counts once, a view keeps the whole array that it
        looks into, and parameters' own arrays count nothing.
    """

    rows: tuple[LedgerRow, ...]
    nbytes: int

    def __str__(self) -> str:
        lines = [f"{'op':<14} {'output':<16} {'keeps for backward':<40} {'bytes':>12}"]
        for row in self.rows:
            kept = ", ".join(f"{shape} {dtype}" for shape, dtype in row.kept) or "-"
            lines.append(f"{row.op:<14} {str(row.shape):<16} {kept:<40} {row.nbytes:>12,}")
        lines.append(f"{'total':<14} {'':<16} {'':<40} {self.nbytes:>12,}")
        return "\n".join(lines)


def ledger(loss: Tensor) -> Ledger:
    """List what every operation behind `loss` keeps for backward, without changing anything.

    Examples
    --------
    >>> import minilora
    >>> w = minilora.Parameter(minilora.backend.asarray([[1.0, 2.0]]))
    >>> x = minilora.tensor([[3.0, 4.0]])
    >>> print(minilora.engine.ledger(minilora.ops.linear(x, w).sum()))
    op             output           keeps for backward                              bytes
    Linear         (1, 1)           (1, 2) float32                                      8
    Sum            ()               -                                                   0
    total                                                                               8
    """
    found: set[Op] = set()
    frontier = [loss.node]
    while frontier:
        node = frontier.pop()
        if isinstance(node, Op) and node not in found:
            found.add(node)
            frontier.extend(node.sources or ())
    rows: list[LedgerRow] = []
    counted: set[int] = set()
    for op in sorted(found, key=lambda op: op.order):
        free = {id(_root(leaf)) for leaf in op.leaves}
        kept = [a for a in op.saved if a is not None and hasattr(a, "shape") and id(_root(a)) not in free]
        new = {id(_root(a)): _root(a).size * a.dtype.itemsize for a in kept if id(_root(a)) not in counted}
        counted.update(new)
        name = (type(op).reference or type(op)).__name__
        rows.append(LedgerRow(name, op.shape, tuple((a.shape, a.dtype.name) for a in kept), sum(new.values())))
    return Ledger(tuple(rows), sum(row.nbytes for row in rows))
