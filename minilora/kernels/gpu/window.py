"""GPU: the columns of a convolution in one launch, and many samples at once. The CUDA text is window.cu."""

from __future__ import annotations

import math
from typing import Any

from ...backend import override
from ...lora.gradients.convolution import LoRAConv
from ...ops.conv import Conv, Convolution
from ..launch import THREADS, by_block, by_element, contiguous, has_kernel

__all__ = ["WideConv", "WideLoRAConv"]

Array = Any

PIECE = 2048  # as in window.cu
AT_ONCE = 1 << 24  # numbers of X: 64 MB of float32, and a product of some thousand columns


class ByKernel(Convolution):
    """What both operations have here: their samples taken together, and X made, and added up, by one kernel.

    The reference copies, and adds, once for every kernel place and some 1,024 outputs, which suits the cache of a CPU.
    """

    def forward(self, x: Array, *others: Array) -> Array:
        self.in_shape = x.shape
        self.at_once = max(Convolution.at_once, AT_ONCE // max(1, x.shape[1] * math.prod(self.window.kernel)))
        if self.window.pointwise or not has_kernel(x):
            self.kernel = ""
        return super().forward(x, *others)

    def sizes(self, x: Array) -> list[int]:
        """What the kernels are told about x and the window, with a height of 1 where there is one axis."""
        n, channels, *lengths = x.shape
        outputs = self.window.out(tuple(lengths))
        pairs = [[*[least] * (2 - len(along)), *along] for least, along in zip(
            (1, 1, 1, 0, 1, 1), (lengths, *self.window, outputs))]
        return [n, channels, *(number for pair in pairs for number in pair)]

    def columns(self, x: Array, again: Array | None) -> Array:
        if self.window.pointwise or not has_kernel(x):
            return super().columns(x, again)
        sizes = self.sizes(x)
        rows, columns = x.shape[1] * math.prod(self.window.kernel), len(x) * sizes[-1] * sizes[-2]
        if again is None or again.shape != (rows, columns):
            again = self.xp.empty((rows, columns), dtype=x.dtype)
        by_block("window", "columns", rows * -(-columns // PIECE), THREADS, x.dtype, *contiguous(self.xp, x), again, *sizes)
        return again

    def from_columns(self, X: Array, into: Array) -> None:
        if self.window.pointwise or not has_kernel(X, into) or not into.flags.c_contiguous:
            super().from_columns(X, into)
            return
        by_element("window", "from_columns", into.size, X.dtype, *contiguous(self.xp, X), into, *self.sizes(into))


@override(Conv, device="gpu")
class WideConv(ByKernel, Conv):
    """`Conv` with its columns made by one kernel, forward and backward. But for sums over the samples, the same bits."""


@override(LoRAConv, device="gpu")
class WideLoRAConv(ByKernel, LoRAConv):
    """`LoRAConv`, likewise: between the kernels only products are left, and what puts y and dy in order."""
