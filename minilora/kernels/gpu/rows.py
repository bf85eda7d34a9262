"""GPU: normalisation, softmax and losses with one kernel a pass over the rows: norm.cu, softmax.cu, rows.cu."""

from __future__ import annotations

import math
from typing import Any

from ...backend import device_of, override
from ...ops.cross_entropy import CrossEntropy, LinearCrossEntropy, row_weights
from ...ops.linear import rows
from ...ops.loss import MSE
from ...ops.norm import GroupNorm, LayerNorm, RMSNorm
from ...ops.softmax import Softmax
from ..launch import by_element, by_kept_row, by_row, contiguous, has_kernel

__all__ = ["FusedCrossEntropy", "FusedGroupNorm", "FusedLayerNorm", "FusedLinearCrossEntropy", "FusedMSE", "FusedRMSNorm",
           "FusedSoftmax"]

Array = Any

CHUNK = 1024  # numbers that a block of threads adds up before the sums of all blocks are


def _normalise(op: Any, x: Array, w: Array | None, b: Array | None, mean: Array | None, q: Array) -> Array:
    x, w, b = contiguous(op.xp, x, w, b)
    y = op.xp.empty_like(x)
    by_kept_row("norm", "norm", *rows(x).shape, x.dtype, x, w, b, y, mean, q, op.eps)
    return y


def _through_norm(op: Any, dy: Array, x: Array, w: Array | None, mean: Array | None, q: Array) -> Array:
    dx = op.xp.empty_like(x)
    by_kept_row("norm", "norm_backward", *rows(x).shape, x.dtype, dy, x, *contiguous(op.xp, w), mean, q, dx)
    return dx


