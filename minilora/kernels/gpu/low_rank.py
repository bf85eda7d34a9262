"""GPU: the thin products of a low-rank update, one launch forward and two or three behind. The CUDA text is low_rank.cu."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...backend import override
from ...lora.gradient import LoRALinear, LoRAUpdate
from ...ops.linear import rows, unrows
from ..cublas.products import accumulate
from ..launch import RANKS, by_block, by_element, contiguous, has_kernel
from .linear import with_bias

__all__ = ["FusedLoRALinear", "FusedLoRAUpdate", "Slots", "beside_weight", "had_kernels", "has_kernels", "update_alone",
           "updated"]

Array = Any

THREADS = 256  # and ROWS and COLUMNS (WIDE): as in low_rank.cu
ROWS = 8
COLUMNS = 32
ENOUGH = 256  # blocks: with fewer, multiprocessors of a large card stand idle
CHUNK = 512  # rows that are added up before the sums of all chunks are: a thread meets 64 of them
MANY = 512  # chunks
# From so many numbers of z on, N r, cuBLAS makes u and dB, or everything: there the card counts, not the host. On an H100 u and
# dB of 4,096 rows, 768 x 2,304 and rank 8 take our kernel 93 us and cuBLAS 55; all that is thin at rank 16 takes 254 and 175.
# With few numbers the host is what counts: a launch for two products.
U_BY_CUBLAS, ALL_BY_CUBLAS = 1 << 14, 1 << 16


class Slots(NamedTuple):
    """Which columns of y have an update of their own: `width` of them for each bit of `mask`. A plain layer is one slot."""

    mask: int
    enabled: int  # the bits that are set
    width: int


@functools.cache
def text_for(r: int) -> str:
    return f"low_rank_{next(rank for rank in RANKS if rank >= r)}"


def rows_together(N: int) -> int:
    """The rows of a block. More of them read the factors less often, and too many leave too few blocks."""
    count = 1
    while count < ROWS and N >= 2 * count * ENOUGH:
        count *= 2
    return count


def by_cublas(N: int, r: int, limit: int) -> bool:
    return N * r >= limit or r > RANKS[-1]


def chunk_of(N: int) -> int:
    """The rows of a chunk: 512, and more for hundreds of thousands, so that chunks stay few and sums short."""
    return min(N, CHUNK * -(-N // (CHUNK * MANY)))


def factor(xp: Any, F: Array | None, ranks: int) -> tuple[Array | None, int, int]:
    """A or B as it lies in memory, and the steps to its next column and to its next rank; `ranks` is the axis of the ranks."""
    if F is None:
        return None, 0, 0
    if not F.flags.c_contiguous:
        if F.flags.f_contiguous:
            F, ranks = F.T, 1 - ranks
        else:
            F = xp.ascontiguousarray(F)
    step = F.shape[1]
    return (F, step, 1) if ranks else (F, 1, step)


def by_unit(name: str, first: Array, F: tuple[Array | None, int, int], w: Array | None, by_rows: Array | None,
            by_columns: Array | None, s: float, r: int, N: int, K: int, *more: int, slots: Slots | None = None) -> None:
    """Start a kernel whose blocks make rows of one result and columns of the other, of those that are not None.

    N rows of K numbers; the arrays are those of the text, in its order. With `slots`, of every slot.
    """
    _, enabled, width = slots or Slots(1, 1, K)
    together, chunk = rows_together(N * enabled), chunk_of(N)
    units = (0 if by_rows is None else -(-chunk // together)) + (0 if by_columns is None else -(-width // COLUMNS))
    thin, along, beside = F
    by_block(text_for(r), name, -(-N // chunk) * units * enabled, THREADS, first.dtype, first, thin, w, by_rows, by_columns,
             float(s), together, chunk, along, beside, r, N, K, *more, *(slots or ()))


def stacks(slots: Slots, y: Array, z: Array, B: Array) -> Iterator[tuple[Array, Array, Array]]:
    """Views for products slot by slot: y (..., N, width), z (..., N, r) and B (..., width, r).

    Stacks of all slots where they are evenly spaced, as any two are: then one product computes all. Else those of each.
    """
    mask, enabled, width = slots
    if width == y.shape[1]:
        yield y, z, B
        return
    places = [i for i in range(mask.bit_length()) if mask >> i & 1]
    r, step = B.shape[1], places[1] - places[0] if enabled > 1 else 1
    even = range(places[0], places[-1] + 1, step)
    if list(even) == places:
        y, z = (a.reshape(len(a), -1, n).transpose(1, 0, 2) for a, n in ((y, width), (z, r)))
        yield y[even.start:even.stop:even.step], z, B.reshape(enabled, width, r)
        return
    for e, i in enumerate(places):
        yield y[:, i * width:(i + 1) * width], z[:, e * r:(e + 1) * r], B[e * width:(e + 1) * width]


def updated(xp: Any, x: Array, A: Array, B: Array, b: Array | None, s: float, y: Array, add: bool, slots: Slots) -> Array:
    """z = x A^T; in the columns of the slots y + b + s z B^T is written to y, or without `add` s z B^T. x (N, in)."""
    (N, n_in), r = x.shape, B.shape[1]
    z = xp.empty((N, slots.enabled * r), dtype=x.dtype)
    if by_cublas(N, r, ALL_BY_CUBLAS):
        accumulate(xp, x, A.T, z)
        for some_y, some_z, some_B in stacks(slots, y, z, B):
            accumulate(xp, some_z, some_B.swapaxes(-1, -2), some_y, s, float(add))
        if b is not None:
            y += b
        return z
    together = rows_together(N * slots.enabled)
    (x, b), (thin_A, *steps_A), (thin_B, *steps_B) = contiguous(xp, x, b), factor(xp, A, 0), factor(xp, B, 1)
    by_block(text_for(r), "low_rank_forward", -(-N // together) * slots.enabled, THREADS, x.dtype, x, thin_A, thin_B, b, z, y,
             float(s), together, *steps_A, *steps_B, r, N, n_in, y.shape[1], int(add), *slots)
    return z


def has_kernels(op: Any, x: Array, A: Array, B: Array) -> bool:
    """Whether there are kernels for this rank and dtype, and anything to compute; if not, `op` is the reference's."""
    found = 1 <= B.shape[1] <= RANKS[-1] and len(B) > 0 and has_kernel(x, A, B)
    if not found:
        op.kernel = ""
    return found


