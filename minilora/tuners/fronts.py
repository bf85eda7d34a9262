"""Fronts: all prefixes and prompts of one model by name, of which one is active, or each row of a batch has its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy

from .. import ops
from ..nn.by_row import ByRow, rows_of
from ..nn.front import NOTHING, Front
from ..tensor import Parameter
from .virtual import Prefix, Prompt, Virtual

__all__ = ["Fronts"]

Array = Any


class Held:
    """Parameters of other modules, seen from one that does not own them: no state dict and no optimizer finds them here."""

    __slots__ = ("parameters",)

    def __init__(self, parameters: tuple[Parameter, ...]) -> None:
        self.parameters = parameters


class Fronts(ByRow):
    """What a `Fronted` model has in its attribute `front`.

    Attributes
    ----------
    own : dict of str to Prefix or Prompt
    active : str or None
        The one that stands in front of every text, where no context gives each row its own.
    heads : dict of str to Held
        The parameters of the model that are trained with each.
    """

    def __init__(self) -> None:
        self.own: dict[str, Virtual] = {}
        self.active: str | None = None
        self.heads: dict[str, Held] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.own)

    def parts(self, name: str) -> Iterator[Parameter]:
        """All that is trained under a name."""
        yield from self.own[name].parameters()
        yield from self.heads[name].parameters

    def trained_apart(self) -> list[Parameter]:
        return [p for name in self.own for p in self.parts(name) if p.trainable and name == self.active]

    def in_use(self) -> dict[str, Array]:
        """The names in use, and the rows of each: here and now, None for all."""
        rows = rows_of(self)
        if rows is None:
            return {} if self.active is None else {self.active: None}
        return {name: places for name, places in rows.places.items() if name in self.own}

    def longest(self) -> int:
        return max((self.own[name].N for name in self.in_use()), default=0)

    def forward(self, lead: tuple[int, ...], first: bool) -> Front:
        """What stands in front of texts of these leading axes; the prompt only where they begin."""
        used, rows = self.in_use(), rows_of(self)
        if rows is not None and rows.names:
            return self._mixed(used, len(rows.names), lead, first)
        if used:
            (name,) = used
            one = self.own[name]
            if isinstance(one, Prompt):
                return Front(one.N, prompt=one.embedding, index=numpy.arange(one.N)) if first else Front(one.N)
            assert isinstance(one, Prefix)
            return Front(one.N, (one.by_layers(),))
        return NOTHING

    def _mixed(self, used: dict[str, Array], count: int, lead: tuple[int, ...], first: bool) -> Front:
        """Each row with its own."""
        from ..errors import ShapeError

        if len(lead) != 1 or lead[0] != count:
            raise ShapeError(f"adapter_names has {count} names, but the ids have the leading axes {lead}: give one name for "
                             "each row of a batch (B, T)")
        if not used:
            return NOTHING
        offset = numpy.zeros((count, 1), "int64")
        for name, places in used.items():
            offset[places] = self.own[name].N
        prefixes = {name: one for name in used if isinstance(one := self.own[name], Prefix)}
        runs = [run for i, name in enumerate(prefixes) for run in runs_of(used[name], i)]
        found = Front(offset, tuple(one.by_layers() for one in prefixes.values()), runs)
        prompts = {name: one for name in used if isinstance(one := self.own[name], Prompt)} if first else {}
        if not prompts:
            return found
        n = max(one.N for one in prompts.values())
        index, seen, before = numpy.zeros((count, n), "int64"), numpy.zeros((count, n), bool), 0
        for name, one in prompts.items():
            index[used[name], n - one.N:] = numpy.arange(before, before + one.N)
            seen[used[name], n - one.N:] = True
            before += one.N
        table = ops.concatenate([one.embedding for one in prompts.values()])
        return found._replace(prompt=table, index=index, seen=None if seen.all() else seen)


def runs_of(places: Array, which: int) -> list[tuple[slice, int]]:
    """Rows in rising order as slices of such that follow each other."""
    cuts = numpy.flatnonzero(numpy.diff(places) > 1) + 1
    return [(slice(int(part[0]), int(part[-1]) + 1), which) for part in numpy.split(places, cuts)]
