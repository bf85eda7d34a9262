"""Attention on the CPU: some samples, or heads of one, at a time, so that their scores stay in the cache from pass to pass.

The formulas are those of `ops.attention`, arranged for what is slow on this device:

- A small product with a transposed second factor takes twice as long as one without (OpenBLAS), so k and v are transposed in
  advance, and multiplied by the scale on the way: Z = q (c k^T), and with dP' = dy (c v^T) and D' = c rowsum(dy * y),

      dZ' = P * (dP' - D')        dq = dZ' k        dk = dZ'^T q

- NumPy finds the place of a row's largest score three times as fast as the score.
- In the forward pass n divides y, which has fewer numbers than P.

Where few queries look at many keys, as when a text is generated, copies of k and v would cost more than all products: the
reference, which makes none, is then 2 to 9 times as fast (measured, 1 query and 40 to 1000 keys).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy

from ...backend import override
from ...ops.attention import Attention, ScaledDotProduct, grouped, stacked
from ...ops.few import few
from ...ops.masks import combine_masks
from ...ops.packed_attention import PackedAttention
from ...ops.prefix_attention import PackedPrefixAttention, PrefixAttention
from .blocks import BLOCK, scratch

__all__ = ["BlockedAttention", "BlockedPackedAttention", "BlockedPackedPrefixAttention", "BlockedPrefixAttention"]

FEW = 32  # queries: with fewer the reference is faster

Array = Any
Index = tuple[Any, ...]


class _Block(NamedTuple):
    """Queries that are done together, the keys they may see, and what causality adds to their scores."""

    rows: slice
    keys: slice
    closed: Array | None


class _ByHeads(ScaledDotProduct):
    """`attend` and `differentiate` for n samples and c of their key and value heads at a time, and the g query heads of each.

    As many as BLOCK scores have room for: several samples where texts are short, a head where they are long.
    """

    def attend(self, q: Array, k: Array, v: Array, y: Array) -> tuple[Array, Array]:
        if q.dtype.char not in "fd" or q.size == 0 or (q.shape[-2] < FEW and True not in self.needs):
            self.kernel = ""
            return super().attend(q, k, v, y)
        if q.ndim == 3:
            m, n = self.attend(q[None], k[None], v[None], y[None])
            return m[0], n[0]
        m, n = numpy.empty((2, *q.shape[:-1], 1), q.dtype, like=q)
        blocks = self._blocks(q, k)
        lowest = float(numpy.finfo(q.dtype).min)
        for index, own in few(list(self._parts(q, k)), q):
            kT, v_own = transposed(k[own], self.scale), numpy.ascontiguousarray(v[own], like=v)[:, :, None]
            c = kT.shape[1]
            for rows, keys, closed in blocks:
                (P,) = self._room(1, q[index], kT, rows, keys)
                self._scores(q[index][:, :, rows], kT[..., keys], closed, (rows, keys, index), P)
                high = largest(P)
                numpy.maximum(high, lowest, out=high)
                P -= high
                numpy.exp(P, out=P)
                total = numpy.dot(P, numpy.ones((P.shape[-1], 1), P.dtype, like=P))
                total += total == 0.0  # as in the reference
                out = numpy.matmul(P, v_own[..., keys, :])
                numpy.multiply(out, 1.0 / total, out=grouped(y[index][:, :, rows], c))
                grouped(m[index][:, :, rows], c)[...] = high
                grouped(n[index][:, :, rows], c)[...] = total
        return m, n

    def differentiate(self, dy: Array, q: Array, k: Array, v: Array, y: Array, m: Array, n: Array,
                      dq: Array | None, dk: Array | None, dv: Array | None) -> None:
        if q.dtype.char not in "fd" or q.size == 0:
            return super().differentiate(dy, q, k, v, y, m, n, dq, dk, dv)
        if q.ndim == 3:
            one = [None if x is None else x[None] for x in (dy, q, k, v, y, m, n, dq, dk, dv)]
            return self.differentiate(*one)
        blocks = self._blocks(q, k)
        D = None if dq is None and dk is None else numpy.vecdot(dy, y)[..., None] * self.scale
        for index, own in few(list(self._parts(q, k)), q):
            kT, k_own = transposed(k[own], self.scale), numpy.ascontiguousarray(k[own], like=k)
            vT: Array = None if D is None else transposed(v[own], self.scale)
            c = kT.shape[1]
            for i, (rows, keys, closed) in enumerate(blocks):
                first = i == 0 and self.window is None  # it writes what the others add to
                P, dZ = self._room(2, q[index], kT, rows, keys)
                q_rows, dy_rows = q[index][:, :, rows], numpy.ascontiguousarray(dy[index][:, :, rows], like=dy)
                self._scores(q_rows, kT[..., keys], closed, (rows, keys, index), P)
                P -= grouped(m[index][:, :, rows], c)
                numpy.exp(P, out=P)
                P *= grouped(1.0 / n[index][:, :, rows], c)
                if dv is not None:
                    add_over_queries(P, dy_rows, dv[own][:, :, keys], first=first)
                if D is None:
                    continue
                numpy.matmul(grouped(dy_rows, c), vT[:, :, None, :, keys], out=dZ)
                dZ -= grouped(D[index][:, :, rows], c)
                dZ *= P
                if dq is not None:
                    numpy.matmul(dZ, k_own[:, :, None, keys], out=grouped(dq[index][:, :, rows], c))
                if dk is not None:
                    add_over_queries(dZ, q_rows, dk[own][:, :, keys], first=first)

    def _blocks(self, q: Array, k: Array) -> list[_Block]:
        T, S = q.shape[-2], k.shape[-2]
        ahead = S - T if self.causal else None
        return [_Block(rows, keys, combine_masks(self.xp, (), rows, keys, ahead, q.dtype, self.window))
                for rows, keys in self.blocks(T, S)]

    def _parts(self, q: Array, k: Array) -> Iterator[tuple[Index, Index]]:
        """Where the parts stand in arrays of query heads, and in arrays of key and value heads: slices of samples and heads."""
        KV, S = k.shape[-3:-1]
        samples, g = q.shape[-4], q.shape[-3] // KV
        seen = S if self.window is None else min(S, self.block + self.window)  # keys, by a block of queries
        room = max(1, BLOCK // (g * min(q.shape[-2], self.block) * seen))  # pairs of a sample and a head
        heads, some = min(KV, room), max(1, room // KV)
        for lead in numpy.ndindex(q.shape[:-4]):
            for first in range(0, samples, some):
                these = slice(first, min(first + some, samples))
                for low in range(0, KV, heads):
                    high = min(low + heads, KV)
                    yield (*lead, these, slice(g * low, g * high)), (*lead, these, slice(low, high))

    def _room(self, number: int, q: Array, kT: Array, rows: slice, keys: slice) -> Array:
        """Scratch for so many arrays of the scores of a part's queries and keys, (n, c, g, R, keys) each."""
        n, c = kT.shape[:2]
        shape = number, n, c, q.shape[1] // c, rows.stop - rows.start, keys.stop - keys.start
        return scratch(math.prod(shape), q).reshape(shape)

    def _scores(self, q: Array, kT: Array, closed: Array | None, where: tuple[slice, slice, Index], Z: Array) -> None:
        """Write q k^T, scaled and masked, into Z (n, c, g, R, keys)."""
        numpy.matmul(grouped(q, kT.shape[1]), kT[:, :, None], out=Z)
        if closed is not None:
            Z += closed
        if self.masks:
            rows, keys, index = where
            own = tuple(of_part(mask, index) for mask in self.masks)
            by_heads = Z.reshape(q.shape[:2] + Z.shape[3:])
            by_heads += combine_masks(self.xp, own, rows, keys, None, Z.dtype)


