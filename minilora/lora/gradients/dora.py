"""DoRA: the low-rank update turns each row of the weight, and the row's length is a parameter of its own.

Shapes: W (out, n), A (r, n), B (out, r), m (out), s a number; n is `in` for a linear layer. L is the loss.

Forward, element by element (k an output, i an input, j a rank):

    V_ki = W_ki + s sum_j B_kj A_ji
    c_k = sqrt(sum_i V_ki^2)               the length of row k
    rho_k = m_k / c_k

The weight in use is diag(rho) V: its row k has V's direction and the length |m_k|. A layer composes

    y = rho (x W^T + s z B^T) + b,    z = x A^T

from plain operations, and the operation of this file is rho; drho = dL/drho sums dy_nk times the bracket over the rows n.

Backward, first through m:

    m_k meets rho_k:                       dL/dm_k = drho_k / c_k

Detached, as the paper proposes (section 4.3) and as PEFT does, that is all: c counts as a constant, and A and B get what the
plain operations give them. Exact, c depends on V:

    c_k meets rho_k:                       dL/dc_k = -drho_k m_k / c_k^2 = -dm_k rho_k
    V_ki meets c_k:                        dL/dV_ki = dL/dc_k V_ki / c_k      call t_k = -dm_k rho_k / c_k
    W_ki meets V_ki:                       dL/dW_ki = t_k V_ki
    B_kj meets V_ki for every input i:     dL/dB_kj = s sum_i t_k V_ki A_ji
    A_ji meets V_ki for every output k:    dL/dA_ji = s sum_k B_kj t_k V_ki

Gathered into matrices, with T = diag(t) and V = W + s B A put in:

    dm = drho / c                             (out)
    t = -dm rho / c                           (out)
    dB = s T (W A^T + s B (A A^T))            (out, r)
    dA = s (B^T T W + s (B^T T B) A)          (r, n)
    dW = T V                                  (out, n)    only if W is trained

Both paths together: with G = dy^T x, the gradient of the weight in use, drho_k = G_k V_k^T, and row k of V gets

    rho_k (G_k - (G_k V_k^T) V_k / c_k^2),

the part of rho_k G_k at right angles to V_k (the paper's eq. 6): exact, the update cannot try to change a length, which is m's
affair. Detached, it gets the whole rho_k G_k.

V never exists as a whole: c is summed over blocks of it. To expand the square, ||W_k||^2 + 2 s <W_k A^T, B_k> + ..., would
need no V at all, but where D is near -W it subtracts numbers of the size of ||W_k||^2, and what is left has lost its digits.

Range. Squares are summed in the array's dtype, float16's in float32. With n up to 2^26 that costs no digits for lengths from
2^-50 to 2^63 in float32, from 2^-498 to 2^511 in float64, and anywhere in float16. Larger ones make c inf, and NumPy warns.

Rows without a length. A row of zeros in W has no direction while B = 0, and m / c = 0 / 0 would make its output NaN (peft issue
2049 and pull request 3237 report such rows). Where c is below `shortest(dtype)`, rho is 1 and every gradient through it is 0.
The output does not jump when the row starts to move: from m = c = 0 on it is b, whether rho is 1 or 0 / c. NaN stays NaN.

Groups (a grouped convolution as matrices): the rows of W, A and B come in equal parts, A (r, n), B (out, r / groups), and
part g is V_g = W_g + s B_g A_g. The same formulas, part by part.

Source: Liu et al. 2024, arXiv 2402.09353, sections 4.2 and 4.3. The paper writes lengths of columns; its authors' code and
PEFT take one for each output, as here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy

from ...backend import device_of
from ...engine import Op, apply, floating, shape_of
from ...errors import ShapeError
from ...ops.conv import check_groups
from ...ops.grouped import Grouped, blocks, by_group, product
from ...tensor import Tensor
from .decoding import add_products

__all__ = ["DoRAScale", "dora_scale", "initial_magnitude", "lengths", "ratio"]

Array = Any
BLOCK = 1 << 17  # elements of V at a time: they stay in the cache from the product to the sum


def summed_in(dtype: Any) -> Any:
    """The dtype in which squares of `dtype` are summed: float32 for float16, whose largest number is 65504."""
    return numpy.dtype("float32") if dtype.itemsize == 2 else dtype


def shortest(dtype: Any) -> float:
    """The length from which a row has a direction: 2^-14 in float16, 2^-63 in float32, 2^-511 in float64.

    From there on c is a normal number of its dtype and c^2 one of the dtype it is summed in, and 1 / c^2 is finite there.
    """
    c, square = numpy.finfo(dtype), numpy.finfo(summed_in(dtype))
    return max(float(c.tiny), math.sqrt(float(square.tiny)))


def sums(W: Array, left: Array, right: Array, xp: Any, at_once: int) -> Iterator[tuple[tuple[slice, slice], Array]]:
    """W + left right in blocks, with their places; each is written over the last one. (`gradient.delta` is as large as W.)"""
    V: Array = None
    for place in blocks(W.shape, at_once):
        part = W[place]
        if V is None:
            V = xp.empty(part.shape, dtype=left.dtype)
        block = V[:len(part), :part.shape[1]]
        product(left[place], right[place[0]], xp, out=block)
        block += part
        yield place, block


def lengths(W: Array, A: Array, B: Array, s: float, groups: int, xp: Any, dtype: Any = None, at_once: int = 0) -> Array:
    """c (out,), the lengths of the rows of V = W + s B A. Arrays as in `dora_scale`, `xp` their module; in W's dtype, or this.

    Costs 2 out n r / groups operations for V, one pass over W, and `at_once` elements of memory, or `BLOCK`. No conjugate is
    taken. A device may have a version of it: callers ask `Device.versions`, so that all of them get the same bits.

    Examples
    --------
    >>> import numpy
    >>> lengths(numpy.array([[3.0, 0.0]]), numpy.array([[0.0, 1.0]]), numpy.array([[2.0]]), 2.0, 1, numpy)
    array([5.])
    """
    wide = summed_in(W.dtype)
    parts, left, right = (by_group(matrix, groups) for matrix in (W, B, A))
    left, right, axis = s * left.astype(wide, copy=False), right.astype(wide, copy=False), 2
    squares = xp.zeros(parts.shape[:2], dtype=wide)
    if abs(parts.strides[1]) < abs(parts.strides[2]):  # walk V^T along its rows: 8 times faster (768 x 16384, measured)
        parts, left, right, axis = parts.swapaxes(1, 2), right.swapaxes(1, 2), left.swapaxes(1, 2), 1
    for place, V in sums(parts, left, right, xp, at_once or BLOCK):
        xp.multiply(V, V, out=V)
        squares[place if axis == 2 else place[0]] += V.sum(axis=axis)
    return xp.sqrt(squares).reshape(len(W)).astype(W.dtype if dtype is None else dtype, copy=False)


def ratio(m: Array, c: Array, xp: Any) -> tuple[Array, Array, Array]:
    """rho = m / c; the c that it was divided by; and where c is too short, so that both are 1."""
    short, ones = c.real < shortest(c.dtype), xp.ones_like(c)
    c = xp.where(short, ones, c)
    return xp.where(short, ones, m / c), c, short


class DoRAScale(Op):
    """rho = m / c, with c the lengths of the rows of V = W + s B A, and the gradients derived at the top of this file.

    Keeps 1 / c; if W, A or B wants a gradient, also rho, and these three as they are. Nothing here is as large as V but dW.
    """

    widens = False  # sums are float32 here, block by block: a copy of W in float32 would be the largest array of all
    s: float
    groups: int
    at_once = 0  # as in `lengths`

    def forward(self, W: Array, A: Array, B: Array, m: Array) -> Array:
        xp = self.xp
        c = lengths(W, A, B, self.s, self.groups, xp, at_once=self.at_once)
        rho, c, short = ratio(m, c, xp)
        if True in self.needs:
            # 1 / 65504 is no normal number of float16. A 0 switches every gradient of its row off.
            inverse = 1.0 / c.astype(summed_in(c.dtype), copy=False)
            inverse = xp.where(short, xp.zeros_like(inverse), inverse)
            kept = (W, A, B, rho) if True in self.needs[:3] else (None,) * 4
            self.save(*kept, inverse)
        return rho

    def backward(self, drho: Array) -> tuple[Array | None, ...]:
        W, A, B, rho, inverse = self.saved
        dm = drho * inverse
        dW = dA = dB = None
        if rho is not None:
            dW, dA, dB = self.through_lengths(-dm * rho * inverse, W, A, B)
        gradients = dW, dA, dB, dm if self.needs[3] else None
        return tuple(None if d is None else d.astype(drho.dtype, copy=False) for d in gradients)

    def through_lengths(self, t: Array, W: Array, A: Array, B: Array) -> tuple[Array | None, ...]:
        """dW, dA and dB from t; dA and dB in the dtype of t."""
        needs_W, needs_A, needs_B, _ = self.needs
        xp, wide, shapes = self.xp, t.dtype, (W.shape, A.shape, B.shape)
        dW: Array = None
        dA: Array = None
        dB: Array = None
        W, A, B = (by_group(matrix, self.groups) for matrix in (W, A, B))
        A, sB = A.astype(wide, copy=False), self.s * B.astype(wide, copy=False)
        t = t.reshape(W.shape[0], W.shape[1], 1)
        A_T, tB_T = A.swapaxes(1, 2), (t * sB).swapaxes(1, 2)
        if needs_A:
            dA = product(product(tB_T, sB, xp), A, xp)
        if needs_B:
            dB = product(sB, product(A, A_T, xp), xp)
        # float16 is converted block by block; what needs no conversion is one block.
        at_once = W.size if W.dtype == wide and not isinstance(W, Grouped) else self.at_once or BLOCK
        for group, row in () if isinstance(W, Grouped) else blocks(W.shape, at_once):
            part = W[group, row].astype(wide, copy=False)
            if needs_A:
                dA[group] += product(tB_T[group, :, row], part, xp)
            if needs_B:
                dB[group, row] += product(part, A_T[group], xp)
            del part  # before the next one is made
        if isinstance(W, Grouped):
            add_products(W, dA, dB, tB_T, A)
        if needs_W:
            dW = self.into(0)
            if dW is None:
                dW = xp.empty(shapes[0], dtype=W.dtype)
            for place, V in sums(W, sB, A, xp, self.at_once or BLOCK):
                by_group(dW, self.groups)[place] = V * t[place]
        return (dW, None if dA is None else dA.reshape(shapes[1]),
                None if dB is None else (dB * (self.s * t)).reshape(shapes[2]))


def dora_scale(W: Any, A: Any, B: Any, m: Any, s: float, groups: int = 1, exact: bool = False) -> Tensor:
    """rho = m / c, the factor of each output under DoRA; see `DoRAScale`.

    Parameters
    ----------
    W : Tensor, shape (out, n)
        A view is fine: ``W.T`` for an embedding, the kernels of a convolution as a matrix.
    A : Tensor, shape (r, n)
    B : Tensor, shape (out, r / groups)
    m : Tensor, shape (out,)
        At the start `initial_magnitude`, so that rho is 1.
    s : float
        From `scaling`.
    groups : int
        The rows of W, A and B come in so many equal parts, each with an update of its own.
    exact : bool
        False: only m gets a gradient, as in PEFT. True: W, A and B too, through the lengths.

    Returns
    -------
    Tensor, shape (out,)
        1 where a row has no length.

    Raises
    ------
    ShapeError, ConfigError, DTypeError
        If the shapes do not fit together, `groups` does not divide out and r, or the arrays are not of one kind of floats.

    Examples
    --------
    >>> import numpy, minilora
    >>> W, A, B = numpy.array([[3.0, 4.0], [0.0, 2.0]]), numpy.ones((1, 2)), numpy.zeros((2, 1))
    >>> m = minilora.Parameter(numpy.array([10.0, 2.0]))
    >>> rho = dora_scale(W, A, B, m, s=1.0)
    >>> rho.data
    array([2., 1.])
    >>> rho.sum().backward()
    >>> m.grad
    array([0.2, 0.5])
    """
    groups = check_dora(shape_of(W), shape_of(A), shape_of(B), groups)
    if shape_of(m) != shape_of(W)[:1]:
        raise ShapeError(f"dora: expected one length for each row of W {shape_of(W)}, m of shape {shape_of(W)[:1]}, got "
                         f"{shape_of(m)}. Some sources store m as a column or with axes of length 1: m.reshape(-1)")
    if not exact:
        W, A, B = (x.data if isinstance(x, Tensor) else x for x in (W, A, B))
    return apply(DoRAScale, floating(W), A, B, m, s=s, groups=groups)


def initial_magnitude(W: Array, A: Array, B: Array, s: float, groups: int = 1) -> Array:
    """c (out,), the lengths of the rows of V = W + s B A: with these as m, rho is exactly 1.

    Parameters
    ----------
    W, A, B, s, groups
        As in `dora_scale`.

    Returns
    -------
    array, shape (out,)
        A new one, on the device and in the dtype of W; 0 for a row of zeros.

    Raises
    ------
    ShapeError, ConfigError, DTypeError
        As `dora_scale`.

    Examples
    --------
    >>> import numpy
    >>> initial_magnitude(numpy.array([[3.0, 4.0], [0.0, 2.0]]), numpy.ones((1, 2)), numpy.zeros((2, 1)), s=1.0)
    array([5., 2.])
    """
    groups = check_dora(shape_of(W), shape_of(A), shape_of(B), groups)
    return device_of(W).versions[lengths](floating(W), A, B, s, groups, device_of(W).exact)


def check_dora(W: tuple[int, ...], A: tuple[int, ...], B: tuple[int, ...], groups: Any) -> int:
    """`groups` as an int; `ShapeError` or `ConfigError` unless the shapes fit together."""
    if len(W) != 2:
        raise ShapeError(f"dora: expected a weight (out, n), got shape {W}. A convolution's: W.reshape(len(W), -1)")
    if len(A) != 2 or A[1] != W[1]:
        raise ShapeError(f"dora: for a weight {W} expected A (r, {W[1]}), got {A}. Is it stored transposed, or is W?")
    check_groups(groups, W[0], "rows of W")
    check_groups(groups, A[0], "rows of A")
    if B != (W[0], A[0] // groups):
        each = f" ({A[0]} ranks in {groups} groups)" if groups > 1 else ""
        raise ShapeError(f"dora: for W {W} and A {A} expected B {(W[0], A[0] // groups)}{each}, got {B}")
    return int(groups)
