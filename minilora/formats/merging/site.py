"""One tensor that merging changes: by which updates, or by what in its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy

from ...errors import FormatError
from ...lora.layers.base import AdaptedLayer
from ...lora.layers.update import update_of
from ...lora.merging.arithmetic import Factored, Rows
from ...lora.merging.arithmetic import Update as Factors
from ...stored import Stored
from ..adapters.saved import SavedAdapter, TokenRows
from ..placing.fingerprint import exact_scalings
from ..placing.fitting import STARTS, adapter_for
from ..tensors.reading import StateFile
from .layers import layer_of
from .rows import Kept, Placed, Whole

__all__ = ["Given", "Site", "as_matrix", "wide_name"]

Array = Any


@dataclass(frozen=True)
class Given:
    """An adapter, its weight in the sum, and what it is called in messages. The scalings are exact to the last bit."""

    label: str
    weight: float
    saved: SavedAdapter
    scalings: Mapping[str, float] = field(init=False)

    def __post_init__(self) -> None:
        s = {path: update.s for path, update in self.saved.updates.items()}
        object.__setattr__(self, "scalings", exact_scalings(self.saved.metadata, s))


class Part(NamedTuple):
    """The update that one adapter has for the tensor: the adapter, and the path in its file."""

    given: Given
    path: str


@dataclass
class Site:
    """What becomes of one tensor.

    Attributes
    ----------
    name : str
        In what is written.
    source : str or None
        The tensor of the base that it comes from; None for a tensor that the base does not have.
    parts : list of Part
    turned : bool
        The weight is stored as (in, out).
    whole : array or None
        What takes its place.
    tokens : TokenRows or None
        The rows that take the place of some.
    """

    name: str
    source: str | None
    parts: list[Part] = field(default_factory=list)
    turned: bool = False
    whole: Array | None = None
    tokens: TokenRows | None = None

    def layer(self, state: StateFile, bias: Array | None = None, fits_only: bool = False) -> AdaptedLayer:
        """The LoRA layer with all updates, active with their weights.

        Parameters
        ----------
        state : StateFile
        bias : array, optional
        fits_only : bool
            For checks: without the start of an adapter that is computed from the weight.

        Raises
        ------
        FormatError, DTypeError
            If an update does not fit.
        """
        assert self.source is not None
        layer = layer_of(state[self.source], self._update(self.parts[0]), self.turned, bias)
        rng = numpy.random.default_rng(0)
        for i, part in enumerate(self.parts):
            update = dataclasses.replace(self._update(part), s=part.given.scalings[part.path])
            config = part.given.saved.config
            if fits_only and config.init_lora_weights in STARTS:
                config = dataclasses.replace(config, init_lora_weights=True)
            try:
                _, adapter = adapter_for(layer, update, config, rng, part.path)
            except FormatError as error:
                raise FormatError(f"{part.path} of {part.given.label}: {error}") from None
            layer.attach(f"a{i}", adapter)
            layer.active[f"a{i}"] = part.given.weight
        return layer

    @staticmethod
    def _update(part: Part) -> Any:
        return part.given.saved.updates[part.path]

    def factors(self, state: StateFile) -> Factors | None:
        """The sum of the updates as factors of the stored matrix; None if there are none."""
        return update_of(self.layer(state)) if self.parts else None

    def rows(self, shape: tuple[int, int], wide: str, factors: Factors | None) -> Rows:
        """What `merged_blocks` computes with."""
        if factors is not None:
            return Factored(factors.A, factors.B, factors.s, shape, wide, factors.kappa)
        if self.tokens is not None:
            return Placed(self.tokens.indices, self.tokens.rows)
        return Kept() if self.whole is None else Whole(as_matrix(self.whole))

    def numbers(self) -> int:
        """How many numbers the factors of the updates have."""
        return sum(int(u.A.size + u.B.size) for u in map(self._update, self.parts))


def as_matrix(array: Array) -> Array:
    """An array as rows of its first axis: a view. One with fewer axes has rows of one number."""
    if isinstance(array, Stored):
        return array
    if array.ndim < 2:
        return array.reshape(-1, 1)
    return array.reshape(array.shape[0], int(numpy.prod(array.shape[1:], dtype="int64")))


def wide_name(*dtypes: Any) -> str:
    """The dtype to compute in for these: float64 if one of them is that."""
    return "float64" if any(numpy.dtype(dtype) == numpy.float64 for dtype in dtypes) else "float32"
