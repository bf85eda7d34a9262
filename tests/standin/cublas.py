"""`cupy.cublas.gemm`, as strict as cuBLAS: it takes no empty matrix."""
from __future__ import annotations

import numpy as np

from .arrays import ndarray
from .counts import count


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
    with np.errstate(all="ignore"):
        product = alpha * np.matmul(a._host, b._host)
        out._host[...] = product if beta == 0.0 else product + beta * out._host  # 0 times NaN is not read
    for x in (*arrays, out):  # out is copied back, too
        if not (x.flags.c_contiguous or x.flags.f_contiguous):
            count("copy", "launches")
    count("gemm", "launches")
    return out
