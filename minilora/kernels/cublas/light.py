"""GPU: a product that adds a bias to every row while it is written, by cublasLt, the lower of cuBLAS's two interfaces.

A pass over out in memory less, and a launch less: D = alpha L R + beta C + bias with C = D, where the bias, one number for each
row of D as cublasLt stores it, by columns, is one for each column of out (operands.py). A descriptor says what is computed, a
layout how a matrix lies; the library's heuristic names an algorithm for them, and its first answer is taken: nothing is timed,
so that the same shapes have the same bits. All this concerns the host only, and is done once for a kind of product.

Two things the pages do not say, learnt from others' reports: the alignment that may be asked for is that of the matrices, while
kernels may take for granted that a bias begins at a multiple of 16 bytes; and the heuristic of CUDA 13.3 fails with the status
14 while a stream records. So a bias that begins elsewhere is left to another launch, and what is refused while a stream records
is asked for again later.

Source: NVIDIA, cuBLAS library, part "Using the cuBLASLt API", and the header cublasLt.h of version 13.1.
"""

from __future__ import annotations

import ctypes
from typing import Any

from .operands import Operands

__all__ = ["ALIGNED", "KINDS", "Light", "Refused"]

ALIGNED = 256, 16  # bytes: where CUDA's own memory begins, and what every kernel is content with
BIAS, DEFAULT = 4, 1  # CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_DEFAULT
TRANSPOSED_LEFT, TRANSPOSED_RIGHT, EPILOGUE, BIAS_POINTER = 3, 4, 7, 8  # CUBLASLT_MATMUL_DESC_...
MAX_WORKSPACE, ALIGNMENTS = 1, (5, 6, 7, 8)  # CUBLASLT_MATMUL_PREF_...
NOT_TAKEN = {7, 8, 15}  # CUBLAS_STATUS_INVALID_VALUE, _ARCH_MISMATCH, _NOT_SUPPORTED: nothing was started

_i, _p, _size, _n = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_longlong
KINDS: dict[str, list[Any]] = {
    "cublasLtMatmulDescCreate": [_p, _i, _i],
    "cublasLtMatmulDescDestroy": [_p],
    "cublasLtMatmulDescSetAttribute": [_p, _i, _p, _size],
    "cublasLtMatrixLayoutCreate": [_p, _i, _n, _n, _n],
    "cublasLtMatrixLayoutDestroy": [_p],
    "cublasLtMatmulPreferenceCreate": [_p],
    "cublasLtMatmulPreferenceDestroy": [_p],
    "cublasLtMatmulPreferenceSetAttribute": [_p, _i, _p, _size],
    "cublasLtMatmulAlgoGetHeuristic": [_p, _p, _p, _p, _p, _p, _p, _i, _p, _p],
    "cublasLtMatmul": [_p, _p, _p, _p, _p, _p, _p, _p, _p, _p, _p, _p, _p, _p, _size, _p],
}


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [("algorithm", ctypes.c_uint64 * 8), ("workspace", ctypes.c_size_t), ("state", ctypes.c_int),
                ("waves", ctypes.c_float), ("reserved", ctypes.c_int * 4)]


class Refused(Exception):
    """cublasLt does not take a product; `failed` if it had taken it, and something went wrong on the way."""

    def __init__(self, call: str, status: int) -> None:
        super().__init__(f"{call} returned the status {status} (cublasStatus_t)")
        self.failed = call == "cublasLtMatmul" and status not in NOT_TAKEN


class Light:
    """cublasLt with the handle of a thread, and the stream and the workspace that this thread works with."""

    def __init__(self, library: Any, handle: Any) -> None:
        self.library, self.handle = library, handle
        self.stream, self.workspace, self.size = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t()

    def follow(self, stream: int, workspace: int, size: int) -> None:
        self.stream.value, self.workspace.value, self.size.value = stream, workspace, size