def largest(P: Array) -> Array:
    """The largest number of every row of P, (..., 1)."""
    flat = P.reshape(-1, P.shape[-1])
    return flat[numpy.arange(len(flat), like=P), flat.argmax(axis=1)].reshape(*P.shape[:-1], 1)


def transposed(x: Array, scale: float) -> Array:
    """A copy without gaps of the matrices x, each transposed and multiplied by the scale."""
    x = numpy.ascontiguousarray(x, like=x)  # read row by row first: that is twice as fast as column by column with gaps
    return numpy.multiply(x.swapaxes(-1, -2), scale, order="C")


def add_over_queries(P: Array, x: Array, out: Array, first: bool) -> None:
    """Write P^T x into out (n, c, keys, hd), or add it, summed over the queries of a group's heads."""
    n, c, g, R, keys = P.shape
    P, x = P.reshape(n, c, g * R, keys).swapaxes(-1, -2), stacked(x, c)
    if first:
        numpy.matmul(P, x, out=out)
    else:
        out += numpy.matmul(P, x)


def of_part(mask: Array, index: Index) -> Array:
    """The part of a mask, which broadcasts to (..., H, T, S), that belongs to some samples and heads."""
    mask = mask.reshape((1,) * (len(index) + 2 - mask.ndim) + mask.shape)
    return mask[tuple(i if n > 1 else slice(None) if isinstance(i, slice) else 0 for i, n in zip(index, mask.shape))]


@override(Attention, device="cpu")
class BlockedAttention(_ByHeads, Attention):
    """`Attention`, some samples and heads at a time."""


@override(PackedAttention, device="cpu")
class BlockedPackedAttention(_ByHeads, PackedAttention):
    """`PackedAttention`, some samples and heads at a time."""


@override(PrefixAttention, device="cpu")
class BlockedPrefixAttention(_ByHeads, PrefixAttention):
    """`PrefixAttention`, each of its two sets of keys for some samples and heads at a time."""


@override(PackedPrefixAttention, device="cpu")
class BlockedPackedPrefixAttention(_ByHeads, PackedPrefixAttention):
    """`PackedPrefixAttention`, likewise."""
