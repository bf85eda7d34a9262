"""Attention on the CPU: some heads of one sample at a time, so that their scores stay in the cache from pass to pass.

The formulas are those of `ops.attention`, arranged for what is slow on this device:

- A small product with a transposed second factor takes twice as long as one without (OpenBLAS), so k and v are transposed in
  advance, and multiplied by the scale on the way: Z = q (c k^T), and with dP' = dy (c v^T) and D' = c rowsum(dy * y),

      dZ' = P * (dP' - D')        dq = dZ' k        dk = dZ'^T q

- NumPy finds the place of a row's largest score three times as fast as the score.
- In the forward pass n divides y, which has fewer numbers than P.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy

from ..backend import override
from ..ops.attention import Attention, ScaledDotProduct, grouped, stacked
from ..ops.masks import combine_masks
from ..ops.packed_attention import PackedAttention
from .cpu_blocks import BLOCK, scratch

__all__ = ["BlockedAttention", "BlockedPackedAttention"]

Array = Any
Index = tuple[Any, ...]


class _Block(NamedTuple):
    """Queries that are done together, the keys they may see, and what causality adds to their scores."""

    rows: slice
    keys: slice
    closed: Array | None


class _ByHeads(ScaledDotProduct):
    """`attend` and `differentiate` for c key and value heads of a sample at a time, and the g query heads of each."""

    def attend(self, q: Array, k: Array, v: Array, y: Array) -> tuple[Array, Array]:
        if q.dtype.char not in "fd" or q.size == 0:
            return super().attend(q, k, v, y)
        m, n = numpy.empty((2, *q.shape[:-1], 1), q.dtype)
        blocks = self._blocks(q, k)
        lowest = float(numpy.finfo(q.dtype).min)
        for index, own in self._parts(q, k):
            kT, v_own = transposed(k[own], self.scale), numpy.ascontiguousarray(v[own])[:, None]
            for rows, keys, closed in blocks:
                (P,) = self._room(1, q[index], kT, rows, keys)
                self._scores(q[index][:, rows], kT[..., keys], closed, (rows, keys, index), P)
                high = largest(P)
                numpy.maximum(high, lowest, out=high)
                P -= high
                numpy.exp(P, out=P)
                total = numpy.dot(P, numpy.ones((P.shape[-1], 1), P.dtype))
                total += total == 0.0  # as in the reference
                out = numpy.matmul(P, v_own[:, :, keys])
                numpy.multiply(out, 1.0 / total, out=grouped(y[index][:, rows], len(kT)))
                grouped(m[index][:, rows], len(kT))[...] = high
                grouped(n[index][:, rows], len(kT))[...] = total
        return m, n

    def differentiate(self, dy: Array, q: Array, k: Array, v: Array, y: Array, m: Array, n: Array,
                      dq: Array | None, dk: Array | None, dv: Array | None) -> None:
        if q.dtype.char not in "fd" or q.size == 0:
            return super().differentiate(dy, q, k, v, y, m, n, dq, dk, dv)
        blocks = self._blocks(q, k)
        D = None if dq is None and dk is None else numpy.vecdot(dy, y)[..., None] * self.scale
        for index, own in self._parts(q, k):
            kT, k_own = transposed(k[own], self.scale), numpy.ascontiguousarray(k[own])
            vT: Array = None if D is None else transposed(v[own], self.scale)
            for i, (rows, keys, closed) in enumerate(blocks):
                P, dZ = self._room(2, q[index], kT, rows, keys)
                q_rows, dy_rows = q[index][:, rows], numpy.ascontiguousarray(dy[index][:, rows])
                self._scores(q_rows, kT[..., keys], closed, (rows, keys, index), P)
                P -= grouped(m[index][:, rows], len(kT))
                numpy.exp(P, out=P)
                P *= grouped(1.0 / n[index][:, rows], len(kT))
                if dv is not None:
                    add_over_queries(P, dy_rows, dv[own][:, keys], first=i == 0)
                if D is None:
                    continue
                numpy.matmul(grouped(dy_rows, len(kT)), vT[:, None, :, keys], out=dZ)
                dZ -= grouped(D[index][:, rows], len(kT))
                dZ *= P
                if dq is not None:
                    numpy.matmul(dZ, k_own[:, None, keys], out=grouped(dq[index][:, rows], len(kT)))
                if dk is not None:
                    add_over_queries(dZ, q_rows, dk[own][:, keys], first=i == 0)

    def _blocks(self, q: Array, k: Array) -> list[_Block]:
        T, S = q.shape[-2], k.shape[-2]
        ahead = S - T if self.causal else None
        return [_Block(rows, keys, combine_masks(numpy, (), rows, keys, ahead, q.dtype)) for rows, keys in self.blocks(T, S)]

    def _parts(self, q: Array, k: Array) -> Iterator[tuple[Index, Index]]:
        """Where the parts stand in arrays of query heads, and in arrays of key and value heads."""
        KV, S = k.shape[-3:-1]
        g = q.shape[-3] // KV
        step = min(KV, max(1, BLOCK // (g * min(q.shape[-2], self.block) * S)))
        for sample in numpy.ndindex(q.shape[:-3]):
            for low in range(0, KV, step):
                high = min(low + step, KV)
                yield (*sample, slice(g * low, g * high)), (*sample, slice(low, high))

    def _room(self, number: int, q: Array, kT: Array, rows: slice, keys: slice) -> Array:
        """Scratch for so many arrays of the scores of a part's queries and keys, (c, g, R, keys) each."""
        shape = number, len(kT), len(q) // len(kT), rows.stop - rows.start, keys.stop
        return scratch(math.prod(shape), q.dtype).reshape(shape)

    def _scores(self, q: Array, kT: Array, closed: Array | None, where: tuple[slice, slice, Index], Z: Array) -> None:
        """Write q k^T, scaled and masked, into Z (c, g, R, keys)."""
        numpy.matmul(grouped(q, len(kT)), kT[:, None], out=Z)
        if closed is not None:
            Z += closed
        if self.masks:
            rows, keys, index = where
            own = tuple(of_part(mask, index) for mask in self.masks)
            by_heads = Z.reshape(len(q), *Z.shape[2:])
            by_heads += combine_masks(numpy, own, rows, keys, None, Z.dtype)


