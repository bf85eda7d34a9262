"""GPU: attention in blocks as large as a card likes, a kernel for all between two products. The CUDA text is softmax.cu."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..backend import override
from ..ops.attention import Attention, ScaledDotProduct, grouped, stacked
from ..ops.masks import combine_masks
from ..ops.packed_attention import PackedAttention
from .launch import by_kept_row, contiguous, has_kernel
from .products import accumulate

__all__ = ["FusedAttention", "FusedPackedAttention"]

Array = Any

# Scores of the queries that are done together: 64 MB of float32. On an H100 the step of GPT-2 small, 8 x 512, takes 65.8 ms
# with these blocks and 67.9 with one, which meets masked keys in vain. (Before there were kernels: 81, 82, and 190 in blocks
# of 64.)
SCORES = 1 << 24


class _Fused(ScaledDotProduct):
    """Z by a product that scales, P by one kernel in its place.

    cuBLAS takes stacks of matrices that are evenly spaced: what is not gets a copy in order, and results go back by one. D_t is
    the row's sum of dP P, which the kernel of softmax takes; ops/attention.py shows that it is the same.
    """

    def attend(self, q: Array, k: Array, v: Array, y: Array) -> tuple[Array, Array]:
        self.choose(q, k)
        if not has_kernel(q):
            self.kernel = ""
            return super().attend(q, k, v, y)
        xp, kv = self.xp, k.shape[-3]
        q, k, v = contiguous(xp, q, k, v)
        (out,) = ordered(xp.empty, y)
        m, n = (xp.empty(q.shape[:-1] + (1,), dtype=q.dtype) for _ in range(2))
        for rows, keys in self.blocks(q.shape[-2], k.shape[-2]):
            P = self.products(q, k, rows, keys)
            R, D = P.size // P.shape[-1], P.shape[-1]
            by_kept_row("softmax", "masked_softmax", R, D, P.dtype, P, *self.places(P, q, k, rows, keys, m, n, True))
            accumulate(xp, grouped(P, kv), v[..., None, keys, :], grouped(out[..., rows, :], kv))
        if out is not y:
            y[...] = out
        return m, n

    def differentiate(self, dy: Array, q: Array, k: Array, v: Array, y: Array, m: Array, n: Array,
                      dq: Array | None, dk: Array | None, dv: Array | None) -> None:
        if not has_kernel(q, dy):
            return super().differentiate(dy, q, k, v, y, m, n, dq, dk, dv)
        xp, kv = self.xp, k.shape[-3]
        q, k, v, dy = contiguous(xp, q, k, v, dy)
        wanted = dq, dk, dv
        windowed = self.window is not None  # then no block of queries meets all keys: each adds to zeros
        dq, dk, dv = ordered(xp.zeros if windowed else xp.empty, *wanted)
        for i, (rows, keys) in enumerate(self.blocks(q.shape[-2], k.shape[-2])):
            P, dy_rows = self.products(q, k, rows, keys), dy[..., rows, :]
            R, D = P.size // P.shape[-1], P.shape[-1]
            by_kept_row("softmax", "masked_exp", R, D, P.dtype, P, *self.places(P, q, k, rows, keys, m, n, False))
            if dv is not None:
                self.add_over_queries(P, dy_rows, dv[..., keys, :], 1.0, add=windowed or i > 0)
            if dq is None and dk is None:
                continue
            dP, dZ = xp.empty(P.shape, dtype=P.dtype), xp.empty(P.shape, dtype=P.dtype)
            accumulate(xp, grouped(dy_rows, kv), v[..., None, keys, :].swapaxes(-1, -2), grouped(dP, kv))
            by_kept_row("softmax", "softmax_backward", R, D, P.dtype, P, dP, dZ)
            if dq is not None:
                accumulate(xp, grouped(dZ, kv), k[..., None, keys, :], grouped(dq[..., rows, :], kv), self.scale)
            if dk is not None:
                self.add_over_queries(dZ, q[..., rows, :], dk[..., keys, :], self.scale, add=windowed or i > 0)
        for target, made in zip(wanted, (dq, dk, dv)):
            if target is not None and made is not target:
                target[...] = made

    def choose(self, q: Array, k: Array) -> None:
        """The size of a block, for backward too."""
        parts = max(1, math.ceil(math.prod(q.shape[:-1]) * k.shape[-2] / SCORES))
        step = ScaledDotProduct.block
        self.block = step * math.ceil(max(1, q.shape[-2]) / parts / step)

    def products(self, q: Array, k: Array, rows: slice, keys: slice) -> Array:
        """c q k^T of some queries and keys."""
        q, kv = q[..., rows, :], k.shape[-3]
        Z = self.xp.empty(q.shape[:-1] + (keys.stop - keys.start,), dtype=q.dtype)
        accumulate(self.xp, grouped(q, kv), k[..., None, keys, :].swapaxes(-1, -2), grouped(Z, kv), self.scale)
        return Z

    def add_over_queries(self, P: Array, x: Array, out: Array, factor: float, add: bool) -> None:
        """out = factor P^T x, or added to it: summed over the queries of a group's heads."""
        kv = out.shape[-3]
        accumulate(self.xp, stacked(P, kv).swapaxes(-1, -2), stacked(x, kv), out, factor, float(add))

    def places(self, P: Array, q: Array, k: Array, rows: slice, keys: slice, m: Array, n: Array, low: bool) -> Iterator[Any]:
        """What the kernels need to know besides P: the masks, m, n, and who sees what."""
        T, S, H = q.shape[-2], k.shape[-2], q.shape[-3]
        M, steps = self.masks_of(P, rows, keys)
        yield from (M, m, n)
        if low:
            yield float(self.xp.finfo(P.dtype).min)
        here = S - T - keys.start  # the place of query 0, counted from the first of these keys
        behind = -T - S if self.window is None else here + 1 - self.window
        yield from (rows.start, rows.stop - rows.start, T, here if self.causal else S, behind, H, *steps)

    def masks_of(self, P: Array, rows: slice, keys: slice) -> tuple[Array | None, list[int]]:
        """The sum of all masks for some scores, without causality; and its steps from text to text, head, query and key."""
        M = combine_masks(self.xp, self.masks, rows, keys, None, P.dtype)
        if M is None:
            return None, [0, 0, 0, 0]
        M = M.astype(P.dtype, copy=False).reshape((1,) * (P.ndim - M.ndim) + M.shape)  # float16 beside float16 inputs
        texts = P.shape[:-3]
        if M.shape[:-3] != texts and M.size > math.prod(M.shape[-3:]):  # some texts share, others do not
            M = self.xp.broadcast_to(M, texts + M.shape[-3:])
        (M,) = contiguous(self.xp, M)
        steps, step = [], 1
        for size in (*M.shape[:-4:-1], math.prod(M.shape[:-3])):
            steps.append(step if size > 1 else 0)
            step *= size
        return M, steps[::-1]


