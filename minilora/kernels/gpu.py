"""GPU: one kernel in the place of a chain of them. The CUDA text is in elementwise.cu.

CuPy is imported when a kernel is first called, so that the texts can be listed and compiled on a machine without a GPU.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy

from ..backend import override
from ..ops.activation import GELU
from ..ops.dropout import Dropout
from ..optim.adam import adam_update

__all__ = ["FusedDropout", "FusedGELU", "adam_update_fused", "sources"]

Array = Any

_TYPES = {"f": "float", "d": "double"}  # dtype.char -> the T of elementwise.cu; other dtypes take the reference
_THREADS = 256
_BLOCKS = 4096  # enough to fill any card; the kernels stride over what is left


def sources() -> dict[str, str]:
    """The CUDA C text of every module, by name: what the compile tests hand to NVRTC."""
    text = (Path(__file__).parent / "elementwise.cu").read_text(encoding="utf-8")
    return {f"elementwise_{T}": f"#define T {T}\n" + text.replace("_T(", f"_{T}(") for T in _TYPES.values()}


@functools.cache
def _module(T: str) -> Any:
    import cupy

    return cupy.RawModule(code=sources()[f"elementwise_{T}"], options=("--std=c++17",))


def _launch(name: str, n: int, dtype: Any, *arguments: Any) -> None:
    """Start a kernel on n elements. Python floats are passed as `dtype`, ints as 64-bit."""
    T = _TYPES[dtype.char]
    typed = [dtype.type(a) if isinstance(a, float) else numpy.int64(a) if isinstance(a, int) else a for a in arguments]
    blocks = min(_BLOCKS, -(-n // _THREADS))
    if blocks:
        _module(T).get_function(f"{name}_{T}")((blocks,), (_THREADS,), tuple(typed))


@override(adam_update, device="gpu")
def adam_update_fused(theta: Array, g: Array, m: Array, v: Array, beta1: float, beta2: float, size: float, eps: float,
                      keep: float) -> None:
    """`adam_update` as one kernel: the reference starts eleven."""
    if theta.dtype.char not in _TYPES:
        return adam_update(theta, g, m, v, beta1, beta2, size, eps, keep)
    _launch("adam", theta.size, theta.dtype, theta, g, m, v, theta.size, beta1, beta2, size, eps, keep)


@override(GELU, device="gpu")
class FusedGELU(GELU):
    """`GELU` with one kernel each way."""

    def forward(self, x: Array) -> Array:
        if x.dtype.char not in _TYPES:
            return super().forward(x)
        x = self.xp.ascontiguousarray(x)
        self.save(x)
        y = self.xp.empty_like(x)
        _launch("gelu", x.size, x.dtype, x, y, x.size)
        return y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        (x,) = self.saved
        if x.dtype.char not in _TYPES:
            return super().backward(dy)
        dx = self.xp.empty_like(x)
        _launch("gelu_backward", x.size, x.dtype, x, self.xp.ascontiguousarray(dy), dx, x.size)
        return (dx,)


@override(Dropout, device="gpu")
class FusedDropout(Dropout):
    """`Dropout` whose mask is one kernel: the same bits as the reference's hundred."""

    def _mask(self, like: Array) -> Array:
        if like.dtype.char not in _TYPES:
            return super()._mask(like)
        mask = self.xp.empty(like.shape, dtype=like.dtype)
        threshold = numpy.uint32(math.ceil(self.p * 2 ** 24))
        _launch("dropout_mask", mask.size, mask.dtype, mask, mask.size, numpy.uint64(self.seed), numpy.uint64(self.step),
                threshold, 1.0 / (1.0 - self.p))
        return mask
