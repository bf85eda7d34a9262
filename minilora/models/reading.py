"""One call of a model: what a cache holds from before, and what stands in front of the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy

from .. import backend, ops
from ..errors import DTypeError, ShapeError
from ..nn.front import NO_PREFIX, NOTHING, Front, Fronted, Prefix
from ..ops.indices import beside
from ..ops.masks import truths
from ..tensor import Tensor
from .checks import check_positions
from .decoding.cache import Cache, LayerCache

__all__ = ["Reading", "reading"]

Array = Any


class Reading:
    """What a model needs to know in one call besides its ids. With nothing in front and no cache all is as it is given.

    Attributes
    ----------
    start : int
        The tokens that the cache holds.
    first : int
        The position of the first row that goes in, if it is the same for all texts.
    uneven : bool
        Whether it is not.
    key_padding : array or None, shape (..., S)
        For attention to all keys, but for those of prefixes.
    """

    def __init__(self, ids: Array, front: Front, cache: Cache | None, start: int, key_padding: Any) -> None:
        self.ids, self.front, self.cache, self.start, self.key_padding = ids, front, cache, start, key_padding
        self.rows = 0 if front.index is None else front.index.shape[-1]  # of the prompt
        self.uneven = not isinstance(front.offset, int)
        self.first = 0 if self.uneven else start + front.offset - self.rows
        self.gap = self.rows  # places in front of the keys that texts with a prefix do not use
        self.prefixes = front.prefixes

    def layer(self, i: int) -> LayerCache | None:
        """What layer `i` keeps its keys and values in; None without a cache."""
        return None if self.cache is None else self.cache.layer(i)

    def prefix(self, i: int) -> Prefix:
        """What stands before the keys of layer `i`."""
        return (tuple(p[2 * i:2 * i + 2] for p in self.prefixes), self.front.runs, self.gap) if self.prefixes else NO_PREFIX

    def embedded(self, x: Tensor) -> Tensor:
        """Embedded tokens (..., T, d), with the prompt before them. Prefixes take their dtype."""
        if self.front is NOTHING:
            return x
        self.prefixes = tuple(in_dtype(p, x.dtype) for p in self.prefixes)
        if self.front.prompt is None or not self.rows:
            return x
        index = numpy.ascontiguousarray(numpy.broadcast_to(self.front.index, (*x.shape[:-2], self.rows)))
        index = kept_there(index, x.device)
        return ops.concatenate([ops.embedding(index, in_dtype(self.front.prompt, x.dtype)), x], axis=-2)

    def tokens(self, h: Tensor) -> Tensor:
        """Without the rows of the prompt."""
        return h[..., self.rows:, :] if self.rows else h

    def positions(self, position_ids: Any, limit: int, setting: str) -> Array:
        """Where the rows that go in stand: the prompt's, from 0 on, and those of the tokens behind what is in front of them."""
        offset = self.front.offset
        most = offset if not self.uneven else int(offset.max(initial=0))
        if most:
            setting = f"{setting} less {most} that are taken by what stands in front"
        return self.after(check_positions(self.ids, position_ids, limit - most, setting, self.start))

    def after(self, own: Array, first: int = 0) -> Array:
        """The positions of tokens as those of all rows; `first` is where a model begins to count."""
        if self.front is NOTHING:
            return own
        offset = self.front.offset if not self.uneven else beside(own, kept_there(self.front.offset, backend.device_of(own)))
        return self.with_prompt(own + offset, first + (self.front.offset - self.rows + numpy.arange(self.rows)).clip(0))

    def with_prompt(self, own: Array, before: Array) -> Array:
        """Something of each token, (..., T), with that of the prompt's rows, (n,) or (B, n), before it."""
        if not self.rows:
            return own
        lead = numpy.broadcast_shapes(own.shape[:-1], before.shape[:-1])
        xp = backend.device_of(own).xp
        before = beside(own, kept_there(before, backend.device_of(own)))
        parts = [xp.broadcast_to(a, (*lead, a.shape[-1])) for a in (before.astype(own.dtype), own)]
        return xp.concatenate(parts, axis=-1)


def kept_there(places: Array, device: backend.Device) -> Array:
    """Places that follow from what stands in front: while a step is recorded on a device as a constant of it."""
    return backend.constant(places, device) if device.recorded else places


def in_dtype(x: Tensor, dtype: Any) -> Tensor:
    return x if x.dtype == dtype else ops.cast(x, dtype)


@contextmanager
def reading(cache: Cache | None, model: Fronted, ids: Array, key_padding: Any) -> Iterator[Reading]:
    """The context in which a model computes: the new tokens count at its end, if nothing has failed.

    Raises
    ------
    GraphError
        If gradients are recorded.
    StateError
        If the cache is another model's.
    ShapeError
        If the batch is another, or key_padding does not fit.
    DTypeError
        If `cache` is no Cache.
    """
    if cache is not None and not isinstance(cache, Cache):
        raise DTypeError(f"expected a minilora.models.Cache, got {type(cache).__name__}")
    front = NOTHING if model.front is None else model.front(ids.shape[:-1], cache is None or not cache.length)
    now = Reading(ids, front, cache, 0, key_padding)
    if now.rows and (key_padding is not None or front.seen is not None):
        padding = numpy.ones(ids.shape, bool) if key_padding is None else truths(key_padding)
        if padding.shape != ids.shape:
            raise ShapeError(f"expected key_padding of the shape of the ids, {ids.shape}, got {padding.shape}")
        now.key_padding = now.with_prompt(padding, numpy.ones(now.rows, bool) if front.seen is None else front.seen)
    if cache is None:
        yield now
        return
    shape = (*ids.shape[:-1], now.rows + ids.shape[-1])
    now.start, padding, now.key_padding = cache.begin(model, shape, now.key_padding, now.rows)
    now.first, now.gap = now.first + now.start, cache.front
    yield now
    cache.end(padding, shape[-1])
