"""What a drawing shows, as plain text and numbers: no array and no operation is held by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

__all__ = ["Edge", "Graph", "Node", "shortened"]


@dataclass(frozen=True)
class Node:
    """One operation with its output, or one leaf.

    Attributes
    ----------
    label : str
        By what name other nodes call it.
    kind : {"operation", "parameter", "frozen", "constant", "earlier", "left out"}
        "earlier" is a value that was computed before the part that is drawn, "left out" stands for many operations.
    op : str
        The name of the operation, "" for a leaf.
    path : str
        The module whose parameters it reads, where that is one.
    arguments : tuple of str
        What the inputs of an operation are called; numbers as they are.
    shape : tuple of int
    dtype : str
    kept : int or None
        Bytes kept for backward. None where nothing is recorded.
    kernel : str
        What ran in the place of the reference, "" if that ran itself.
    value, gradient : tuple of str
        Small arrays in full, a line for each row.
    norm : str
        Of the gradient; "" if none comes here.
    inside : bool
        Of a leaf: whether it stands in the box of the one operation that uses it, and has no box of its own.

    Examples
    --------
    >>> import minilora
    >>> [(node.label, node.kind, node.gradient) for node in minilora.draw(lambda x: x * x, x=[3.0]).graph.nodes]
    [('x', 'parameter', ('6',)), ('#1', 'operation', ('1',))]
    >>> isinstance(minilora.draw(lambda x: x, x=[3.0]).graph.nodes[0], Node)
    True
    """

    label: str
    kind: str
    op: str = ""
    path: str = ""
    arguments: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    dtype: str = ""
    kept: int | None = None
    kernel: str = ""
    value: tuple[str, ...] = ()
    gradient: tuple[str, ...] = ()
    norm: str = ""
    inside: bool = False


class Edge(NamedTuple):
    """From the node that makes a value to one that uses it, as its input `port`; the norm of the gradient that comes back."""

    source: int
    target: int
    port: int
    norm: str


class Graph(NamedTuple):
    """Nodes, each after those that it uses, and edges, ordered by target and port."""

    nodes: Sequence[Node]
    edges: Sequence[Edge]
    caption: str


def shortened(graph: Graph, limit: int) -> Graph:
    """The first and the last operations of a graph, and one node for all between them, if there are more than `limit` nodes."""
    nodes = graph.nodes
    if len(nodes) <= limit:
        return graph
    head, tail = limit // 2, len(nodes) - (limit - limit // 2)
    count = sum(bool(node.op) for node in nodes[head:tail])
    label = "left out"
    between = Node(label, "left out", op=f"{count:,} more operations")
    place = {i: i if i < head else head if i < tail else i - tail + head + 1 for i in range(len(nodes))}
    edges: dict[tuple[int, int, int], Edge] = {}
    for edge in graph.edges:
        source, target = place[edge.source], place[edge.target]
        if target == head != source:  # many become one
            edges.setdefault((target, source, 0), Edge(source, target, len(edges), ""))
        elif target != head:
            edges[target, source, edge.port] = edge._replace(source=source, target=target)
    lost = {nodes[i].label for i in range(head, tail) if nodes[i].op}
    last = [replace(node, arguments=tuple("…" if name in lost else name for name in node.arguments)) for node in nodes[tail:]]
    return Graph([*nodes[:head], between, *last], sorted(edges.values(), key=lambda edge: edge[1:]), graph.caption)
