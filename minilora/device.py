"""What a device is: a memory, the array module that computes there, and the few primitives that differ."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy

from .errors import ConfigError
from .replay import current, expect, refuse_waiting
from .tensor_cores import tf32
from .versions import Versions, kernels

__all__ = ["GPU", "Device", "array_module"]

Array = Any
F = TypeVar("F")

CONSTANTS = 1000  # kept on a GPU at most


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
    exact : module
        As `xp`, and float32 matrices are multiplied in true float32 whatever `tf32` of `minilora.use` says: for what is merged,
        factorised or compared.
    in_tf32 : bool
        Whether `xp` multiplies float32 matrices in TF32; see `tensor_cores`.
    """

    in_tf32 = False
    multiplies_16_bits = False  # whether `matmul_of_16_bits` is worth a try

    def __init__(self, name: str, xp: Any, array_type: type) -> None:
        self.name = name
        self.xp = xp
        self.array_type = array_type
        self._file = name  # of kernels/ with its versions
        self.renew()
        self._ones = {numpy.dtype(kind): xp.asarray(_one(kind)) for kind in ("float16", "float32", "float64")}

    def renew(self) -> None:
        """Forget which versions were found: they are looked for anew.

        The mapping is exchanged, and not emptied: what another thread just looks up by the former choice goes into the former.
        """
        self.versions: dict[Any, Any] = Versions(self._file)

    @property
    def exact(self) -> Any:
        return self.xp

    def resolve(self, reference: F) -> F:
        """The version of an operation or function made for this device, or the reference itself if there is none."""
        return self.versions[reference]  # type: ignore[no-any-return]

    @property
    def recorded(self) -> bool:
        """Whether a step is being recorded here, which may rely on nothing that the host holds and may hold otherwise later."""
        return False

    def one(self, dtype: Any) -> Array:
        """The number 1, an array () that is read and never written: of a floating-point dtype the same array every time.

        Every backward begins with it, and finds it there without a launch. It was made with the device: so it is complete for
        every stream and thread, and does not lie in memory that a recorded step takes along when it goes.
        """
        kept = self._ones.get(dtype)
        return self.xp.ones((), dtype=dtype) if kept is None else kept

    def to_host(self, array: Array) -> numpy.ndarray:
        return array  # type: ignore[no-any-return]

    def from_host(self, array: numpy.ndarray) -> Array:
        return array

    def keep(self, array: numpy.ndarray) -> Array:
        """A copy that the caller keeps for all later calls: it may be made while a step is recorded."""
        return self.from_host(array)

    def constant(self, array: numpy.ndarray) -> Array:
        """A small array that is never written: one copy for all who need the same numbers, also while a step is recorded."""
        return self.from_host(array)

    def add_matmul(self, out: Array, a: Array, b: Array, scale: float) -> None:
        """out += scale (a @ b), in place; the factor goes into the smaller operand."""
        if scale != 1.0:
            a, b = (a * scale, b) if a.size < b.size else (a, b * scale)
        out += self.xp.dot(a, b)  # not `@`: NumPy's matmul leaves BLAS when the inner length is 1 (measured: 5 times slower)

    def matmul_of_16_bits(self, out: Array, a: Array, b: Array, bias: Array | None = None) -> bool:
        """out = a b + bias for factors of 16 bits, added up in float32, if there are such products: whether it was done.

        `out` is float32, and so is the bias, which is added to every row; `a` and `b` are float16, or bfloat16, or uint16 that
        are the bits of bfloat16.
        """
        return False

    def synchronize(self) -> None:
        """Wait until the device has finished. The CPU always has."""

    def __repr__(self) -> str:
        try:
            plain = not kernels()
        except ConfigError:  # MINILORA_KERNELS: the first operation will say so
            plain = False
        return (f"<Device {self.name}: {self.xp.__name__}{', products in TF32' if self.in_tf32 else ''}"
                f"{', without kernels' if plain else ''}>")


def _one(kind: str) -> numpy.ndarray:
    one = numpy.ones((), kind)
    one.flags.writeable = False  # where it is used as it is, on the CPU, whoever writes into it gets an error
    return one


def array_module(xp: Any) -> Any:
    """The module a device computes with, from the one it was made with: an override may put its own products into it."""
    return xp


class GPU(Device):
    """One GPU, with CuPy or what stands for it."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._constants: dict[Any, Array] = {}
        self._modules: dict[Any, Any] = {}  # what makes an array module -> what it made: tried out once
        super().__init__("gpu", cupy, cupy.ndarray)
        self.synchronize()  # the numbers 1 have arrived, for all streams

    def renew(self) -> None:
        super().renew()
        make = self.resolve(array_module)
        if make not in self._modules:
            self._modules[make] = make(self._cupy)
        self._exact = self._modules[make]
        self.multiplies_16_bits = hasattr(self._exact, "products")
        self.in_tf32 = tf32() and self.multiplies_16_bits
        self.xp = self._exact.in_tf32 if self.in_tf32 else self._exact

    @property
    def exact(self) -> Any:
        return self._exact

    @property
    def recorded(self) -> bool:
        return current() is not None

    def to_host(self, array: Array) -> numpy.ndarray:
        refuse_waiting("to_host")
        return self.xp.asnumpy(array)  # type: ignore[no-any-return]  # sync point

    def from_host(self, array: numpy.ndarray) -> Array:
        refuse_waiting("to_device")
        return self.xp.asarray(array)

    def keep(self, array: numpy.ndarray) -> Array:
        with self.xp.cuda.using_allocator(None):  # not from the pool of a recorded step, which it may outlive
            return self.xp.asarray(array)

    def constant(self, array: numpy.ndarray) -> Array:
        key = array.dtype.str, array.shape, array.tobytes()
        found = self._constants.get(key)
        if found is None:
            if len(self._constants) >= CONSTANTS:
                self._constants.clear()
            self._constants[key] = found = self.keep(array)
        expect("a constant on the device", lambda: (found,))  # so that it lives as long as the recording
        return found

    def add_matmul(self, out: Array, a: Array, b: Array, scale: float) -> None:
        if a.size == 0 or b.size == 0:
            return  # adds nothing; and cuBLAS refuses a matrix without rows or columns
        if hasattr(self.xp, "products") and self.xp.products.gemm(a, b, out, scale, 1.0):
            return
        if out.dtype.char in "fd" and a.dtype == b.dtype == out.dtype and out.flags.c_contiguous:
            # One cuBLAS call that accumulates into out: no temporary, no scaling kernel.
            self.xp.cublas.gemm("N", "N", a, b, out=out, alpha=scale, beta=1.0)
        else:
            super().add_matmul(out, a, b, scale)

    def matmul_of_16_bits(self, out: Array, a: Array, b: Array, bias: Array | None = None) -> bool:
        return self.multiplies_16_bits and self.xp.products.gemm(a, b, out, bias=bias)

    def synchronize(self) -> None:
        self.xp.cuda.get_current_stream().synchronize()
