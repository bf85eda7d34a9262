"""Fastfood: a random projection of d numbers to D, by two fast transforms and no (D, d) matrix."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..engine import Op, apply, floating, shape_of
from ..errors import ShapeError
from .hadamard import hadamard

if TYPE_CHECKING:
    from ..tensor import Tensor
    from ..typing import TensorLike

__all__ = ["Fastfood", "fastfood"]

Array = Any


class Fastfood(Op):
    """z = P v, the first D numbers of K blocks of L = 2^l >= d numbers:

        P v = [C_1 H G_1 Π_1 H B_1 p ... C_K H G_K Π_K H B_K p]_{1..D},    p = (v, 0 ... 0) in R^L,    K = ceil(D / L)

    B_k are signs, Π_k is a permutation, G_k are standard normal numbers, H is the unnormalised Walsh-Hadamard matrix, and
    C_k = 1 / (|G_k| sqrt(D)) a number. With one block, L >= D, C is 1 / (sqrt(L ΣG²) sqrt(D / L)), as Aghajanyan et al. have
    it. All are fixed, and P is linear in v.

    Its size. (H B p)_j = Σ_i ± p_i, with signs that are independent for different i, so that its square has the mean |v|^2 for
    every j, over the signs B. An entry of H G Π H B p is Σ_j ± g_j (H B p)_π(j), and its square has the mean ΣG² |v|^2: mixed
    terms j ≠ j' cancel over Π and the signs of G. Times C^2 that is |v|^2 / D for each of D numbers:

        E |P v|^2 = |v|^2

    Backward. H is symmetric, the transpose of a permutation is its inverse, and those of diagonals are themselves:

        dv = [Σ_k B_k H Π_kᵀ G_k H C_k dy_k]_{1..d}        dy_k block k of (dz, 0 ... 0), K L numbers

    This is the true adjoint, <P v, y> = <v, Pᵀ y>. (The code published with the paper divides by sqrt(L) in each backward of
    H, whose forward is unnormalised: its gradients are the L-th part of these, and its learning rates do not fit here.)

    Costs 2 K L log2 L additions in forward and in backward: O(D log d), and O(L log L) with one block. Keeps nothing. The
    draws are 3 K L numbers, less than 6 max(D, d), where P has D d. Temporaries: two arrays of K L.
    Source: Le, Sarlós and Smola 2013, "Fastfood"; Li et al. 2018, arXiv 1804.08838; Aghajanyan et al. 2020, arXiv 2012.13255.
    """

    signs: Array
    places: Array
    gauss: Array
    size: int

    def forward(self, v: Array) -> Array:
        blocks, length = self.signs.shape
        x = self.xp.zeros((blocks, length), dtype=v.dtype)
        self.xp.multiply(self.signs[:, :len(v)], v, out=x[:, :len(v)])
        x = hadamard(self.xp, x).reshape(-1)[self.places]
        x *= self.gauss  # in place: of another dtype, it promotes nothing
        self.d = len(v)
        return hadamard(self.xp, x).reshape(-1)[:self.size]

    def backward(self, dz: Array) -> tuple[Array | None, ...]:
        blocks, length = self.signs.shape
        y = self.xp.zeros(blocks * length, dtype=dz.dtype)
        y[:self.size] = dz
        y = hadamard(self.xp, y.reshape(blocks, length))
        y *= self.gauss  # y is an array of our own, also with L = 1
        x = self.xp.empty(blocks * length, dtype=dz.dtype)
        x[self.places] = y
        x = hadamard(self.xp, x.reshape(blocks, length))[:, :self.d]
        return ((x * self.signs[:, :self.d]).sum(axis=0),)


def fastfood(v: TensorLike, signs: Array, places: Array, gauss: Array, size: int) -> Tensor:
    """P v for what was drawn once; see `Fastfood`, and `tuners.intrinsic`, which draws.

    Parameters
    ----------
    v : Tensor or array, shape (d,)
    signs : array, shape (K, L)
        1 and -1, also as int8; L is a power of 2 and at least d.
    places : array of int, shape (K, L)
        Row k is a permutation of k L ... k L + L - 1: where in all blocks each number comes from.
    gauss : array, shape (K, L)
        Row k is G_k C_k.
    size : int
        D, at most K L.

    Returns
    -------
    Tensor, shape (D,)

    Raises
    ------
    ShapeError
        If these do not go together.

    Examples
    --------
    >>> import numpy
    >>> ones = numpy.ones((1, 2))
    >>> fastfood(numpy.array([3.0]), ones, numpy.array([[1, 0]]), ones * [[2.0, 1.0]], 2)
    Tensor([9. 3.], dtype=float64)
    """
    shape, drawn = shape_of(floating(v)), shape_of(signs)
    fits = len(shape) == 1 and len(drawn) == 2 and shape_of(places) == shape_of(gauss) == drawn
    if not fits or not max(shape[0], 1) <= drawn[1] or drawn[1] & (drawn[1] - 1) or not 0 <= size <= math.prod(drawn):
        raise ShapeError(f"fastfood: expected v (d,), and signs, places and gauss (K, L) with L >= d a power of 2 and K L >= "
                         f"{size}, got v {shape}, signs {drawn}, places {shape_of(places)}, gauss {shape_of(gauss)}")
    return apply(Fastfood, v, signs=signs, places=places, gauss=gauss, size=size)
