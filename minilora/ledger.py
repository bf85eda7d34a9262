"""What a graph remembers, as a table: `ledger` looks at it and changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .complaints import name_of
from .node import Node, Value
from .shown import shown
from .terminal import room

__all__ = ["Ledger", "LedgerRow", "ledger"]

Array = Any

WIDTH, NARROWEST = 80, 24  # of a printed ledger, and of its column of kept arrays
BY_KERNELS = '* by a kernel; minilora.use("cpu", kernels=False) runs the operation itself'

IN_TF32 = 'float32 products in TF32; minilora.use("gpu", tf32=False) makes them true float32'


class LedgerRow(NamedTuple):
    """What one operation keeps for backward: its name, its output's shape, the arrays kept (shape, dtype) and their bytes.

    `kernel` is the class of minilora/kernels that computed it; "" if the operation itself did, the reference.
    """

    op: str
    shape: tuple[int, ...]
    kept: tuple[tuple[tuple[int, ...], str], ...]
    nbytes: int
    kernel: str = ""


@shown
class Ledger(NamedTuple):
    """What a graph remembers. Printed as a table, oldest operation first; a star says that a kernel stood in.

    Attributes
    ----------
    rows : tuple of LedgerRow
    nbytes : int
        Bytes of all kept arrays. An array that several operations keep counts once, a view keeps the whole array that it
        looks into, and parameters' own arrays count nothing.
    tf32 : bool
        Whether one of the operations multiplied float32 matrices in TF32.
    """

    rows: tuple[LedgerRow, ...]
    nbytes: int
    tf32: bool = False

    def __str__(self) -> str:
        names = [row.op + "*" * bool(row.kernel) for row in self.rows]
        first = max([14, *map(len, names)])
        second = max([16, *(len(str(row.shape)) for row in self.rows)])
        third = max(NARROWEST, (room() or WIDTH) - first - second - 15)

        def line(name: str, shape: Any, kept: str, nbytes: str) -> str:
            return f"{name:<{first}} {shape!s:<{second}} {kept:<{third}} {nbytes:>12}".rstrip()

        lines = [line("op", "output", "keeps for backward", "bytes")]
        for name, row in zip(names, self.rows):
            head, *more = _broken([f"{shape} {dtype}" for shape, dtype in row.kept] or ["-"], third)
            lines += [line(name, row.shape, head, f"{row.nbytes:,}"), *(line("", "", text, "") for text in more)]
        lines.append(line("total", "", "", f"{self.nbytes:,}"))
        notes = [BY_KERNELS] * any(row.kernel for row in self.rows) + [IN_TF32] * self.tf32
        return "\n".join([*lines, *notes])


def _broken(words: Sequence[str], width: int) -> list[str]:
    """Words with commas in lines of that width; one that is wider has a line of its own."""
    lines = [words[0]]
    for word in words[1:]:
        lines[-1] += ","
        if len(lines[-1]) + 1 + len(word) < width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def ledger(loss: Value) -> Ledger:
    """List what every operation behind `loss` keeps for backward, without changing anything.

    Examples
    --------
    >>> import minilora
    >>> w = minilora.Parameter(minilora.backend.asarray([[1.0, 2.0]]))
    >>> x = minilora.tensor([[3.0, 4.0]])
    >>> print(minilora.engine.ledger(minilora.ops.linear(x, w).sum()))
    op             output           keeps for backward                         bytes
    Linear         (1, 1)           (1, 2) float32                                 8
    Sum            ()               -                                              0
    total                                                                          8
    """
    found: set[Node] = set()
    frontier: list[Any] = [loss.node]
    while frontier:
        node = frontier.pop()
        if hasattr(node, "sources") and node not in found:  # an operation: a parameter has none
            found.add(node)
            frontier.extend(node.sources or ())
    rows: list[LedgerRow] = []
    counted: set[int] = set()
    for op in sorted(found, key=lambda op: op.order):
        free = {id(_root(array)) for _, array, _ in op.leaves}
        kept = [a for a in op.saved if a is not None and hasattr(a, "shape") and id(_root(a)) not in free]
        new = {id(_root(a)): _root(a).size * a.dtype.itemsize for a in kept if id(_root(a)) not in counted}
        counted.update(new)
        listed = tuple((a.shape, a.dtype.name) for a in kept)
        rows.append(LedgerRow(name_of(op), op.shape, listed, sum(new.values()), op.kernel))
    return Ledger(tuple(rows), sum(row.nbytes for row in rows), any(getattr(op.xp, "tf32", False) for op in found))


def _root(array: Array) -> Array:
    return array if array.base is None else array.base
