"""GPU: attention in blocks as large as a card likes, a kernel for all between two products. The CUDA text is softmax.cu."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ...backend import override
from ...ops.attention import Attention, ScaledDotProduct, stacked
from ...ops.masks import combine_masks
from ...ops.packed_attention import PackedAttention
from ..cublas.products import accumulate
from ..launch import by_kept_row, contiguous, has_kernel
from .heads import Blocks, Rooms, even, in_order, move_packed, pieces, piled, queries

__all__ = ["FusedAttention", "FusedPackedAttention"]

Array = Any
Parts = Sequence[Array]  # of queries, one for each block

# Scores of the queries that are done together: 64 MB of float32. On an H100 the step of GPT-2 small, 8 x 512, takes 65.8 ms
# with these blocks and 67.9 with one, which meets masked keys in vain. (Before there were kernels: 81, 82, and 190 in blocks
# of 64.)
SCORES = 1 << 24


class Fused(ScaledDotProduct):
    """Z by a product that scales, P by one kernel in its place.

    cuBLAS takes stacks of matrices that are evenly spaced: gpu_heads puts in order what is not. The queries of all heads of a
    group lie under each other, so that one product serves them all, and sums over them. D_t is the row's sum of dP P, which
    the kernel of softmax takes; ops/attention.py shows that it is the same. So y is not kept.
    """

    def attend(self, q: Array, k: Array, v: Array, y: Array) -> tuple[Array, Array]:
        if not has_kernel(q):
            self.kernel = ""
            return super().attend(q, k, v, y)
        xp, g = self.xp, q.shape[-3] // k.shape[-3]
        blocks = self.chosen(q.shape, k.shape)
        out = Rooms(xp, y, blocks, g)
        found = self.attend_blocks(blocks, queries(xp, q, blocks, g), in_order(xp, k), in_order(xp, v), out.parts, q.shape)
        out.done()
        return found

    def differentiate(self, dy: Array, q: Array, k: Array, v: Array, y: Array, m: Array, n: Array,
                      dq: Array | None, dk: Array | None, dv: Array | None) -> None:
        if not has_kernel(q):
            return super().differentiate(dy, q, k, v, y, m, n, dq, dk, dv)
        xp, g = self.xp, q.shape[-3] // k.shape[-3]
        blocks = self.chosen(q.shape, k.shape)
        dy, q = (queries(xp, x, blocks, g) for x in (dy.astype(q.dtype, copy=False), q))
        made = [Rooms(xp, dq, blocks, g), *(Rooms(xp, x, [(slice(0, k.shape[-2]),) * 2], 1) for x in (dk, dv))]
        (dk,), (dv,) = made[1].parts, made[2].parts
        v = v if dq is None and dk is None else in_order(xp, v)
        self.differentiate_blocks(blocks, dy, q, in_order(xp, k), v, m, n, made[0].parts, dk, dv)
        for result in made:
            result.done()

    def chosen(self, q: tuple[int, ...], k: tuple[int, ...]) -> Blocks:
        """The blocks: the same for backward, as they depend on the shapes alone."""
        parts = max(1, math.ceil(math.prod(q[:-1]) * k[-2] / SCORES))
        step = ScaledDotProduct.block
        self.block = step * math.ceil(max(1, q[-2]) / parts / step)
        return list(self.blocks(q[-2], k[-2]))

    def attend_blocks(self, blocks: Blocks, q: Parts, k: Array, v: Array, y: Parts, shape: tuple[int, ...]
                      ) -> tuple[Array, Array]:
        """Write y. All is in order, and `shape` that of q as a whole. Returns m and n."""
        xp, kv = self.xp, k.shape[-3]
        m, n = (xp.empty(shape[:-1] + (1,), dtype=k.dtype) for _ in range(2))
        for (rows, keys), own, out in zip(blocks, q, y):
            P = self.products(own, k, keys)
            R, D = P.size // P.shape[-1], P.shape[-1]
            by_kept_row("softmax", "masked_softmax", R, D, P.dtype, P, *self.places(P, k.shape[-2], rows, keys, m, n, True))
            accumulate(xp, stacked(P, kv), v[..., keys, :], stacked(out, kv))
        return m, n

    def differentiate_blocks(self, blocks: Blocks, dy: Parts, q: Parts, k: Array, v: Array, m: Array, n: Array,
                             dq: Sequence[Array | None], dk: Array | None, dv: Array | None) -> None:
        """Write those gradients that are not None, all of which are in order. With v = None that of v alone."""
        xp, kv = self.xp, k.shape[-3]
        for x in (dk, dv) if self.window is not None else ():
            if x is not None:
                x.fill(0.0)  # no block of queries meets all keys: each adds
        for i, ((rows, keys), dy_rows, own, dq_rows) in enumerate(zip(blocks, dy, q, dq)):
            add = float(self.window is not None or i > 0)
            P, dy_rows = self.products(own, k, keys), stacked(dy_rows, kv)
            R, D = P.size // P.shape[-1], P.shape[-1]
            by_kept_row("softmax", "masked_exp", R, D, P.dtype, P, *self.places(P, k.shape[-2], rows, keys, m, n, False))
            if dv is not None:
                accumulate(xp, stacked(P, kv).swapaxes(-1, -2), dy_rows, dv[..., keys, :], 1.0, add)
            if dq_rows is None and dk is None:
                continue
            dP, dZ = xp.empty(P.shape, dtype=P.dtype), xp.empty(P.shape, dtype=P.dtype)
            accumulate(xp, dy_rows, v[..., keys, :].swapaxes(-1, -2), stacked(dP, kv))
            by_kept_row("softmax", "softmax_backward", R, D, P.dtype, P, dP, dZ)
            dZ = stacked(dZ, kv)
            if dq_rows is not None:
                accumulate(xp, dZ, k[..., keys, :], stacked(dq_rows, kv), self.scale)
            if dk is not None:
                accumulate(xp, dZ.swapaxes(-1, -2), stacked(own, kv), dk[..., keys, :], self.scale, add)

    def products(self, q: Array, k: Array, keys: slice) -> Array:
        """c q k^T of the queries of a block and some keys."""
        kv = k.shape[-3]
        Z = self.xp.empty(q.shape[:-1] + (keys.stop - keys.start,), dtype=q.dtype)
        accumulate(self.xp, stacked(q, kv), k[..., keys, :].swapaxes(-1, -2), stacked(Z, kv), self.scale)
        return Z

    def places(self, P: Array, S: int, rows: slice, keys: slice, m: Array, n: Array, low: bool) -> Iterator[Any]:
        """What the kernels need to know besides P: the masks, m, n, and who sees what."""
        H, T = m.shape[-3:-1]
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


@override(Attention, device="gpu")
class FusedAttention(Fused, Attention):
    """`Attention`, as many queries at a time as make 2^24 scores (4 times that, where no key is masked by causality)."""

    def forward(self, q: Array, k: Array, v: Array) -> Array:
        if not has_kernel(q):
            return super().forward(q, k, v)
        y = self.xp.empty_like(q)
        m, n = self.attend(q, k, v, y)
        self.save(q, k, v if self.needs[0] or self.needs[1] else None, None, m, n)
        return y


@override(PackedAttention, device="gpu")
class FusedPackedAttention(Fused, PackedAttention):
    """`PackedAttention`, likewise. One kernel puts q, k and v in order; the result is kept in the place of qkv.

    That needs as many bytes, and qkv is free if nobody else keeps it. A single text with as many key heads as query heads is in
    order as it is.
    """

    rearranged = {0: 0}

    def forward(self, qkv: Array) -> Array:
        if not has_kernel(qkv):
            return super().forward(qkv)
        blocks, shape, g = self.described(qkv.shape)
        kept = qkv
        if not self.is_ready(qkv, blocks, g):
            kept = self.xp.empty(qkv.size, dtype=qkv.dtype)
            move_packed("split_heads", contiguous(self.xp, qkv)[0], kept, self.heads, blocks[-1][0].stop)
        y = self.xp.empty(qkv.shape[:-1] + (shape[-3] * shape[-1],), dtype=qkv.dtype)
        out = Rooms(self.xp, self.by_heads(y), blocks, g)
        m, n = self.attend_blocks(blocks, *self.parts(kept, blocks, shape), out.parts, shape)
        out.done()
        self.save(kept, None, m, n)
        return y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        kept, _, m, n = self.saved
        if not has_kernel(kept):
            return super().backward(dy)
        xp, width = self.xp, dy.shape[-1] // self.heads[0] * (self.heads[0] + 2 * self.heads[1])
        blocks, shape, g = self.described(dy.shape[:-1] + (width,))
        dqkv = xp.empty(dy.shape[:-1] + (width,), dtype=kept.dtype)
        flat = dqkv if kept.ndim > 1 else xp.empty(dqkv.size, dtype=kept.dtype)
        dq, dk, dv = self.parts(flat, blocks, shape)
        by_block = queries(xp, self.by_heads(dy.astype(kept.dtype, copy=False)), blocks, g)
        self.differentiate_blocks(blocks, by_block, *self.parts(kept, blocks, shape), m, n, dq, dk, dv)
        if flat is not dqkv:
            move_packed("join_heads", dqkv, flat, self.heads, blocks[-1][0].stop)
        return (dqkv,)

    def described(self, shape: tuple[int, ...]) -> tuple[Blocks, tuple[int, ...], int]:
        """For a shape of qkv: the blocks, the shape of q, and how many heads share keys."""
        (*lead, T, width), (H, KV) = shape, self.heads
        q = *lead, H, T, width // (H + 2 * KV)
        return self.chosen(q, q), q, H // KV

    def is_ready(self, qkv: Array, blocks: Blocks, g: int) -> bool:
        q, k, _ = self.split(qkv)
        return qkv.ndim > 1 and piled(q, g, blocks) and even(k)

    def parts(self, x: Array, blocks: Blocks, shape: tuple[int, ...]) -> tuple[list[Array], Array, Array]:
        """The blocks of q, k, and v: of qkv, or of what has been put in order."""
        if x.ndim > 1:
            q, k, v = self.split(x)
            return [q[..., rows, :] for rows, _ in blocks], k, v
        *lead, H, T, hd = shape
        KV = self.heads[1]
        k, v = x[math.prod(shape):].reshape(2, *lead, KV, T, hd)
        return pieces(x, shape, blocks), k, v

    def by_heads(self, y: Array) -> Array:
        """y (..., T, H hd) as (..., H, T, hd)."""
        return y.reshape(y.shape[:-1] + (self.heads[0], y.shape[-1] // self.heads[0])).swapaxes(-3, -2)
