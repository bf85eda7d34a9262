"""GPU: the thin products of a low-rank update, two launches forward and two to four behind. The CUDA text is low_rank.cu."""

from __future__ import annotations

from typing import Any

from ..backend import override
from ..lora.gradient import LoRALinear
from ..ops.linear import rows
from .launch import RANKS, by_block, by_element, contiguous, has_kernel

__all__ = ["FusedLoRALinear"]

Array = Any

THREADS = 256  # and ROWS and COLUMNS (WIDE): as in low_rank.cu
ROWS = 8
COLUMNS = 32
ENOUGH = 256  # blocks: with fewer, multiprocessors of a large card stand idle
CHUNK = 512  # rows that are added up before the sums of all chunks are: a thread meets 64 of them
MANY = 512  # chunks


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
            by_columns: Array | None, s: float, r: int, N: int, K: int) -> None:
    """Start a kernel whose blocks make rows of one result and columns of the other, of those that are not None.

    N rows of K numbers; the arrays are those of the text, in its order.
    """
    together, chunk = rows_together(N), chunk_of(N)
    units = (0 if by_rows is None else -(-chunk // together)) + (0 if by_columns is None else -(-K // COLUMNS))
    thin, along, beside = F
    by_block(text_for(r), name, -(-N // chunk) * units, THREADS, first.dtype, first, thin, w, by_rows, by_columns, s, together,
             chunk, along, beside, r, N, K)


@override(LoRALinear, device="gpu")
class FusedLoRALinear(LoRALinear):
    """`LoRALinear` whose products with A and B are kernels, for r <= 16; those with W are cuBLAS's, or the stored weight's.

    Forward:  y = x W^T, then z = x A^T and y += b + s z B^T in one launch.
    Backward: u = dy B and dB = s dy^T z in one, dx = dy W if it is wanted, dA = s u^T x and dx += s u A in one. From 513 rows
    on dB and dA are sums over chunks of rows, and a last launch adds the chunks up.
    """

    def forward(self, x: Array, W: Array, b: Array | None, A: Array, B: Array) -> Array:
        if not (1 <= len(A) <= RANKS[-1] and len(B) and has_kernel(x, A, B)):
            self.kernel = ""
            return super().forward(x, W, b, A, B)
        needs_x, needs_W, _, needs_A, needs_B = self.needs
        self.in_shape, xp, (n_out, r) = x.shape, self.xp, B.shape
        x = rows(x)
        N, n_in = x.shape
        y, z, together = self.dot(x, W.T), xp.empty((N, r), dtype=x.dtype), rows_together(N)
        (flat, bias), (thin_A, *steps_A), (thin_B, *steps_B) = contiguous(xp, x, b), factor(xp, A, 0), factor(xp, B, 1)
        by_block(text_for(r), "low_rank_forward", -(-N // together), THREADS, x.dtype, flat, thin_A, thin_B, bias, z, y, self.s,
                 together, *steps_A, *steps_B, r, N, n_in, n_out)
        self.save(x if needs_A or needs_W else None, z if needs_B else None,
                  W if needs_x else None, A if needs_x else None, B if needs_x or needs_A else None)
        return y.reshape(self.in_shape[:-1] + (n_out,))

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        needs_x, needs_W, needs_b, needs_A, needs_B = self.needs
        x, z, W, A, B = self.saved
        known = z if needs_B else B
        if known is None or not (self.kernel and has_kernel(dy, known)):
            return super().backward(dy)
        s, xp, r, dy = self.s, self.xp, known.shape[1], rows(dy)
        dx = dW = db = dA = dB = u = parts_A = parts_B = None
        N, n_out = dy.shape
        (flat,) = contiguous(xp, dy)
        if needs_B:
            dB, parts_B = self.summed(4, (n_out, r), N, dy.dtype)
        if needs_A or needs_x:
            u = xp.empty((N, r), dtype=dy.dtype)
        by_unit("low_rank_u_dB", flat, factor(xp, B, 1), z, u, parts_B, s, r, N, n_out)
        if needs_x:
            dx = self.dot(dy, W)
        if needs_A:
            dA, parts_A = self.summed(3, (r, x.shape[1]), N, dy.dtype)
        if u is not None:
            (x_flat,), n_in = contiguous(xp, x), (x if needs_A else A).shape[1]
            by_unit("low_rank_dA_dx", u, factor(xp, A, 0), x_flat, dx, parts_A, s, r, N, n_in)
        if parts_A is not dA or parts_B is not dB:
            n, m = (0 if d is None else d.size for d in (dA, dB))
            by_element(text_for(r), "low_rank_sums", n + m, dy.dtype, parts_A, parts_B, dA, dB, -(-N // chunk_of(N)), n, m)
        if needs_W:
            dW = self.dot(dy.T, x, out=self.into(1))
        if needs_b:
            db = dy.sum(axis=0)
        return None if dx is None else dx.reshape(self.in_shape), dW, db, dA, dB

    def summed(self, i: int, shape: tuple[int, int], N: int, dtype: Any) -> tuple[Array, Array]:
        """The gradient of input i, to be written, and where its sums over the chunks go: there, too, if there is one chunk."""
        whole, chunks = self.into(i), -(-N // chunk_of(N))
        if whole is None:
            whole = self.xp.empty(shape, dtype=dtype)
        return whole, whole if chunks == 1 else self.xp.empty((chunks, *shape), dtype=dtype)
