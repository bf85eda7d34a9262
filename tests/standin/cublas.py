"""`cupy.cublas.gemm`, as strict as cuBLAS: it takes no empty matrix. And the functions of the library that minilora calls."""
from __future__ import annotations

import numpy as np

from .arrays import Address, ndarray
from .counts import count, is_recorded, perform


class CUBLASError(RuntimeError):
    """What cuBLAS refuses; CuPy's class of this name."""


def _leading(x):
    """The leading dimension that CuPy hands over for x, after it has copied what is neither row by row nor column by column."""
    if x.flags.f_contiguous or not x.flags.c_contiguous:
        return x.shape[0]
    return x.shape[1]


def gemm(transa, transb, a, b, out, alpha, beta):
    """out = alpha a b + beta out: one launch, and one more for every copy that CuPy makes of a strided array."""
    arrays = a, b, out
    assert transa == transb == "N" and all(isinstance(x, ndarray) and x.ndim == 2 for x in arrays)
    assert a.dtype == b.dtype == out.dtype and a.shape[1] == b.shape[0] and out.shape == (a.shape[0], b.shape[1])
    if a.dtype.char not in "fdFD":
        raise TypeError("invalid dtype")
    if min(map(_leading, arrays)) < 1:
        raise CUBLASError("CUBLAS_STATUS_INVALID_VALUE: a leading dimension of 0")
    if is_recorded():
        raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
    with np.errstate(all="ignore"):
        product = alpha * np.matmul(a._host, b._host)
        out._host[...] = product if beta == 0.0 else product + beta * out._host  # 0 times NaN is not read
    for x in (*arrays, out):  # out is copied back, too
        if not (x.flags.c_contiguous or x.flags.f_contiguous):
            count("copy", "launches")
    count("gemm", "launches")
    return out


INVALID = 7  # CUBLAS_STATUS_INVALID_VALUE
NOT_INITIALIZED = 1
TYPES = {0: (np.float32, 68), 1: (np.float64, 70), 2: (np.float16, 68)}  # cudaDataType: dtype, cublasComputeType_t
BFLOAT16 = 14  # here as its bits
TF32 = 77  # CUBLAS_COMPUTE_32F_FAST_TF32


def factor(x, kind, compute):
    """A factor as the library multiplies it: float32 but for float64."""
    return cut_to_tf32(x) if compute == TF32 else wide(x) if kind == BFLOAT16 else x.astype("float32") if kind == 2 else x


def cut_to_tf32(x):
    """float32 with 10 bits behind the point: the worse of two ways in which a card may do it. The other rounds to nearest."""
    return (x.view("uint32") & np.uint32(0xffffe000)).view("float32")


class Library:
    """In the place of the loaded library: functions that check their arguments as cuBLAS's pages say, and compute with NumPy.

    Matrices are stored by columns; `ld` numbers lie between two columns, at least as many as the matrix has rows. An address
    is one that `ndarray.data.ptr` gave, so that it is known how much memory lies behind it.
    """

    def __init__(self):
        self.streams, self.workspaces, self.calls = {}, {}, []
        self.kinds = []  # of every product: cudaDataType of its factors, cublasComputeType_t

    def cublasCreate_v2(self, handle):
        handle._obj.value = len(self.streams) + 1
        self.streams[handle._obj.value] = self.workspaces[handle._obj.value] = None
        return 0

    def cublasSetStream_v2(self, handle, stream):
        self.streams[handle.value], self.workspaces[handle.value] = stream, None
        return 0

    def cublasSetWorkspace_v2(self, handle, address, size):
        if address % 256 and address.root.nbytes < size:
            return INVALID
        self.workspaces[handle.value] = address, size
        return 0

    def cublasGemmEx(self, *arguments):
        return self._one(*map(_plain, arguments))

    def cublasGemmStridedBatchedEx(self, *arguments):
        return self._product(*map(_plain, arguments))

    def _one(self, handle, op_a, op_b, m, n, k, alpha, a, a_type, ld_a, b, b_type, ld_b, beta, c, c_type, ld_c, compute,
             algorithm):
        return self._product(handle, op_a, op_b, m, n, k, alpha, a, a_type, ld_a, 0, b, b_type, ld_b, 0, beta, c, c_type,
                             ld_c, 0, 1, compute, algorithm)

    def _product(self, handle, op_a, op_b, m, n, k, alpha, a, a_type, ld_a, next_a, b, b_type, ld_b, next_b, beta, c, c_type,
                 ld_c, next_c, matrices, compute, algorithm):
        if self.workspaces.get(handle) is None:
            return NOT_INITIALIZED  # cuBLAS would take memory of its own: not in a recording, and not as fast
        factors, expected = TYPES[a_type] if a_type != BFLOAT16 else (np.uint16, 68)
        dtype = TYPES[c_type][0]
        rows_a, rows_b = (k if op_a else m), (n if op_b else k)
        written = 0 if a_type in (2, BFLOAT16) else a_type
        in_tf32 = compute == TF32 and a_type == 0
        wrong = (a_type != b_type or c_type != written or compute != expected and not in_tf32 or algorithm != -1
                 or min(m, n, k, matrices) < 1
                 or op_a not in (0, 1) or op_b not in (0, 1) or ld_a < rows_a or ld_b < rows_b or ld_c < m
                 or matrices > 1 and next_c < ld_c * (n - 1) + m and next_c * (matrices - 1) + m > ld_c)  # they overlap
        if wrong:
            return INVALID
        self.calls.append((op_a, op_b, m, n, k, matrices))
        self.kinds.append((a_type, compute))
        one, two, out = (_matrices(place, kind, rows, columns, ld, step, matrices) for place, kind, rows, columns, ld, step in (
            (a, factors, rows_a, m if op_a else k, ld_a, next_a), (b, factors, rows_b, k if op_b else n, ld_b, next_b),
            (c, dtype, m, n, ld_c, next_c)))
        one, two = (x.swapaxes(-1, -2) if op else x for x, op in ((one, op_a), (two, op_b)))
        given = two, one
        times, kept = alpha._obj.value, beta._obj.value

        def compute_now():
            with np.errstate(all="ignore"):
                two, one = (factor(x, a_type, compute) for x in given)
                product = np.matmul(two.swapaxes(-1, -2), one.swapaxes(-1, -2)).swapaxes(-1, -2)
                if matrices == 1:
                    product = np.dot(two[0].T, one[0].T).T[None]
                product = product if times == 1.0 else dtype(times) * product
                out[...] = product if kept == 0.0 else product + dtype(kept) * out

        count("gemm", "launches")
        perform(compute_now)
        return 0


def _plain(argument):
    """What ctypes hands over as a number, as the number."""
    return getattr(argument, "value", argument)


def wide(bits):
    """The bits of bfloat16 as float32, of which they are the upper half."""
    return (bits.astype("uint32") << 16).view("float32")


def _matrices(place, dtype, rows, columns, ld, step, matrices):
    """A view (matrices, rows, columns) of the memory at an address; refused if it reaches beyond the array there."""
    place = Address.known(place)
    root = place.root  # the owner of the memory, dense in whatever order of its axes
    memory = np.lib.stride_tricks.as_strided(root, (root.size,), (root.itemsize,)).view(dtype)
    start, last = place.offset // memory.itemsize, (matrices - 1) * step + (columns - 1) * ld + rows
    if start + last > memory.size or start < 0:
        raise CUBLASError(f"a product reaches {start + last - memory.size} numbers beyond an array")
    size = memory.itemsize
    return np.lib.stride_tricks.as_strided(memory[start:], (matrices, rows, columns), (step * size, size, ld * size))
