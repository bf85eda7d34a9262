"""Making the `Graph` of a drawing: from the graph behind a tensor, or from all operations that a function applies."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy

from ..complaints import name_of
from ..engine import Op, ledger
from ..recording import watcher
from ..stored import Stored
from ..tensor import Parameter, Tensor
from .backwards import Arrived, operations
from .graph import Edge, Graph, Node
from .numbers import rows
from .words import plain

__all__ = ["Constant", "Known", "Step", "Trace", "graph_of", "kept_by", "steps_behind"]

Array = Any


class Constant:
    """An array that no gradient flows to, and that no operation of the drawing has made."""

    def __init__(self, array: Array) -> None:
        self.array = array


class Step(NamedTuple):
    """One operation: what its inputs are (an `Op`, a `Parameter`, a `Constant`, or else a text), and what came out."""

    op: Op
    inputs: Sequence[Any]
    shape: tuple[int, ...]
    dtype: str
    value: Array | None


def steps_behind(loss: Tensor) -> list[Step]:
    """The operations that the graph behind a tensor remembers. Of constants it has only the places."""
    return [Step(op, ["·" if source is None else source for source in op.sources or ()], op.shape, "", None)
            for op in operations(loss)]


class Trace:
    """All operations that are applied while it looks on, constants included."""

    def __init__(self) -> None:
        self.steps: dict[Op, Step] = {}
        self._makers: dict[int, Op] = {}  # by the identity of an output, which is held here
        self._held: list[Array] = []
        self._constants: dict[int, Constant] = {}
        self._open = False

    @contextmanager
    def looking(self) -> Iterator[None]:
        token, self._open = watcher.set(self._look), True
        try:
            yield
        finally:
            watcher.reset(token)
            self._open = False  # a part that is computed twice carries the watcher into its second pass

    def _look(self, op: Op, inputs: tuple[Any, ...], y: Array) -> None:
        if self._open:
            self.steps[op] = Step(op, [self.made(x) for x in inputs], tuple(y.shape), y.dtype.name, y)
            self._makers[id(y)] = op
            self._held.append(y)

    def made(self, x: Any) -> Any:
        """What stands for an input of an operation: who made it, or what leaf it is."""
        if isinstance(x, Tensor):
            if isinstance(x, Parameter):
                return x
            if x.node is not None:
                return x.node
            x = x.data
        if x is None or isinstance(x, (int, float, numpy.generic)):
            return "none" if x is None else f"{float(x):.4g}"
        if id(x) in self._makers:
            return self._makers[id(x)]
        return self._constants.setdefault(id(x), Constant(x))

    def steps_to(self, end: Any) -> list[Step]:
        """Those operations that had a part in an output, in their order."""
        needed, frontier = set(), [end]
        while frontier:
            op = frontier.pop()
            if isinstance(op, Op) and op in self.steps and op not in needed:
                needed.add(op)
                frontier.extend(self.steps[op].inputs)
        return [step for op, step in self.steps.items() if op in needed]


class Known(NamedTuple):
    """What is known of operations and leaves beside the steps.

    Attributes
    ----------
    names : dict of str
    chosen : set
        What has its name from the user, and not from a module.
    values : dict of array
    arrived : Arrived
    kept : dict of int
        Bytes for each operation that is recorded.
    """

    names: Mapping[Any, str]
    chosen: Set[Any]
    values: Mapping[Any, Array]
    arrived: Arrived
    kept: Mapping[Op, int]


def graph_of(steps: Sequence[Step], end: Any, known: Known, caption: str) -> Graph:
    """Put together what a drawing shows; `end` is drawn even if no step leads to it."""
    nodes: list[Node] = []
    edges: list[Edge] = []
    place: dict[Any, int] = {}
    made = {step.op for step in steps}
    uses = Counter(key for step in steps for key in step.inputs)
    counts: Counter[str] = Counter()

    def leaf(key: Any) -> None:
        if not isinstance(key, str) and key not in made and key not in place:
            place[key] = len(nodes)
            nodes.append(_leaf(key, known, counts, uses[key]))

    for step in steps:
        for key in step.inputs:
            leaf(key)
        parts = [known.arrived.parts.get((step.op, port), "") for port in range(len(step.inputs))]
        edges += [Edge(place[key], len(nodes), port, part)
                  for port, (key, part) in enumerate(zip(step.inputs, parts)) if not isinstance(key, str)]
        counts["#"] += 1
        labels = [key if isinstance(key, str) else nodes[place[key]].label for key in step.inputs]
        of_modules = {known.names[key] for key in step.inputs
                      if isinstance(key, Parameter) and key in known.names and key not in known.chosen}
        path, labels = _path(of_modules), _short(labels, of_modules)
        place[step.op] = len(nodes)
        nodes.append(_operation(step, known, f"#{counts['#']}", path, labels))
    leaf(end)
    return Graph(nodes, edges, caption)


def _operation(step: Step, known: Known, number: str, path: str, labels: Sequence[str]) -> Node:
    op = step.op
    value = known.values.get(op, step.value)
    gradient, norm = known.arrived.totals.get(op, ((), ""))
    return Node(known.names.get(op, number), "operation", plain(name_of(op)), path,
                tuple(labels), step.shape,
                step.dtype if value is None else value.dtype.name, known.kept.get(op), op.kernel,
                () if value is None else rows(value), gradient, norm)


def _leaf(key: Any, known: Known, counts: Counter[str], uses: int) -> Node:
    gradient, norm = known.arrived.totals.get(key, ((), ""))
    kind = ("earlier" if isinstance(key, Op) else "constant" if isinstance(key, Constant) else
            "parameter" if key.trainable else "frozen")
    name = known.names.get(key)
    if name is None:
        counts[kind] += 1
        name = f"{kind} {counts[kind]}"
    if isinstance(key, Op):
        return Node(name, kind, shape=key.shape, gradient=gradient, norm=norm)
    array = key.array if isinstance(key, Constant) else key.data
    return Node(name, kind, shape=tuple(array.shape), dtype=array.kind if isinstance(array, Stored) else array.dtype.name,
                value=rows(array), gradient=gradient, norm=norm,
                inside=uses == 1 and key not in known.chosen and (kind != "parameter" or key in known.names))


def _short(labels: Sequence[str], of_modules: Set[str]) -> list[str]:
    """What an operation calls its inputs: parameters of a module by the last part of their names, where that is enough."""
    ends = Counter(label.rpartition(".")[2] for label in labels)
    short = [label.rpartition(".")[2] if label in of_modules and ends[label.rpartition(".")[2]] == 1 else label
             for label in labels]
    while short and short[-1] == "none":
        short.pop()
    return short


def _path(names: Set[str]) -> str:
    """The module that all these parameters are in: "h.0.attn.c_attn" for its weight and bias; "" if there is none."""
    paths = [name.split(".")[:-1] for name in sorted(names)]
    return ".".join(parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths)))


def kept_by(loss: Tensor) -> dict[Op, int]:
    """Bytes that each operation behind a tensor keeps for backward."""
    return {op: row.nbytes for op, row in zip(operations(loss), ledger(loss).rows)}
