"""GPU: the lengths of the rows of W + s B A, and DoRA's factors, in one launch. The CUDA text is dora.cu."""

from __future__ import annotations

import functools
from typing import Any

from ...backend import override
from ...lora.gradients.dora import DoRAScale, lengths, shortest
from ...stored import Stored
from ..launch import RANKS, by_block, contiguous, has_kernel
from .low_rank import ROWS, THREADS, factor, rows_together

__all__ = ["FusedDoRAScale", "lengths_by_kernel"]

Array = Any

COLUMNS = 32  # rows of a block where W lies by columns: WIDE in dora.cu
AT_ONCE = 1 << 22  # elements of V, where there is no kernel: a block of the reference takes five launches, however small it is


@functools.cache
def text_for(r: int) -> str:
    return f"dora_{next(rank for rank in RANKS if rank >= r)}"


def has_kernels(W: Array, A: Array, B: Array, *m: Array) -> bool:
    return not isinstance(W, Stored) and has_kernel(W, A, B, *m) and 1 <= B.shape[1] <= RANKS[-1]


def start(xp: Any, W: Array, A: Array, B: Array, m: Array | None, s: float, groups: int, with_inverse: bool
          ) -> tuple[Array, Array | None]:
    """c, or with m rho, (out,); and 1 / c if that is wanted, too."""
    (out, n), r = W.shape, B.shape[1]
    result = xp.empty(out, dtype=W.dtype)
    inverse = xp.empty(out, dtype=W.dtype) if with_inverse else None
    by_columns = W.flags.f_contiguous and not W.flags.c_contiguous
    W, m = contiguous(xp, W.T if by_columns else W, m)
    (thin_A, *steps_A), (thin_B, *steps_B), size = factor(xp, A, 0), factor(xp, B, 1), out // groups
    arguments = (W, thin_A, thin_B, m, result, inverse, float(s), shortest(W.dtype), *steps_A, *steps_B, r, size, out, n)
    if by_columns:
        by_block(text_for(r), "dora_columns", -(-out // COLUMNS), THREADS, W.dtype, *arguments)
    else:
        together = min(ROWS, rows_together(out))
        by_block(text_for(r), "dora_rows", groups * -(-size // together), THREADS, W.dtype, *arguments, together)
    return result, inverse


@override(lengths, device="gpu")
def lengths_by_kernel(W: Array, A: Array, B: Array, s: float, groups: int, xp: Any, dtype: Any = None) -> Array:
    """`lengths` in one launch for r <= 16: to the bit those that `FusedDoRAScale` divides by, and never in TF32."""
    if not has_kernels(W, A, B) or dtype not in (None, W.dtype):
        return lengths(W, A, B, s, groups, xp, dtype, AT_ONCE)
    return start(xp, W, A, B, None, s, groups, False)[0]


@override(DoRAScale, device="gpu")
class FusedDoRAScale(DoRAScale):
    """`DoRAScale` in one launch forward for r <= 16, which gives rho and 1 / c at once; backward is the reference's."""

    at_once = AT_ONCE

    def forward(self, W: Array, A: Array, B: Array, m: Array) -> Array:
        if not has_kernels(W, A, B, m):
            self.kernel = ""
            return super().forward(W, A, B, m)
        rho, inverse = start(self.xp, W, A, B, m, self.s, self.groups, True in self.needs)
        if inverse is not None:
            kept = (W, A, B, rho) if True in self.needs[:3] else (None,) * 4
            self.save(*kept, inverse)
        return rho