def largest(P: Array) -> Array:
    """The largest number of every row of P, (..., 1)."""
    flat = P.reshape(-1, P.shape[-1])
    return flat[numpy.arange(len(flat)), flat.argmax(axis=1)].reshape(*P.shape[:-1], 1)


def transposed(x: Array, scale: float) -> Array:
    """A copy without gaps of the matrices x, each transposed and multiplied by the scale."""
    x = numpy.ascontiguousarray(x)  # read row by row first: that is twice as fast as column by column with gaps
    return numpy.multiply(x.swapaxes(-1, -2), scale, order="C")


def add_over_queries(P: Array, x: Array, out: Array, first: bool) -> None:
    """Write P^T x into out (c, keys, hd), or add it, summed over the queries of a group's heads."""
    c, g, R, keys = P.shape
    P, x = P.reshape(c, g * R, keys).swapaxes(-1, -2), stacked(x, c)
    if first:
        numpy.matmul(P, x, out=out)
    else:
        out += numpy.matmul(P, x)


def of_part(mask: Array, index: Index) -> Array:
    """The part of a mask, which broadcasts to (..., H, T, S), that belongs to a sample's index and heads."""
    mask = mask.reshape((1,) * (len(index) + 2 - mask.ndim) + mask.shape)
    *sample, heads = index
    mask = mask[tuple(i if n > 1 else 0 for i, n in zip(sample, mask.shape))]
    return mask[heads] if len(mask) > 1 else mask


@override(Attention, device="cpu")
class BlockedAttention(_ByHeads, Attention):
    """`Attention`, some heads of one sample at a time."""


@override(PackedAttention, device="cpu")
class BlockedPackedAttention(_ByHeads, PackedAttention):
    """`PackedAttention`, some heads of one sample at a time."""
