"""A drawing as SVG: one text without script, style sheet, or anything from elsewhere. It lies on a ground of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from .graph import Edge, Graph, Node
from .layout import Box, Layout, Line, arranged
from .words import columns, plain, shape_text

__all__ = ["svg"]

FONT = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace"
LETTER = 0.602  # width of a letter of that kind, as a part of its size
HEAD, SMALL, NUMBER, LABEL = 13.0, 11.0, 12.0, 10.5  # sizes of letters
STEP, PAD, EDGE = 16.0, 9.0, 20.0  # between lines of text, inside boxes, around the drawing
# ground and rim by kind: blue for what is computed, orange for what is trained, grey for what stands still
COLOURS = {"operation": ("#eaf2fb", "#2b6cb0"), "parameter": ("#fff3dc", "#b7791f"), "left out": ("#ffffff", "#8a8a8a")}
STILL = "#f2f2f2", "#8a8a8a"
ARROW = "↓"  # in the head of a box, an input that an arrow brings
INK, FAINT, BACK = "#1a202c", "#4a5568", "#b0350b"  # text, small text, gradients


Piece = tuple[float, float, str, float, str, bool]  # x, y, text, size, colour, bold


def svg(graph: Graph) -> str:
    """The whole picture; the same graph gives the same bytes."""
    boxed = [i for i, node in enumerate(graph.nodes) if not node.inside]
    place = {i: k for k, i in enumerate(boxed)}
    edges = [edge._replace(source=place[edge.source], target=place[edge.target])
             for edge in graph.edges if edge.source in place]
    inside: dict[int, list[tuple[str, Node]]] = {}
    for edge in graph.edges:
        if edge.source not in place:
            leaf, target = graph.nodes[edge.source], graph.nodes[edge.target]
            name = target.arguments[edge.port] if edge.port < len(target.arguments) else leaf.label
            inside.setdefault(edge.target, []).append((name, leaf))
    arriving: dict[int, list[str]] = {}
    for edge in edges:
        arriving.setdefault(edge.target, []).append(edge.norm)
    entered = {(edge.target, edge.port): ARROW if edge.source in place else "·" for edge in graph.edges}
    nodes = [_numbered(graph.nodes[i], i, entered) for i in boxed]
    blocks = [_block(node, inside.get(i, []), arriving.get(k, [])) for k, (i, node) in enumerate(zip(boxed, nodes))]
    layout = arranged([block[:2] for block in blocks], [edge[:2] for edge in edges], [not graph.nodes[i].op for i in boxed])
    legend = list(_legend(graph, any(ARROW in node.op for node in nodes)))
    width = max(layout.width, 160.0, *(columns(line) * SMALL * LETTER for line, _ in legend))
    height = layout.height + (len(legend) * STEP + 14 if legend else 0)
    whole = f"{width + 2 * EDGE:.0f}", f"{height + 2 * EDGE:.0f}"
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{whole[0]}" height="{whole[1]}" '
             f'viewBox="0 0 {whole[0]} {whole[1]}" role="img" font-family="{FONT}">',
             f"<title>{_escaped(_title(graph))}</title>",
             '<rect width="100%" height="100%" rx="8" fill="#ffffff"/>',
             f'<g transform="translate({EDGE + (width - layout.width) / 2:.1f} {EDGE:.1f})">', *_lines(edges, layout)]
    for i, box, (_, _, pieces) in zip(boxed, layout.boxes, blocks):
        parts += _box(graph.nodes[i], box, pieces)
    parts.append("</g>")
    parts += [_text(EDGE, EDGE + layout.height + 24 + k * STEP, line, SMALL, colour) for k, (line, colour) in enumerate(legend)]
    return "\n".join([*parts, "</svg>", ""])


def _numbered(node: Node, i: int, entered: Mapping[tuple[int, int], str]) -> Node:
    """The node; of an operation with numbers among its inputs, to which no arrow leads, the name says them."""
    called = [entered.get((i, port), name) for port, name in enumerate(node.arguments)]
    if set(called) <= {ARROW, "·", "none"}:
        return node
    return replace(node, op=f"{node.op}({', '.join(called)})")


def _unnamed(node: Node) -> bool:
    return bool(node.op) and node.label[:1] == "#" and node.label[1:].isdecimal()


def _title(graph: Graph) -> str:
    count = sum(bool(node.op) for node in graph.nodes)
    return f"A graph of {count} operation{'' if count == 1 else 's'}, with gradients" if graph.caption else (
        f"A graph of {count} operation{'' if count == 1 else 's'}")


def _block(node: Node, inside: Sequence[tuple[str, Node]], arriving: Sequence[str]) -> tuple[float, float, list[Piece]]:
    """Width, height and pieces of text of a node's box; `inside` are leaves that stand in it, with their names."""
    pieces: list[Piece] = []
    y = PAD + HEAD - 2
    label = "" if _unnamed(node) or node.kind == "left out" else plain(node.label)
    pieces.append((PAD, y, " = ".join(filter(None, (label, node.op))), HEAD, INK, True))
    for line, colour in _facts(node, inside):
        y += STEP
        pieces.append((PAD, y, line, SMALL, colour, False))
    sides = [("value", node.value, INK)] if node.value else []
    if node.norm:
        sides.append(("grad" if node.gradient else f"‖grad‖ {node.norm}", node.gradient, BACK))
    x, top = PAD, y + STEP + 2
    for word, rows, colour in sides:
        pieces.append((x, top, word, SMALL, colour, False))
        pieces += [(x, top + k * STEP, row, NUMBER, colour, False) for k, row in enumerate(rows, 1)]
        y = max(y, top + len(rows) * STEP)
        x += max(columns(word) * SMALL, *(columns(row) * NUMBER for row in rows), 0.0) * LETTER + 18
    width = max(x + columns(line) * size * LETTER * (1.02 if bold else 1.0) for x, _, line, size, _, bold in pieces) + PAD
    beside = max(map(len, arriving), default=0) * LABEL * LETTER + 12  # room for the numbers at the arrows
    return round(max(width, beside * (len(arriving) + 1)), 1), round(y + PAD, 1), pieces