def ordered(new: Any, *arrays: Array | None) -> list[Any]:
    """Room for results: each array itself where it is in C order, else a new one of its shape; None for None."""
    return [a if a is None or a.flags.c_contiguous else new(a.shape, dtype=a.dtype) for a in arrays]


@override(Attention, device="gpu")
class FusedAttention(_Fused, Attention):
    """`Attention`, as many queries at a time as make 2^24 scores (4 times that, where no key is masked by causality)."""


@override(PackedAttention, device="gpu")
class FusedPackedAttention(_Fused, PackedAttention):
    """`PackedAttention`, likewise. With as many key heads as query heads, q, k and v are put in order by one copy."""

    def by_kind(self, qkv: Array) -> Array:
        """A view (3, ..., H, T, hd)."""
        x = qkv.reshape(qkv.shape[:-1] + (3, self.heads[0], qkv.shape[-1] // (3 * self.heads[0])))
        return self.xp.moveaxis(x, -3, 0).swapaxes(-3, -2)

    def forward(self, qkv: Array) -> Array:
        if self.heads[0] != self.heads[1] or not has_kernel(qkv):
            return super().forward(qkv)
        q, k, v = self.xp.ascontiguousarray(self.by_kind(qkv))
        y = self.xp.empty(qkv.shape[:-1] + (q.shape[-3], q.shape[-1]), dtype=qkv.dtype)
        m, n = self.attend(q, k, v, y.swapaxes(-3, -2))
        self.save(qkv, y, m, n)
        return y.reshape(qkv.shape[:-1] + (q.shape[-3] * q.shape[-1],))

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        qkv, y, m, n = self.saved
        if self.heads[0] != self.heads[1] or not has_kernel(qkv, dy):
            return super().backward(dy)
        q, k, v = self.xp.ascontiguousarray(self.by_kind(qkv))
        gradients = self.xp.empty((3, *q.shape), dtype=qkv.dtype)
        dy, y = (x.reshape(y.shape).swapaxes(-3, -2) for x in (dy, y))
        self.differentiate(dy, q, k, v, y, m, n, *gradients)
        dqkv = self.xp.empty(qkv.shape, dtype=qkv.dtype)
        self.by_kind(dqkv)[...] = gradients
        return (dqkv,)