def had_kernels(op: Any, dy: Array, z: Array | None, B: Array | None) -> bool:
    known = B if z is None else z
    return known is not None and bool(op.kernel) and has_kernel(dy, known)


def of_factors(op: Any, dy: Array, x: Array | None, z: Array | None, A: Array | None, B: Array | None, dx: Array | None,
               add: bool, slots: Slots) -> tuple[Array | None, Array | None]:
    """dA and dB where they are wanted; s u A is added to dx, or written there. dy (N, out), x and dx (N, in)."""
    xp, N, r = op.xp, len(dy), z.shape[1] // slots.enabled if B is None else B.shape[1]  # type: ignore[union-attr]
    dy, x = contiguous(xp, dy, x)
    dA = parts_A = u = None
    if op.needs[-2] or dx is not None:
        u = xp.empty((N, slots.enabled * r), dtype=dy.dtype)
    dB, parts_B = with_dy(op, dy, z, B, u, r, slots)
    if u is not None:
        dA, parts_A = with_u(op, u, x, A, dx, add)
    n, m = (0 if parts is None else parts[0].size for parts in (parts_A, parts_B))
    if n or m:
        chunks, text = -(-N // chunk_of(N)), text_for(min(r, RANKS[-1]))
        by_element(text, "low_rank_sums", n + m, dy.dtype, parts_A, parts_B, dA, dB, chunks, n, m)
    return dA, dB


def with_dy(op: Any, dy: Array, z: Array | None, B: Array | None, u: Array | None, r: int, slots: Slots
            ) -> tuple[Array | None, Array | None]:
    """Write u = dy B, and dB = s dy^T z: that, or its sums over chunks, which are yet to be added up, and where to."""
    xp, (N, n_out) = op.xp, dy.shape
    dB = room(op, -1, (slots.enabled * slots.width, r), dy.dtype) if op.needs[-1] else None
    if by_cublas(N, r, U_BY_CUBLAS):
        for some_dy, some_u, some_B in () if u is None else stacks(slots, dy, u, B):
            accumulate(xp, some_dy, some_B, some_u)
        for some_dy, some_z, some_dB in () if dB is None else stacks(slots, dy, z, dB):
            accumulate(xp, some_dy.swapaxes(-1, -2), some_z, some_dB, op.s)
        return dB, None
    parts = in_chunks(xp, dB, N)
    by_unit("low_rank_u_dB", dy, factor(xp, B, 1), z, u, dB if parts is None else parts, op.s, r, N, n_out, slots=slots)
    return dB, parts


def with_u(op: Any, u: Array, x: Array | None, A: Array | None, dx: Array | None, add: bool
           ) -> tuple[Array | None, Array | None]:
    """Write s u A into dx, or add it, and dA = s u^T x, likewise. All slots share x: their ranks count together."""
    xp, (N, r), n_in = op.xp, u.shape, (dx if x is None else x).shape[1]  # type: ignore[union-attr]
    dA = room(op, -2, (r, n_in), u.dtype) if op.needs[-2] else None
    if by_cublas(N, r, ALL_BY_CUBLAS):
        if dA is not None:
            accumulate(xp, u.T, x, dA, op.s)
        if dx is not None:
            accumulate(xp, u, A, dx, op.s, float(add))
        return dA, None
    parts = in_chunks(xp, dA, N)
    by_unit("low_rank_dA_dx", u, factor(xp, A, 0), None if dA is None else x, dx, dA if parts is None else parts, op.s, r, N,
            n_in, int(add))
    return dA, parts


def room(op: Any, i: int, shape: tuple[int, int], dtype: Any) -> Array:
    """Where the gradient of input i, counted from the end, is to be written."""
    whole = op.into(i % len(op.needs))
    return op.xp.empty(shape, dtype=dtype) if whole is None else whole


def in_chunks(xp: Any, whole: Array | None, N: int) -> Array | None:
    """Room for the sums over chunks of rows; None where nothing is wanted, or one chunk holds all rows."""
    chunks = -(-N // chunk_of(N))
    return None if whole is None or chunks == 1 else xp.empty((chunks, *whole.shape), dtype=whole.dtype)


def beside_weight(op: Any, dy: Array, slots: Slots) -> tuple[Array | None, ...]:
    """The gradients of x, W, b, A and B where kernels ran forward, beside a frozen weight or a trained one."""
    needs_x, needs_W, needs_b, *_ = op.needs
    x, z, W, A, B = op.saved
    dy = rows(dy)
    dx = op.dot(dy, W) if needs_x else None
    dA, dB = of_factors(op, dy, x, z, A, B, dx, True, slots)
    dW = op.dot(dy.T, x, out=op.into(1)) if needs_W else None
    db = dy.sum(axis=0, out=op.into(2)) if needs_b else None
    return None if dx is None else dx.reshape(op.in_shape), dW, db, dA, dB


def update_alone(op: Any, dy: Array, slots: Slots) -> tuple[Array | None, ...]:
    """Likewise those of x, A and B, of an update without the weight."""
    x, z, A, B = op.saved
    dy = rows(dy)
    dx = op.xp.empty((len(dy), op.in_shape[-1]), dtype=dy.dtype) if op.needs[0] else None
    dA, dB = of_factors(op, dy, x, z, A, B, dx, False, slots)
    return None if dx is None else dx.reshape(op.in_shape), dA, dB


@override(LoRALinear, device="gpu")
class FusedLoRALinear(LoRALinear):
    """`LoRALinear` whose products with A and B are kernels, for r <= 16; those with W are cuBLAS's, or the stored weight's.

    Forward:  y = x W^T, then z = x A^T and y += b + s z B^T in one launch.
    Backward: dx = dy W if it is wanted, u = dy B and dB = s dy^T z in one launch, dA = s u^T x and dx += s u A in one. From 513
    rows on dB and dA are sums over chunks of rows, and a last launch adds the chunks up.
    With many rows cuBLAS makes u and dB, or all products (`U_BY_CUBLAS`).
    """

    def forward(self, x: Array, W: Array, b: Array | None, A: Array, B: Array) -> Array:
        if not has_kernels(self, x, A, B):
            return super().forward(x, W, b, A, B)
        needs_x, needs_W, _, needs_A, needs_B = self.needs
        self.in_shape = x.shape
        x = rows(x)
        y = with_bias(self.xp, x, W, b)  # as `Linear` asks for it: with B = 0 the layer has its bits
        added, slots = y is not None, Slots(1, 1, len(B))
        y = y if added else self.dot(x, W.T)
        z = updated(self.xp, x, A, B, None if added else b, self.s, y, True, slots)
        self.save(x if needs_A or needs_W else None, z if needs_B else None,
                  W if needs_x else None, A if needs_x else None, B if needs_x or needs_A else None)
        return unrows(y, self.in_shape)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        _, z, *_, B = self.saved
        return beside_weight(self, dy, Slots(1, 1, dy.shape[-1])) if had_kernels(self, dy, z, B) else super().backward(dy)


@override(LoRAUpdate, device="gpu")
class FusedLoRAUpdate(LoRAUpdate):
    """`LoRAUpdate` in one launch forward, and two behind, or three from 513 rows on, as `FusedLoRALinear`."""

    def forward(self, x: Array, A: Array, B: Array) -> Array:
        if not has_kernels(self, x, A, B):
            return super().forward(x, A, B)
        needs_x, needs_A, needs_B = self.needs
        self.in_shape = x.shape
        x = rows(x)
        y = self.xp.empty((len(x), len(B)), dtype=x.dtype)
        z = updated(self.xp, x, A, B, None, self.s, y, False, Slots(1, 1, len(B)))
        self.save(x if needs_A else None, z if needs_B else None, A if needs_x else None, B if needs_x or needs_A else None)
        return unrows(y, self.in_shape)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        _, z, _, B = self.saved
        return update_alone(self, dy, Slots(1, 1, dy.shape[-1])) if had_kernels(self, dy, z, B) else super().backward(dy)
