"""GPU: the thin products of a low-rank update, one launch forward and two or three behind. The CUDA text is low_rank.cu."""

from __future__ import annotations

import functools
from typing import Any

from ..backend import override
from ..lora.gradient import LoRALinear, LoRAUpdate
from ..ops.linear import rows
from .launch import RANKS, by_block, by_element, contiguous, has_kernel

__all__ = ["FusedLoRALinear", "FusedLoRAUpdate"]

Array = Any

THREADS = 256  # and ROWS and COLUMNS (WIDE): as in low_rank.cu
ROWS = 8
COLUMNS = 32
ENOUGH = 256  # blocks: with fewer, multiprocessors of a large card stand idle
CHUNK = 512  # rows that are added up before the sums of all chunks are: a thread meets 64 of them
MANY = 512  # chunks


@functools.cache
def text_for(r: int) -> str:
    return f"low_rank_{next(rank for rank in RANKS if rank >= r)}"


def rows_together(N: int) -> int:
    """The rows of a block. More of them read the factors less often, and too many leave too few blocks."""
    count = 1
    while count < ROWS and N >= 2 * count * ENOUGH:
        count *= 2
    return count


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
            by_columns: Array | None, s: float, r: int, N: int, K: int, *more: int) -> None:
    """Start a kernel whose blocks make rows of one result and columns of the other, of those that are not None.

    N rows of K numbers; the arrays are those of the text, in its order.
    """
    together, chunk = rows_together(N), chunk_of(N)
    units = (0 if by_rows is None else -(-chunk // together)) + (0 if by_columns is None else -(-K // COLUMNS))
    thin, along, beside = F
    by_block(text_for(r), name, -(-N // chunk) * units, THREADS, first.dtype, first, thin, w, by_rows, by_columns, float(s),
             together, chunk, along, beside, r, N, K, *more)


def updated(xp: Any, x: Array, A: Array, B: Array, b: Array | None, s: float, y: Array | None) -> tuple[Array, Array]:
    """y + b + s z B^T, in the place of y, and z = x A^T; without y, s z B^T in a new array. x (N, in)."""
    (N, n_in), (n_out, r) = x.shape, B.shape
    add, together, z = int(y is not None), rows_together(N), xp.empty((N, r), dtype=x.dtype)
    if y is None:
        y = xp.empty((N, n_out), dtype=x.dtype)
    (x, b), (thin_A, *steps_A), (thin_B, *steps_B) = contiguous(xp, x, b), factor(xp, A, 0), factor(xp, B, 1)
    by_block(text_for(r), "low_rank_forward", -(-N // together), THREADS, x.dtype, x, thin_A, thin_B, b, z, y, float(s),
             together, *steps_A, *steps_B, r, N, n_in, n_out, add)
    return y, z


def has_kernels(op: Any, x: Array, A: Array, B: Array) -> bool:
    """Whether there are kernels for this rank and dtype, and anything to compute; if not, `op` is the reference's."""
    found = 1 <= len(A) <= RANKS[-1] and len(B) > 0 and has_kernel(x, A, B)
    if not found:
        op.kernel = ""
    return found


def had_kernels(op: Any, dy: Array, z: Array | None, B: Array | None) -> bool:
    known = B if z is None else z
    return known is not None and bool(op.kernel) and has_kernel(dy, known)


def of_factors(op: Any, dy: Array, x: Array | None, z: Array | None, A: Array | None, B: Array | None, dx: Array | None,
               add: bool) -> tuple[Array | None, Array | None]:
    """dA and dB where they are wanted; s u A is added to dx, or written there. dy (N, out), x and dx (N, in)."""
    s, xp, dtype, (*_, needs_A, needs_B), (N, n_out) = op.s, op.xp, dy.dtype, op.needs, dy.shape
    dA = dB = u = parts_A = parts_B = None
    dy, x = contiguous(xp, dy, x)
    r: int = (B if z is None else z).shape[1]  # type: ignore[union-attr]
    if needs_B:
        dB, parts_B = summed(op, -1, (n_out, r), N, dtype)
    if needs_A or dx is not None:
        u = xp.empty((N, r), dtype=dtype)
    by_unit("low_rank_u_dB", dy, factor(xp, B, 1), z, u, parts_B, s, r, N, n_out)
    if u is not None:
        n_in: int = (dx if x is None else x).shape[1]  # type: ignore[union-attr]
        if needs_A:
            dA, parts_A = summed(op, -2, (r, n_in), N, dtype)
        by_unit("low_rank_dA_dx", u, factor(xp, A, 0), x if needs_A else None, dx, parts_A, s, r, N, n_in, int(add))
    if parts_A is not dA or parts_B is not dB:
        n, m = (0 if d is None else d.size for d in (dA, dB))
        by_element(text_for(r), "low_rank_sums", n + m, dtype, parts_A, parts_B, dA, dB, -(-N // chunk_of(N)), n, m)
    return dA, dB


def summed(op: Any, i: int, shape: tuple[int, int], N: int, dtype: Any) -> tuple[Array, Array]:
    """The gradient of input i, to be written, and where its sums over the chunks go: there, too, if there is one chunk."""
    whole, chunks = op.into(i % len(op.needs)), -(-N // chunk_of(N))
    if whole is None:
        whole = op.xp.empty(shape, dtype=dtype)
    return whole, whole if chunks == 1 else op.xp.empty((chunks, *shape), dtype=dtype)


@override(LoRALinear, device="gpu")
class FusedLoRALinear(LoRALinear):
    """`LoRALinear` whose products with A and B are kernels, for r <= 16; those with W are cuBLAS's, or the stored weight's.

    Forward:  y = x W^T, then z = x A^T and y += b + s z B^T in one launch.
    Backward: dx = dy W if it is wanted, u = dy B and dB = s dy^T z in one launch, dA = s u^T x and dx += s u A in one. From 513
    rows on dB and dA are sums over chunks of rows, and a last launch adds the chunks up.
    """

    def forward(self, x: Array, W: Array, b: Array | None, A: Array, B: Array) -> Array:
        if not has_kernels(self, x, A, B):
            return super().forward(x, W, b, A, B)
        needs_x, needs_W, _, needs_A, needs_B = self.needs
        self.in_shape = x.shape
        x = rows(x)
        y, z = updated(self.xp, x, A, B, b, self.s, self.dot(x, W.T))
        self.save(x if needs_A or needs_W else None, z if needs_B else None,
                  W if needs_x else None, A if needs_x else None, B if needs_x or needs_A else None)
        return y.reshape(self.in_shape[:-1] + B.shape[:1])

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        needs_x, needs_W, needs_b, *_ = self.needs
        x, z, W, A, B = self.saved
        if not had_kernels(self, dy, z, B):
            return super().backward(dy)
        dy = rows(dy)
        dx = self.dot(dy, W) if needs_x else None
        dA, dB = of_factors(self, dy, x, z, A, B, dx, True)
        dW = self.dot(dy.T, x, out=self.into(1)) if needs_W else None
        db = dy.sum(axis=0) if needs_b else None
        return None if dx is None else dx.reshape(self.in_shape), dW, db, dA, dB


@override(LoRAUpdate, device="gpu")
class FusedLoRAUpdate(LoRAUpdate):
    """`LoRAUpdate` in one launch forward, and two behind, or three from 513 rows on, as `FusedLoRALinear`."""

    def forward(self, x: Array, A: Array, B: Array) -> Array:
        if not has_kernels(self, x, A, B):
            return super().forward(x, A, B)
        needs_x, needs_A, needs_B = self.needs
        self.in_shape = x.shape
        x = rows(x)
        y, z = updated(self.xp, x, A, B, None, self.s, None)
        self.save(x if needs_A else None, z if needs_B else None, A if needs_x else None, B if needs_x or needs_A else None)
        return y.reshape(self.in_shape[:-1] + B.shape[:1])

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        x, z, A, B = self.saved
        if not had_kernels(self, dy, z, B):
            return super().backward(dy)
        dy = rows(dy)
        dx = self.xp.empty((len(dy), self.in_shape[-1]), dtype=dy.dtype) if self.needs[0] else None
        dA, dB = of_factors(self, dy, x, z, A, B, dx, False)
        return None if dx is None else dx.reshape(self.in_shape), dA, dB
