"""Where boxes and lines lie: a layered drawing, from the top to the bottom.

Four steps, each in about linear time. A node lies one layer below the lowest of what it uses, and a leaf right above the first
that uses it. A line that passes layers has a place of its own in each of them, so that no line runs through a box; all lines
from one node share these places. Within the layers the order is that of the neighbours' mean positions, a few times down and
up, and the best order is kept. Then each layer moves as near to its neighbours as the distances allow: a problem of least
squares with an order, which is solved exactly by joining those that collide.
Sources: Sugiyama, Tagawa and Toda 1981, doi 10.1109/TSMC.1981.4308636; Barlow et al. 1972 for the order.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Box", "Layout", "Line", "arranged"]

APART, BETWEEN, PASSAGE = 26.0, 58.0, 14.0  # between boxes of a layer, between layers, width of a passing line
ROUNDS = 8
STRONG, WEAK = 1.0, 0.1  # pulls: a chain of boxes stands upright, a long line is straight, and leaves and ends of lines follow

Point = tuple[float, float]


class Box(NamedTuple):
    x: float
    y: float
    width: float
    height: float


class Line(NamedTuple):
    """A line from the bottom of one box to the top of another.

    Attributes
    ----------
    ends : (int, int)
        Of the nodes.
    points : list of (float, float)
        Its last piece is vertical: there is room for a number beside it.
    """

    ends: tuple[int, int]
    points: list[Point]


class Layout(NamedTuple):
    boxes: list[Box]
    lines: list[Line]
    width: float
    height: float


class _Place:
    """A node, or a place where lines from a node pass a layer."""

    def __init__(self, layer: int, width: float, node: int | None, kind: str) -> None:
        self.layer, self.width, self.node, self.kind = layer, width, node, kind
        self.above: list[_Place] = []
        self.below: list[_Place] = []
        self.rank, self.x = 0, 0.0


def arranged(sizes: Sequence[tuple[float, float]], edges: Sequence[tuple[int, int]], leaves: Sequence[bool]) -> Layout:
    """Arrange boxes of given widths and heights; edges go from earlier boxes to later ones.

    Parameters
    ----------
    sizes : sequence of (float, float)
    edges : sequence of (int, int)
    leaves : sequence of bool
        Which boxes are moved down to what uses them.

    Returns
    -------
    Layout
        Lines in the order of the edges.

    Examples
    --------
    >>> layout = arranged([(50.0, 20.0), (50.0, 20.0), (80.0, 20.0)], [(0, 2), (1, 2)], [True, True, False])
    >>> [(box.x, box.y) for box in layout.boxes], layout.width
    ([(0.0, 0.0), (76.0, 0.0), (23.0, 78.0)], 126.0)
    """
    layer = _layers(len(sizes), edges, leaves)
    places = [_Place(layer[i], width, i, "leaf" if leaves[i] else "box") for i, (width, _) in enumerate(sizes)]
    passing = _passages(places, edges)
    rows: list[list[_Place]] = [[] for _ in range(max(layer, default=-1) + 1)]
    for place in (*places, *(p for chain in passing.values() for p in chain)):
        rows[place.layer].append(place)
    _order(rows)
    _move(rows)
    return _drawn(sizes, edges, places, passing, rows)


def _layers(count: int, edges: Sequence[tuple[int, int]], leaves: Sequence[bool]) -> list[int]:
    layer = [0] * count
    first = [count] * count
    for source, target in sorted(edges, key=lambda edge: edge[1]):
        layer[target] = max(layer[target], layer[source] + 1)
    for source, target in edges:
        first[source] = min(first[source], layer[target] - 1)
    return [first[i] if leaves[i] and first[i] < count else layer[i] for i in range(count)]


def _passages(places: list[_Place], edges: Sequence[tuple[int, int]]) -> dict[int, list[_Place]]:
    """For each node the places where its lines pass layers, from above to below; and who is whose neighbour."""
    lowest: dict[int, int] = {}
    for source, target in edges:
        lowest[source] = max(lowest.get(source, 0), places[target].layer)
    passing = {source: [_Place(i, PASSAGE, None, "line") for i in range(places[source].layer + 1, low)]
               for source, low in lowest.items()}
    for source, chain in passing.items():
        for one, other in zip([places[source], *chain], chain):
            one.below.append(other)
            other.above.append(one)
    for source, target in edges:
        before = places[target].layer - places[source].layer - 1
        one = passing[source][before - 1] if before else places[source]
        one.below.append(places[target])
        places[target].above.append(one)
    return passing


def _order(rows: list[list[_Place]]) -> None:
    """Cut crossings: sort by the mean rank of the neighbours above, then below, as often as it helps."""
    def ranked() -> None:
        for row in rows:
            for rank, place in enumerate(row):
                place.rank = rank

    def mean(place: _Place, up: bool) -> float:
        neighbours = place.above if up else place.below
        return sum(p.rank for p in neighbours) / len(neighbours) if neighbours else place.rank

    ranked()
    best, kept = _crossings(rows), [list(row) for row in rows]
    for i in range(ROUNDS):
        up = i % 2 == 0
        for row in rows if up else reversed(rows):
            row.sort(key=lambda place: mean(place, up))
            for rank, place in enumerate(row):
                place.rank = rank
        if (now := _crossings(rows)) < best:
            best, kept = now, [list(row) for row in rows]
    rows[:] = kept
    ranked()


def _crossings(rows: list[list[_Place]]) -> int:
    count = 0
    for row in rows:
        seen: list[int] = []  # ranks below, of lines that start further left
        for place in row:
            ranks = sorted(p.rank for p in place.below)
            count += sum(len(seen) - bisect_right(seen, rank) for rank in ranks)
            for rank in ranks:
                insort(seen, rank)
    return count


def _move(rows: list[list[_Place]]) -> None:
    for row in rows:
        x = 0.0
        for place in row:
            place.x, x = x + place.width / 2, x + place.width + APART
    for i in range(2 * ROUNDS + 1):
        last = i == 2 * ROUNDS
        for row in reversed(rows) if i % 2 else rows:
            pulled = [_pull(place, (place.below if i % 2 else place.above) if not last else ()) for place in row]
            _settle(row, [x for x, _ in pulled], [weight for _, weight in pulled])


def _pull(place: _Place, near: Sequence[_Place]) -> tuple[float, float]:
    """Where a place wants to be, and how much: the middle of its neighbours, as a median, which a weak one does not move."""
    near = near or [*place.above, *place.below]
    pulls = sorted((p.x, STRONG if p.kind == place.kind != "leaf" else WEAK) for p in near)
    weight, passed = sum(pull for _, pull in pulls), 0.0
    for k, (x, pull) in enumerate(pulls):
        passed += pull
        if passed > 0.501 * weight:
            return x, weight
        if passed > 0.499 * weight:
            return (x + pulls[k + 1][0]) / 2, weight
    return place.x, WEAK


def _settle(row: list[_Place], wanted: list[float], weights: list[float]) -> None:
    """The positions nearest to those wanted in which nobody overlaps: who collides forms a group, which moves together."""
    groups: list[list[float]] = []  # position of the first, weight, how many
    offsets, offset = [], 0.0
    for i, place in enumerate(row):
        if i:
            offset += (row[i - 1].width + place.width) / 2 + APART
        offsets.append(offset)
        group = [wanted[i] - offset, weights[i], 1]
        while groups and groups[-1][0] > group[0]:
            x, weight, count = groups.pop()
            together = weight + group[1]
            group = [(x * weight + group[0] * group[1]) / together, together, count + group[2]]
        groups.append(group)
    i = 0
    for x, _, count in groups:
        for i in range(i, i + int(count)):
            row[i].x = x + offsets[i]
        i += 1


def _drawn(sizes: Sequence[tuple[float, float]], edges: Sequence[tuple[int, int]], places: list[_Place],
           passing: dict[int, list[_Place]], rows: list[list[_Place]]) -> Layout:
    left = min((p.x - p.width / 2 for row in rows for p in row), default=0.0)
    tops, y = [], 0.0
    for row in rows:
        tops.append(y)
        y += max(sizes[p.node][1] for p in row if p.node is not None) + BETWEEN
    boxes = [Box(round(p.x - width / 2 - left, 1), round(tops[p.layer], 1), width, height)
             for p, (width, height) in zip(places, sizes)]
    entries: dict[int, list[tuple[float, int]]] = {}
    paths: list[list[Point]] = []
    for i, (source, target) in enumerate(edges):
        box = boxes[source]
        middle, floor = round(box.x + box.width / 2, 1), round(tops[places[source].layer + 1] - BETWEEN, 1)
        points = [(middle, round(box.y + box.height, 1)), (middle, floor)]  # past higher boxes of the layer
        for p in passing[source][:places[target].layer - places[source].layer - 1]:
            x = round(p.x - left, 1)
            if points[-1][0] == x == points[-2][0]:
                points.pop()  # straight on
            else:
                points.append((x, round(tops[p.layer], 1)))
            points.append((x, round(tops[p.layer + 1] - BETWEEN, 1)))
        paths.append(points)
        entries.setdefault(target, []).append((points[-1][0], i))
    for target, arriving in entries.items():  # from left to right, so that lines do not cross in front of a box
        box = boxes[target]
        for k, (_, i) in enumerate(sorted(arriving), 1):
            x = round(box.x + box.width * k / (len(arriving) + 1), 1)
            paths[i] += [(x, box.y - 22), (x, box.y)]
    width = max((p.x + p.width / 2 - left for row in rows for p in row), default=0.0)
    return Layout(boxes, [Line(edge, points) for edge, points in zip(edges, paths)], round(width, 1),
                  round(max(y - BETWEEN, 0.0), 1))
