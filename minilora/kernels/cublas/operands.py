"""GPU: what cuBLAS is told about a product, from shapes, strides and dtypes.

cuBLAS stores matrices by columns, so that the memory of a matrix by rows is for it the transpose: out = a b is asked for as
out^T = b^T a^T, and nothing is moved.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

__all__ = ["HALVES", "TYPES", "Operands", "Type", "in_copies", "operands"]

Array = Any

MOST = 2 ** 31  # sizes and distances are C ints


class Type(NamedTuple):
    """What cuBLAS calls a dtype: cudaDataType, cublasComputeType_t, and the type of the factors."""

    data: int
    compute: int
    scalar: Any


TYPES = {"f": Type(0, 68, ctypes.c_float), "d": Type(1, 70, ctypes.c_double)}
# cudaDataType of factors of a product that is added up, and written, in float32. uint16 are the bits of bfloat16, as in quant.
HALVES = {"float16": 2, "bfloat16": 14, "uint16": 14}


class Operands(NamedTuple):
    """Products D = op(L) op(R) of matrices stored by columns: D (m, n), op(L) (m, k), op(R) (k, n)."""

    swapped: bool  # L is a and R is b, since out is ordered by columns; else L is b, R is a, and D is out^T
    op_left: int  # 1: to be transposed
    op_right: int
    m: int
    n: int
    k: int
    ld_left: int  # the steps between two columns
    ld_right: int
    ld_out: int
    next_left: int  # the steps between two matrices
    next_right: int
    next_out: int
    matrices: int
    kind: int  # cudaDataType of L and R
    written: Type  # of D
    half: bool


def operands(a: Array, b: Array, out: Array) -> Operands | None:
    """How cuBLAS is asked for out = a b; None if it does not take it."""
    char = out.dtype.char
    if char not in TYPES or a.dtype != b.dtype or min(a.ndim, b.ndim, out.ndim) < 2 or 0 in (a.size, b.size, out.size):
        return None
    half = HALVES.get(a.dtype.name) if char == "f" else None
    if half is None and a.dtype != out.dtype:
        return None
    (n, k), m, lead = a.shape[-2:], b.shape[-1], out.shape[:-2]
    if b.shape[-2] != k or out.shape[-2:] != (n, m):
        return None
    left, right, target = (_placed(x, lead) for x in (b, a, out))
    if left is None or right is None or target is None:
        return None
    if target[0]:  # ordered by columns: its transpose is b^T a^T
        found = operands(b.swapaxes(-1, -2), a.swapaxes(-1, -2), out.swapaxes(-1, -2))
        return found and found._replace(swapped=True)
    (op_left, ld_left, next_left), (op_right, ld_right, next_right), (_, ld_out, next_out) = left, right, target
    count = math.prod(lead)
    if count > 1 and not next_out or max(n, k, m, ld_left, ld_right, ld_out, count) >= MOST:
        return None
    return Operands(False, op_left, op_right, m, n, k, ld_left, ld_right, ld_out, next_left, next_right, next_out, count,
                    TYPES[char].data if half is None else half, TYPES[char], half is not None)


def _placed(x: Array, lead: tuple[int, ...]) -> tuple[int, int, int] | None:
    """How cuBLAS finds x (..., r, c) repeated along `lead`: whether transposed (1), and the steps to the next row and matrix.

    None if it cannot: where neither a row nor a column lies together, rows overlap, or the matrices are not evenly spaced.
    """
    (*front, r, c), size = x.shape, x.itemsize
    *steps, down, right = (stride // size for stride in x.strides)
    if c == 1 or right == 1:
        transposed, ld = 0, down if r > 1 else c
    elif r == 1 or down == 1:
        transposed, ld = 1, right
    else:
        return None
    missing = len(lead) - len(front)
    if ld < (r if transposed else c) or missing < 0 or any(n not in (1, m) for n, m in zip(front, lead[missing:])):
        return None
    repeated = [0 if n == 1 else step for n, step in zip(front, steps)]
    axes = [(n, step) for n, step in zip(lead, [0] * missing + repeated) if n > 1]
    if any(step != n * inner for (_, step), (n, inner) in zip(axes, axes[1:])):
        return None
    return transposed, ld, axes[-1][1] if axes else 0


def in_copies(xp: Any, a: Array, b: Array, out: Array, read: bool) -> tuple[Array, Array, Array] | None:
    """a, b and out, or copies that cuBLAS takes; that of `out` holds its numbers if it is `read`. None for other dtypes."""
    if out.dtype.char not in TYPES or not a.dtype == b.dtype == out.dtype or 0 in (a.size, b.size, out.size):
        return None
    lead, found = out.shape[:-2], _placed(out, out.shape[:-2])
    if found is None or math.prod(lead) > 1 and not found[2]:
        out = out.copy() if read else xp.empty(out.shape, dtype=out.dtype)
    return _in_order(xp, a, lead), _in_order(xp, b, lead), out


def _in_order(xp: Any, x: Array, lead: tuple[int, ...]) -> Array:
    """x, or a copy that cuBLAS finds along `lead`: with an own matrix at each place only where it must be."""
    if _placed(x, lead) is None:
        x = xp.ascontiguousarray(x)
    return x if _placed(x, lead) else xp.ascontiguousarray(xp.broadcast_to(x, (*lead, *x.shape[-2:])))
