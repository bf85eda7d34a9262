"""What a device is: a memory, the array module that computes there, and the few primitives that differ."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy

from .replay import refuse_waiting
from .versions import Versions

__all__ = ["GPU", "Device", "array_module"]

Array = Any
F = TypeVar("F")


class Device:
    """One kind of memory, and the array module that computes there.

    Attributes
    ----------
    name : str
        ``"cpu"`` or ``"gpu"``.
    xp : module
        `numpy` or `cupy`.
    array_type : type
        The type of the arrays that live there.
    """

    def __init__(self, name: str, xp: Any, array_type: type) -> None:
        self.name = name
        self.xp = xp
        self.array_type = array_type
        self.versions = Versions(name)

    def resolve(self, reference: F) -> F:
        """The version of an operation or function made for this device, or the reference itself if there is none."""
        return self.versions[reference]  # type: ignore[no-any-return]

    def to_host(self, array: Array) -> numpy.ndarray:
        return array  # type: ignore[no-any-return]

    def from_host(self, array: numpy.ndarray) -> Array:
        return array

    def add_matmul(self, out: Array, a: Array, b: Array, scale: float) -> None:
        """out += scale (a @ b), in place; the factor goes into the smaller operand."""
        if scale != 1.0:
            a, b = (a * scale, b) if a.size < b.size else (a, b * scale)
        out += self.xp.dot(a, b)  # not `@`: NumPy's matmul leaves BLAS when the inner length is 1 (measured: 5 times slower)

    def synchronize(self) -> None:
        """Wait until the device has finished. The CPU always has."""

    def __repr__(self) -> str:
        return f"<Device {self.name}: {self.xp.__name__}>"


def array_module(xp: Any) -> Any:
    """The module a device computes with, from the one it was made with: an override may put its own products into it."""
    return xp


class GPU(Device):
    """One GPU, with CuPy or what stands for it."""

    def __init__(self, cupy: Any) -> None:
        super().__init__("gpu", cupy, cupy.ndarray)
        self.xp = self.resolve(array_module)(cupy)

    def to_host(self, array: Array) -> numpy.ndarray:
        refuse_waiting("to_host")
        return self.xp.asnumpy(array)  # type: ignore[no-any-return]  # sync point

    def from_host(self, array: numpy.ndarray) -> Array:
        refuse_waiting("to_device")
        return self.xp.asarray(array)

    def add_matmul(self, out: Array, a: Array, b: Array, scale: float) -> None:
        if a.size == 0 or b.size == 0:
            return  # adds nothing; and cuBLAS refuses a matrix without rows or columns
        if hasattr(self.xp, "products") and self.xp.products.gemm(a, b, out, scale, 1.0):
            return
        if out.dtype.char in "fd" and out.flags.c_contiguous:
            # One cuBLAS call that accumulates into out: no temporary, no scaling kernel.
            self.xp.cublas.gemm("N", "N", a, b, out=out, alpha=scale, beta=1.0)
        else:
            super().add_matmul(out, a, b, scale)

    def synchronize(self) -> None:
        self.xp.cuda.get_current_stream().synchronize()