def _facts(node: Node, inside: Sequence[tuple[str, Node]]) -> Iterator[tuple[str, str]]:
    """Small lines below the head of a box."""
    if node.kind != "left out":
        kind = "" if node.op or node.label.startswith(node.kind) else node.kind
        yield " ".join(filter(None, (kind, shape_text(node.shape), f"keeps {node.kept:,} B" if node.kept else ""))), FAINT
    for line in (f"in {node.path}" if node.path else "", f"by {node.kernel}" if node.kernel else ""):
        if line:
            yield plain(line, 44), FAINT
    for name, leaf in inside:
        norm = f" ‖grad‖ {leaf.norm}" if leaf.norm else ""
        yield f"· {plain(name)} {shape_text(leaf.shape)}{norm}", BACK if norm else FAINT


def _box(node: Node, box: Box, pieces: Sequence[Piece]) -> Iterator[str]:
    ground, rim = COLOURS.get(node.kind, STILL)
    dashes = "" if node.kind in ("operation", "parameter") else ' stroke-dasharray="4 3"'
    yield (f'<rect class="node" x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" rx="5" fill="{ground}" '
           f'stroke="{rim}" stroke-width="1.2"{dashes}/>')
    for x, y, line, size, colour, bold in pieces:
        yield _text(box.x + x, box.y + y, line, size, colour, bold)


def _lines(edges: Sequence[Edge], layout: Layout) -> Iterator[str]:
    for edge, line in zip(edges, layout.lines):
        yield _line(edge, line)
    for edge, line in zip(edges, layout.lines):
        x, y = line.points[-1]
        yield f'<path d="M{x - 3.5:.1f} {y - 7:.1f}L{x:.1f} {y:.1f}L{x + 3.5:.1f} {y - 7:.1f}Z" fill="#718096"/>'
        if edge.norm:
            yield _text(x + 6, y - 7, edge.norm, LABEL, BACK)


def _line(edge: Edge, line: Line) -> str:
    (x, y), *rest = line.points
    path = f"M{x:.1f} {y:.1f}"
    for a, b in rest:
        if a == x:
            path += f"V{b:.1f}"
        else:
            middle = (y + b) / 2
            path += f"C{x:.1f} {middle:.1f} {a:.1f} {middle:.1f} {a:.1f} {b:.1f}"
        x, y = a, b
    still = "" if edge.norm else ' stroke-dasharray="3 3"'
    return f'<path class="edge" d="{path}" fill="none" stroke="#718096" stroke-width="1.2"{still}/>'


def _legend(graph: Graph, brought: bool) -> Iterator[tuple[str, str]]:
    if graph.caption:
        end = graph.nodes[-1]
        yield f"grad: the gradient of {graph.caption.format(plain(end.op if _unnamed(end) else end.label))}", BACK
        yield "number at an arrow: the norm of the gradient that goes back along it", BACK
    if any(edge.norm == "" for edge in graph.edges):
        yield "dashed: no gradient goes there", FAINT
    if brought:
        yield f"{ARROW}: what the arrow brings", FAINT


def _text(x: float, y: float, line: str, size: float, colour: str, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{colour}"{weight} xml:space="preserve">'
            f"{_escaped(line)}</text>")


def _escaped(line: str) -> str:
    for letter, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;"), ("'", "&#39;")):
        line = line.replace(letter, entity)
    return line
