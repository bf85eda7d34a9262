"""Linear layer and cross-entropy on the CPU, without a whole row of logits in memory."""

from __future__ import annotations

from typing import Any

import numpy

from ...backend import override
from ...ops.cross_entropy import LinearCrossEntropy, counted_rows, row_weights
from ...ops.few import few
from ...ops.linear import rows
from .blocks import BLOCK, row_blocks, scratch

__all__ = ["BlockedLinearCrossEntropy"]

Array = Any

ROWS = 1024  # of h at a time; W is read once for each
ROOM = 1 << 22  # logits in memory: 16 MB of float32, 8192 classes of 512 rows


class _Running:
    """What the classes seen so far give for some rows of logits z: the largest, m; the sum of e^(z - m); of e^(z - m) W."""

    def __init__(self, h: Array, labels: Array, wanted: bool) -> None:
        self.h, self.labels = h, labels
        self.largest = numpy.full((len(h), 1), -numpy.inf, h.dtype, like=h)
        self.total = numpy.zeros((len(h), 1), h.dtype, like=h)
        self.target = numpy.empty((len(h), 1), h.dtype, like=h)
        self.mixed: Array = numpy.zeros_like(h) if wanted else None  # sum of e^(z - m) W, (rows, H)

    def add(self, z: Array, first: int, W: Array) -> None:
        """Take in the logits z of the classes from `first` on, whose weights are W. z is used up."""
        here = numpy.flatnonzero((self.labels >= first) & (self.labels < first + len(W)))
        self.target[here, 0] = z[here, self.labels[here] - first]
        ones = numpy.ones((z.shape[1], 1), z.dtype, like=z)
        for part in row_blocks(z, BLOCK):
            e, m, total = z[part], self.largest[part], self.total[part]
            larger = numpy.maximum(m, e.max(axis=1, keepdims=True))
            e -= larger
            numpy.exp(e, out=e)
            shrink = numpy.exp(m - larger)  # what was summed against the former largest; 0 at first
            total *= shrink
            total += numpy.dot(e, ones)
            m[...] = larger
            if self.mixed is not None:
                self.mixed[part] *= shrink
        if self.mixed is not None:
            self.mixed += numpy.dot(z, W)

    def losses(self) -> Array:
        """-log p of the labels, (rows, 1). No rounding makes them negative: the total is 1 at least, the target m at most."""
        return numpy.log(self.total) + (self.largest - self.target)


@override(LinearCrossEntropy, device="cpu")
class BlockedLinearCrossEntropy(LinearCrossEntropy):
    """`LinearCrossEntropy` with softmax computed while the classes go by: W is read once, and the logits stay in the cache.

    Of a row's logits z of the classes seen so far, let m be the largest, n = sum_j e^(z_j - m) and a = sum_j e^(z_j - m) W_j.
    As m grows to m' with more classes, both are multiplied by e^(m - m'). At the end a / n = p W, and the row's gradient is

        w (p - t) W = w (a / n - W_k)

    That is for a frozen W without b and label smoothing, as in the tuning of a language model. Otherwise, since the gradients
    of W and b need p itself, the reference computes, with its passes over the logits made a few rows at a time.

    Source: Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3.
    """

    def forward(self, h: Array, W: Array, b: Array | None) -> Array:
        if h.dtype.char not in "fd" or self.needs[1] or b is not None or self.label_smoothing:
            return super().forward(h, W, b)
        shape = h.shape
        weights, labels = row_weights(self.labels, self.ignore_index, h.dtype)
        h = counted_rows(rows(h), weights, self.ignores, self.xp)
        dh = numpy.empty(h.shape, h.dtype, like=h) if self.needs[0] else None
        loss = 0.0
        for low in few(range(0, len(h), ROWS), h):
            part = slice(low, low + ROWS)
            seen = self._over_classes(h[part], W, labels[part])
            loss = loss + (weights[part] * seen.losses()).sum()
            if dh is not None:
                numpy.divide(seen.mixed, seen.total, out=dh[part])
                dh[part] -= W[labels[part]]
                dh[part] *= weights[part]
        self.save(None if dh is None else dh.reshape(shape), None, None)
        return loss

    def _over_classes(self, h: Array, W: Array, labels: Array) -> _Running:
        seen = _Running(h, labels, self.needs[0])
        step = max(1, min(ROOM, self.chunk_rows * len(W)) // len(h))
        room = scratch(len(h) * min(step, len(W)), h)
        for first in few(range(0, len(W), step), h):
            some = W[first:first + step]
            z = room[:len(h) * len(some)].reshape(len(h), len(some))
            seen.add(numpy.dot(h, some.T, out=z), first, some)
        return seen

    def finish(self, z: Array, labels: Array, weights: Array) -> Array:
        parts = row_blocks(z, BLOCK)
        return sum(super(BlockedLinearCrossEntropy, self).finish(z[part], labels[part], weights[part]) for part in parts)
