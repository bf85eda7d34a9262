"""GPU: rotary positions, one kernel each way for six passes. The CUDA text is in rows.cu."""

from __future__ import annotations

import math
from typing import Any

from ...backend import override
from ...ops.rotary import Rotary
from ..launch import by_row, contiguous, has_kernel

__all__ = ["FusedRotary"]

Array = Any


@override(Rotary, device="gpu")
class FusedRotary(Rotary):
    """`Rotary` with one kernel each way. y has its heads where x has them: side by side in a token, or one after the other."""

    def forward(self, x: Array) -> Array:
        if not has_kernel(x):
            self.kernel = ""
            return super().forward(x)
        return self.turned(x, 1.0)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        return (self.turned(dy, -1.0),) if has_kernel(dy) else super().backward(dy)

    def turned(self, x: Array, sign: float) -> Array:
        xp, (T, hd), heads = self.xp, x.shape[-2:], 1
        memory = x
        if x.ndim > 2 and not x.flags.c_contiguous:
            memory = x.swapaxes(-3, -2)
            heads = x.shape[-3]
        if not memory.flags.c_contiguous:
            memory, heads = xp.ascontiguousarray(x), 1
        cos, sin, steps = self.tables(x)
        y = xp.empty(memory.shape, dtype=x.dtype)
        each = x.shape[-3] if x.ndim > 2 and heads == 1 else 1
        by_row("rotary", x.size // (heads * hd), heads * hd, x.dtype, memory, y, cos, sin, sign, T, each, hd, *steps)
        return y if heads == 1 else y.swapaxes(-3, -2)

    def tables(self, x: Array) -> tuple[Array, Array, list[int]]:
        """cos and sin in C order, and their steps from text to text, head and token, in rows."""
        cos, sin, n = self.cos, self.sin, x.ndim
        lead = (1,) * (n - cos.ndim) + cos.shape[:-3]
        if n > 3 and cos.ndim > 3 and cos.shape[:-3] != x.shape[:-3] and math.prod(cos.shape[:-3]) > 1:
            lead = x.shape[:-3]  # some texts share, others do not
            cos, sin = (self.xp.broadcast_to(a, (*lead, *a.shape[-3:])) for a in (cos, sin))
        cos, sin = (a.astype(x.dtype, copy=False) for a in contiguous(self.xp, cos, sin))  # of float16, whose x is float32 here
        steps, step = [], 1
        for size in (cos.shape[-2], cos.shape[-3] if cos.ndim > 2 else 1, math.prod(lead)):
            steps.append(step if size > 1 else 0)
            step *= size
        return cos, sin, steps[::-1]