def _column_sums(op: Any, dy: Array, x: Array | None, mean: Array | None, q: Array | None) -> list[Array | None]:
    """The sums over the rows of dy xhat, for w, and of dy, for b: those that are wanted.

    In two stages of about sqrt(R) additions each, whose order depends on R alone: no atomics, the same bits every time, and
    rounding that grows with sqrt(R) only.
    """
    R, D = rows(dy).shape
    chunk = math.isqrt(R - 1) + 1
    chunks = -(-R // chunk)
    wanted = [*op.needs[1:], False][:2]  # of w and b; there may be no b
    parts = [op.xp.empty((chunks, D), dtype=dy.dtype) if need else None for need in wanted]
    if True in wanted:
        by_element("norm", "column_sums", chunks * D, dy.dtype, dy, x, mean, q, *parts, chunk, R, D)
    sums: list[Array | None] = [None, None]
    for i, part in enumerate(parts):
        if part is not None:
            into = op.into(i + 1)
            sums[i] = op.xp.empty(D, dtype=dy.dtype) if into is None else into
            by_element("norm", "column_sums", D, dy.dtype, part, None, None, None, None, sums[i], chunks, chunks, D)
    return sums


@override(LayerNorm, device="gpu")
class FusedLayerNorm(LayerNorm):
    """`LayerNorm` with one kernel forward, one for dx, and three for dw and db."""

    def forward(self, x: Array, w: Array | None, b: Array | None) -> Array:
        if not has_kernel(x):
            self.kernel = ""
            return super().forward(x, w, b)
        self.in_shape = x.shape
        mean, q = (self.xp.empty((rows(x).shape[0], 1), dtype=x.dtype) for _ in range(2))
        if self.needs[0] or self.needs[1]:
            self.save(x, mean, q, w if self.needs[0] else None)
        return _normalise(self, x, w, b, mean, q)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        if not has_kernel(dy, *self.saved[:1]):
            return super().backward(dy)
        x, mean, q, w = self.saved or (None, None, None, None)  # nothing is kept for b alone
        dy, x = contiguous(self.xp, dy, x)
        dx = _through_norm(self, dy, x, w, mean, q) if self.needs[0] else None
        return dx, *_column_sums(self, dy, x, mean, q)


@override(GroupNorm, device="gpu")
class FusedGroupNorm(GroupNorm):
    """`GroupNorm` with LayerNorm's kernels, on rows that are groups: one forward and one for dx.

    Factors and shifts belong to channels, and not to places of a row: they are launches of their own, as in the reference.
    """

    def forward(self, x: Array, w: Array | None, b: Array | None) -> Array:
        if not has_kernel(x):
            self.kernel = ""
            return super().forward(x, w, b)
        self.in_shape = x.shape
        x2, channels = self._split(x)
        mean, q = (self.xp.empty((len(x2), 1), dtype=x.dtype) for _ in range(2))
        if self.needs[0] or self.needs[1]:
            self.save(x, mean, q, w if self.needs[0] else None)
        y = _normalise(self, x2, None, None, mean, q).reshape(channels)
        if w is not None:
            y *= w[:, None]
        if b is not None:
            y += b[:, None]
        return y.reshape(x.shape)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        if self.needs[1] or not self.saved or not has_kernel(dy, self.saved[0]):
            return super().backward(dy)
        x, mean, q, w = self.saved
        x2, channels = self._split(x)
        dy = dy.reshape(channels)
        g, x2 = contiguous(self.xp, (dy if w is None else dy * w[:, None]).reshape(x2.shape), x2)
        dx = _through_norm(self, g, x2, None, mean, q).reshape(self.in_shape)
        return dx, None, dy.sum(axis=(0, 2)) if self.needs[2] else None


@override(RMSNorm, device="gpu")
class FusedRMSNorm(RMSNorm):
    """`RMSNorm` with one kernel forward, one for dx, and two for dw."""

    def forward(self, x: Array, w: Array | None) -> Array:
        if not has_kernel(x):
            self.kernel = ""
            return super().forward(x, w)
        self.in_shape = x.shape
        q = self.xp.empty((rows(x).shape[0], 1), dtype=x.dtype)
        self.save(x, q, w if self.needs[0] else None)
        return _normalise(self, x, w, None, None, q)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        x, q, w = self.saved
        if not has_kernel(dy, x):
            return super().backward(dy)
        dy, x = contiguous(self.xp, dy, x)
        dx = _through_norm(self, dy, x, w, None, q) if self.needs[0] else None
        return dx, _column_sums(self, dy, x, None, q)[0]


@override(Softmax, device="gpu")
class FusedSoftmax(Softmax):
    """`Softmax` along the last axis with one kernel each way; along another axis, the reference."""

    def _has_kernel(self, x: Array, *others: Array) -> bool:
        return self.axis in (-1, x.ndim - 1) and has_kernel(x, *others)

    def forward(self, x: Array) -> Array:
        if not self._has_kernel(x):
            self.kernel = ""
            return super().forward(x)
        (x,) = contiguous(self.xp, x)
        y = self.xp.empty_like(x)
        by_kept_row("softmax", "softmax", *rows(x).shape, x.dtype, x, y)
        self.save(y)
        return y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        (y,) = self.saved
        if not self._has_kernel(dy, y):
            return super().backward(dy)
        dx = self.xp.empty_like(y)
        by_kept_row("softmax", "softmax_backward", *rows(y).shape, y.dtype, y, *contiguous(self.xp, dy), dx)
        return (dx,)


@override(MSE, device="gpu")
class FusedMSE(MSE):
    """`MSE` with two kernels forward, for up to `CHUNK` numbers one, and none behind where backward begins with this loss.

    Kept is g = (2/n) d in the place of d: the gradient of the prediction (of the target, if that alone has one: -g) for the
    cotangent 1, to the last bit. For another one it is g dy where the reference gives d (dy 2/n): each rounds twice, so that
    they are 2 eps apart at most, unless g is so small that it is subnormal. (2/n) |d| <= |d| never overflows, for n > 1.
    """

    def forward(self, prediction: Array, target: Array) -> Array:
        if not has_kernel(prediction, target) or prediction.size == 1:
            self.kernel = ""
            return super().forward(prediction, target)
        p, t = contiguous(self.xp, prediction, target)
        n, dtype, empty = p.size, p.dtype, self.xp.empty
        chunks = -(-n // CHUNK)
        g, loss = empty(p.shape, dtype=dtype) if True in self.needs else None, empty((), dtype=dtype)
        sums, count = (loss, n) if chunks == 1 else (empty(chunks, dtype=dtype), 1)
        by_row("mse", chunks, CHUNK, dtype, p, t, g, sums, (2.0 if self.needs[0] else -2.0) / n, float(count), n)
        if chunks > 1:
            by_row("mean", 1, chunks, dtype, sums, loss, float(n))
        self.save(g)
        return loss

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        if not self.kernel:
            return super().backward(dy)
        (g,) = self.saved
        if dy is not device_of(dy).one(dy.dtype):
            g = g * dy
        if not self.needs[0]:
            return None, g
        return g, -g if self.needs[1] else None


@override(CrossEntropy, device="gpu")
class FusedCrossEntropy(CrossEntropy):
    """`CrossEntropy` with one kernel on the logits each way."""

    def forward(self, x: Array) -> Array:
        if not has_kernel(x):
            self.kernel = ""
            return super().forward(x)
        R, D = rows(x).shape
        weights, labels = row_weights(self.labels, self.ignore_index, x.dtype)
        losses, largest, total = (self.xp.empty((R, 1), dtype=x.dtype) for _ in range(3))
        by_row("cross_entropy", R, D, x.dtype, *contiguous(self.xp, x), labels, weights, losses, largest, total, None,
               self.label_smoothing)
        self.save(x, largest, total)
        return losses.sum()

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        x, largest, total = self.saved
        if not has_kernel(x, dy):
            return super().backward(dy)
        weights, labels = row_weights(self.labels, self.ignore_index, x.dtype)
        dx = self.xp.empty(x.shape, dtype=x.dtype)
        by_row("cross_entropy_backward", *rows(x).shape, x.dtype, *contiguous(self.xp, x), labels, weights * dy, largest,
               total, dx, self.label_smoothing)
        return (dx,)


@override(LinearCrossEntropy, device="gpu")
class FusedLinearCrossEntropy(LinearCrossEntropy):
    """`LinearCrossEntropy` whose chunk of logits becomes its gradient in one kernel."""

    most = 1 << 26  # 256 MB of float32: W is read a quarter as often, for 4,096 tokens of GPT-2 8 times in place of 26

    def finish(self, z: Array, labels: Array, weights: Array) -> Array:
        if not (has_kernel(z) and z.flags.c_contiguous):
            self.kernel = ""
            return super().finish(z, labels, weights)
        losses = self.xp.empty(weights.shape, dtype=z.dtype)
        by_row("cross_entropy", *z.shape, z.dtype, z, labels, weights, losses, None, None, z if True in self.needs else None,
               self.label_smoothing)
        return losses.sum()
