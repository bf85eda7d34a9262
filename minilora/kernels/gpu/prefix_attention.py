"""GPU: attention to a prefix and to a text's own keys, by the kernels of gpu_attention.

The reference attends to each set of keys by itself and joins the results in a dozen passes, because that needs no array with
the prefix in it for every text. Here the keys of both sets are brought together, (B, KV, N + S, hd), which have to be put in
order anyway: then it is one attention, with as many launches as without a prefix and two more. The last query and the last key
stand at the same place, so that causality lets every query see the N keys in front. Nothing of this is kept: backward brings
them together again, and the gradient of the prefix is the sum over the texts of what its keys and values got.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

from ...backend import override
from ...ops.masks import combine_masks
from ...ops.prefix_attention import PackedPrefixAttention, PrefixAttention, Run, _WithPrefixes
from ..launch import has_kernel
from .attention import Fused

__all__ = ["FusedPackedPrefixAttention", "FusedPrefixAttention"]

Array = Any


class _Together(Fused, _WithPrefixes):
    """Attention to both sets of keys, run by run: texts with the same prefix, or with none, at once."""

    def attend_both(self, q: Array, k: Array, v: Array, y: Array, prefixes: Sequence[Array]) -> tuple[Array, Array]:
        if not has_kernel(q):
            return super().attend_both(q, k, v, y, prefixes)
        found = []
        for texts, which in spans(self.runs, len(q)):
            keys, values = k[texts], v[texts]
            part = self.for_texts(q, k, texts, 0 if which is None else prefixes[which].shape[-2])
            if which is not None:
                keys, values = together(self.xp, keys, values, prefixes[which])
            found.append(part.attend(q[texts], keys, values, y[texts]))
        m, n = found[0] if len(found) == 1 else (self.xp.concatenate(parts, axis=0) for parts in zip(*found))
        return m, n

    def differentiate_both(self, dy: Array, q: Array, k: Array, v: Array, y: Array, m: Array, n: Array,
                           prefixes: Sequence[Array], dqkv: tuple[Array | None, ...]) -> list[Array | None]:
        if not has_kernel(q):
            return super().differentiate_both(dy, q, k, v, y, m, n, prefixes, dqkv)
        xp, needs = self.xp, self.needs[-len(prefixes):]
        found: list[Array | None] = [None] * len(prefixes)
        for texts, which in spans(self.runs, len(q)):
            dq, dk, dv = (None if x is None else x[texts] for x in dqkv)
            keys, values = k[texts], v[texts]
            N = 0 if which is None else prefixes[which].shape[-2]
            part, given = self.for_texts(q, k, texts, N), (dy[texts], q[texts])
            if which is None:
                part.differentiate(*given, keys, values, None, m[texts], n[texts], dq, dk, dv)
                continue
            keys, values = together(xp, keys, values, prefixes[which])
            made = xp.empty((2, *keys.shape), dtype=keys.dtype)
            wanted = [made[i] if needs[which] or x is not None else None for i, x in enumerate((dk, dv))]
            part.differentiate(*given, keys, values, None, m[texts], n[texts], dq, *wanted)
            for x, whole in zip((dk, dv), made):
                if x is not None:
                    x[...] = whole[..., N:, :]
            if needs[which]:
                mine = made[..., :N, :]
                mine = mine.reshape(2, math.prod(mine.shape[1:-3]), *mine.shape[-3:]).sum(axis=1)
                found[which] = mine if found[which] is None else found[which] + mine
        return [xp.zeros_like(x) if need and dx is None else dx for x, need, dx in zip(prefixes, needs, found)]

    def for_texts(self, q: Array, k: Array, texts: slice, N: int) -> _Together:
        """This operation for some texts, whose own keys come after N others: masks and window are about all of them."""
        part, xp, T, S = copy.copy(self), self.xp, q.shape[-2], k.shape[-2]
        masks = [a[texts] if a.ndim == q.ndim and len(a) > 1 else a for a in self.masks]
        part.masks = tuple(masks)
        if not N:
            return part
        window = None if self.reach is None else S - T - self.reach  # of a query in both sets
        part.window = window if window is not None and window < N + S else None
        if self.causal and (S < T or self.window is not None and window != self.window):
            # Causality and the window draw other borders for a prefix than for own keys: both become masks.
            part.causal, part.window = False, None
            own = combine_masks(xp, (), slice(0, T), slice(0, S), S - T, q.dtype, self.window)
            masks += [] if own is None else [own]
        part.masks = tuple(after(xp, a, N, S) for a in masks)
        if window is not None and not part.causal:
            seen = xp.ones((T, N + S), dtype="bool")
            seen[:, :N] = xp.arange(N)[None] > xp.arange(T)[:, None] + (N + S - T - window)
            part.masks += (seen,)
        return part


def spans(runs: Sequence[Run], texts: int) -> Iterator[tuple[slice, int | None]]:
    """The runs, and between them the texts that have no prefix."""
    end = 0
    for rows, which in runs:
        start, stop, _ = rows.indices(texts)
        if start > end:
            yield slice(end, start), None
        yield slice(start, stop), which
        end = stop
    if end < texts:
        yield slice(end, texts), None


def together(xp: Any, k: Array, v: Array, prefix: Array) -> Array:
    """Keys and values (2, ..., KV, N + S, hd): those of the prefix (2, KV, N, hd) in front of each text's own."""
    N, S = prefix.shape[-2], k.shape[-2]
    both = xp.empty((2, *k.shape[:-2], N + S, k.shape[-1]), dtype=k.dtype)
    both[..., :N, :] = prefix.reshape(2, *[1] * (k.ndim - 3), *prefix.shape[1:])
    for own, whole in zip((k, v), both):
        whole[..., N:, :] = own
    return both


def after(xp: Any, mask: Array, N: int, S: int) -> Array:
    """A mask of S keys as one of N + S, of which it leaves the first N alone."""
    new = xp.ones if mask.dtype.kind == "b" else xp.zeros
    longer = new((*mask.shape[:-1], N + S), dtype=mask.dtype)
    longer[..., N:] = mask
    return longer


@override(PrefixAttention, device="gpu")
class FusedPrefixAttention(_Together, PrefixAttention):
    """`PrefixAttention`, likewise. Keeps q, k, v, m, n and the prefixes."""

    def forward(self, q: Array, k: Array, v: Array, *prefixes: Array) -> Array:
        y = super().forward(q, k, v, *prefixes)
        if has_kernel(q):
            self.save(q, k, v, None, *self.saved[4:])
        return y


@override(PackedPrefixAttention, device="gpu")
class FusedPackedPrefixAttention(_Together, PackedPrefixAttention):
    """`PackedPrefixAttention`, likewise. Keeps qkv, m, n and the prefixes."""

    def forward(self, qkv: Array, *prefixes: Array) -> Array:
        y = super().forward(qkv, *prefixes)
        if has_kernel(qkv):
            self.save(qkv, None, *self.saved[2:])
        return y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        qkv, y, m, n, *prefixes = self.saved
        if not has_kernel(qkv):
            return super().backward(dy)
        heads = dy.reshape(dy.shape[:-1] + (self.heads[0], dy.shape[-1] // self.heads[0])).swapaxes(-3, -2)
        dqkv = self.xp.empty(qkv.shape, dtype=qkv.dtype) if self.needs[0] else None
        parts = (None, None, None) if dqkv is None else self.split(dqkv)
        return (dqkv, *self.differentiate_both(heads, *self.split(qkv), y, m, n, prefixes, parts))
