"""GPU: float32 rounded to 16 bits with one kernel, for products of 16 bits. The CUDA text is elementwise.cu."""

from __future__ import annotations

from typing import Any

from ...backend import device_of, override
from ...quant.halves import narrowed
from ..launch import by_element, contiguous

__all__ = ["narrowed_by_kernel"]

Array = Any


@override(narrowed, device="gpu")
def narrowed_by_kernel(x: Array, kind: str) -> Array:
    """`narrowed` of float32 as one kernel: the reference starts six for bfloat16, and CuPy's own cast knows little of it."""
    if x.dtype.char != "f":
        return narrowed(x, kind)
    xp = device_of(x).xp
    (x,) = contiguous(xp, x)
    bits = xp.empty(x.shape, dtype="uint16")
    by_element("elementwise", f"to_{kind}", -(-x.size // 4), x.dtype, x, bits, x.size)
    return bits.view("float16") if kind == "float16" else bits