class Fused:
    """One kind of product, ready but for addresses and factors. It owns descriptors of cublasLt, and gives them back.

    Parameters
    ----------
    light : Light
    given : Operands
        Of one product, not of a stack.
    compute : int
        cublasComputeType_t.
    aligned : int
        At a multiple of so many bytes begin all arrays.
    bias : int
        The address of the first bias; 0 for products without.

    Raises
    ------
    Refused
        If cublasLt has no algorithm.
    """

    def __init__(self, light: Light, given: Operands, compute: int, aligned: int, bias: int) -> None:
        self.library = light.library
        self.owned: list[tuple[str, Any]] = []
        self.swapped = given.swapped
        self.left, self.right, self.out = (ctypes.c_void_p() for _ in range(3))
        self.alpha, self.beta = given.written.scalar(), given.written.scalar()
        self.bias, self.told, o = ctypes.c_void_p(bias), bias, given  # the operation knows the address `told`
        self.operation = self.new("cublasLtMatmulDesc", compute, o.written.data)  # the factors have the type of D
        for attribute, value in ((TRANSPOSED_LEFT, ctypes.c_int32(o.op_left)), (TRANSPOSED_RIGHT, ctypes.c_int32(o.op_right)),
                                 (EPILOGUE, ctypes.c_uint32(BIAS if bias else DEFAULT)), (BIAS_POINTER, self.bias)):
            self.set("cublasLtMatmulDesc", self.operation, attribute, value)
        left = self.new("cublasLtMatrixLayout", o.kind, *((o.k, o.m) if o.op_left else (o.m, o.k)), o.ld_left)
        right = self.new("cublasLtMatrixLayout", o.kind, *((o.n, o.k) if o.op_right else (o.k, o.n)), o.ld_right)
        out = self.new("cublasLtMatrixLayout", o.written.data, o.m, o.n, o.ld_out)
        self.found = self.first_algorithm(light, aligned, left, right, out)
        self.arguments = (
            light.handle, self.operation, ctypes.byref(self.alpha), self.left, left, self.right, right, ctypes.byref(self.beta),
            self.out, out, self.out, out, ctypes.byref(self.found.algorithm), light.workspace, light.size, light.stream)
        self.function = self.library.cublasLtMatmul

    def first_algorithm(self, light: Light, aligned: int, left: Any, right: Any, out: Any) -> Heuristic:
        preference = self.new("cublasLtMatmulPreference")
        self.set("cublasLtMatmulPreference", preference, MAX_WORKSPACE, ctypes.c_uint64(light.size.value))
        for attribute in ALIGNMENTS:
            self.set("cublasLtMatmulPreference", preference, attribute, ctypes.c_uint32(aligned))
        found, count = Heuristic(), ctypes.c_int()
        self.ask("cublasLtMatmulAlgoGetHeuristic", light.handle, self.operation, left, right, out, out, preference, 1,
                 ctypes.byref(found), ctypes.byref(count))
        if count.value < 1 or found.state:
            raise Refused("cublasLtMatmulAlgoGetHeuristic", found.state or 15)
        return found

    def ask(self, call: str, *arguments: Any) -> None:
        if status := getattr(self.library, call)(*arguments):
            raise Refused(call, status)

    def new(self, kind: str, *arguments: int) -> Any:
        made = ctypes.c_void_p()
        self.ask(f"{kind}Create", ctypes.byref(made), *arguments)
        self.owned.append((f"{kind}Destroy", made))
        return made

    def set(self, kind: str, made: Any, attribute: int, value: Any) -> None:
        self.ask(f"{kind}SetAttribute", made, attribute, ctypes.byref(value), ctypes.sizeof(value))

    def __call__(self, left: int, right: int, out: int, alpha: float, beta: float, bias: int) -> None:
        """D = alpha L R + beta D + bias at these addresses."""
        if bias != self.told:
            self.bias.value = bias
            self.set("cublasLtMatmulDesc", self.operation, BIAS_POINTER, self.bias)
            self.told = bias
        self.left.value, self.right.value, self.out.value, self.alpha.value, self.beta.value = left, right, out, alpha, beta
        if status := self.function(*self.arguments):
            raise Refused("cublasLtMatmul", status)

    def __del__(self) -> None:
        for call, made in self.owned:
            getattr(self.library, call)(made)  # host memory only: what was launched has all that it needs
