"""A linear layer with a low-rank update on the CPU."""

from __future__ import annotations

import math
from typing import Any

import numpy

from ...backend import override
from ...lora.gradient import LoRALinear
from ...ops.linear import rows, unrows
from .blocks import BLOCK, row_blocks, scratch

__all__ = ["BlockedLoRALinear"]

Array = Any


@override(LoRALinear, device="cpu")
class BlockedLoRALinear(LoRALinear):
    """`LoRALinear` whose forward adds update and bias to x W^T in one walk over y, some rows at a time in the cache."""

    def forward(self, x: Array, W: Array, b: Array | None, A: Array, B: Array) -> Array:
        if x.dtype.char not in "fd" or math.prod(x.shape[:-1]) * len(W) <= BLOCK:  # one block: nothing to win
            self.kernel = ""
            return super().forward(x, W, b, A, B)
        needs_x, needs_W, _, needs_A, needs_B = self.needs
        self.in_shape = x.shape
        x, dot = rows(x), self.dot
        z = dot(x, A.T)
        y = dot(x, W.T)
        scaled, BT = z * self.s, numpy.ascontiguousarray(B.T, like=B)
        for part in row_blocks(y, BLOCK):
            some = y[part]
            update = dot(scaled[part], BT, out=scratch(some.size, y).reshape(some.shape))
            if b is not None:
                update += b
            some += update
        self.save(x if needs_A or needs_W else None, z if needs_B else None,
                  W if needs_x else None, A if needs_x else None, B if needs_x or needs_A else None)
        return unrows(y, self.in_shape)
