"""A drawing as plain text, for a terminal of 80 columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from .graph import Graph, Node
from .rails import rails
from .words import broken, columns, plain, shape_text

__all__ = ["text"]

WIDTH = 80


def text(graph: Graph) -> str:
    """Lines from the top to the bottom: what is given, and what is made of it."""
    nodes = graph.nodes
    operations = [i for i, node in enumerate(nodes) if node.op]
    drawn = rails(operations, [edge[:2] for edge in graph.edges if nodes[edge.source].op]) or {}
    uses = Counter(edge.source for edge in graph.edges)
    back: dict[int, list[str]] = {}
    for edge in graph.edges:
        target = nodes[edge.target]
        if edge.norm and (nodes[edge.source].op or uses[edge.source] > 1):  # else the leaf itself says it
            name = target.arguments[edge.port] if edge.port < len(target.arguments) else nodes[edge.source].label
            back.setdefault(edge.target, []).append(f"{plain(name, 24)} {edge.norm}")
    gutter = max((len(part) + 1 for before, own, _ in drawn.values() for part in (*before, own)), default=0)
    lines, after = [], ""
    for i, node in enumerate(nodes):
        own = after
        if node.op:
            before, own, after = drawn.get(i, ([], "", ""))
            lines += before
        head, *more = _block(node, WIDTH - gutter, back.get(i, []))
        lines += [f"{own:<{gutter}}{head}", *(f"{after:<{gutter}}{line}" for line in more)]
    return "\n".join(line.rstrip() for line in (*lines, "", *_legend(graph, bool(back))))


def _block(node: Node, wide: int, back: list[str]) -> Iterator[str]:
    label = plain(node.label)
    made = f"{node.op}({', '.join(plain(name, 24) for name in node.arguments)})" if node.arguments else node.op
    if node.kind == "left out":
        yield f"... {node.op} ..."
        return
    title = f"{label} = {made}" if node.op else f"○ {label}"
    note = f"by {node.kernel}" if node.kernel else ""
    last = f"keeps {node.kept:,} B" if node.kept is not None else (
        f"‖grad‖ {node.norm}" if node.norm and not node.gradient and not node.op else "")
    facts = f"{note}  {shape_text(node.shape)}{last:>17}"
    if not node.op and not label.startswith(node.kind) and columns(f"{title}: {node.kind}{facts}") < wide:
        title += f": {node.kind}"
    if columns(title) + len(facts) + 1 > wide:
        yield broken(title, wide)
        title = ""
    yield title + " " * (wide - columns(title) - len(facts)) + facts
    line = "  ↑"
    for part in back:
        if columns(line) + columns(part) + 2 > wide:
            yield line
            line = "   "
        line += f"  {part}"
    if back:
        yield line
    yield from _numbers(node, wide)


def _numbers(node: Node, wide: int) -> Iterator[str]:
    """The value, and beside it the gradient, or below it where both do not fit."""
    gradient = node.gradient
    left = 2 + len("value ") + max(map(columns, node.value), default=0) if node.value else 0
    if left and gradient and left + 4 + len("grad ") + max(map(columns, gradient)) > wide:
        for rows, word in ((node.value, "value"), (gradient, "grad ")):
            yield from (f"  {word if k == 0 else '     '} {row}" for k, row in enumerate(rows))
        return
    for k in range(max(len(node.value), len(gradient))):
        line = f"  {'value' if k == 0 else '     '} {node.value[k]}" if k < len(node.value) else ""
        if k < len(gradient):
            line += " " * (left + 4 - columns(line) if left else 2) + f"{'grad' if k == 0 else '    '} {gradient[k]}"
        yield line


def _legend(graph: Graph, arrows: bool) -> Iterator[str]:
    if graph.caption:
        yield f"grad: the gradient of {graph.caption.format(plain(graph.nodes[-1].label))}"
    if arrows:
        yield "↑: the norm of the gradient that goes back to each input"
    if any(node.kept is not None for node in graph.nodes):
        yield "keeps: bytes held until backward"
    if any("·" in node.arguments for node in graph.nodes):
        yield "·: a constant, which the graph does not remember"
