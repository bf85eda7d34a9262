"""The normal distribution function, from plain ufuncs: NumPy has no erf.

Phi(x) = (1 + erf(x / sqrt 2)) / 2 is the share of a standard normal variable below x. On the left it is tiny, and must be
right relative to its size; on the right it is 1 - Phi(-x). So all work is for t = |x|:

    Phi(-t) = e^(-t^2/2) R(t)        R(t) falls smoothly from 1/2 at 0 to 1 / (t sqrt(2 pi)) at infinity

- R(t) is a quotient P/Q of polynomials, fitted on [0, 40]; all coefficients are positive, so nothing cancels. How they were
  found stands in tests/data/make_erf_table.py: P = R Q at Chebyshev points of (t - c) / (t + c), a linear system.
  Largest relative error: 1.2e-16 for the table of float64, 3.7e-8 for the shorter one of float32.
- e^(-t^2/2): rounding t^2 costs a relative error of t^2 eps / 4, a hundred eps at t = 20. With h = t rounded to a
  sixteenth, t^2 = h^2 + (t - h)(t + h), where h^2 is exact and the rest is small. (As in W. J. Cody's SPECFUN, Algorithm 715.)

Measured: below 6 eps relative error (1 on average) wherever Phi is a normal number (x > -37.5 in float64, -13 in float32),
and below 2 on the right; see tests/ops/test_erf.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Array = Any

# Coefficients of P and Q, from the lowest up.
SINGLE = (
    (42.02152084104932, 38.274074632632676, 16.468432770358227, 3.7750598681987815, 0.3989429201077657),
    (84.04304168209865, 143.60481583442498, 105.49499495368231, 42.27508560520722, 9.462818668962736, 1.0),
)
DOUBLE = (
    (148800.81994327006, 230058.7799439283, 175968.5809265835, 85499.46917848442, 28793.919986854355, 6940.9387063702425,
     1197.3121011613866, 142.97891836242198, 10.803347142032242, 0.39894228040030144),
    (297601.6398865401, 697569.3136229409, 759716.1273395086, 507530.6347207095, 231007.0240419791, 75122.70687187598,
     17754.748339692604, 3028.2963384609343, 359.394999500702, 27.07997540627096, 1.0),
)
END = 40.0  # beyond, Phi(-t) is 0 in float64


def polynomial(coefficients: Sequence[float], t: Array) -> Array:
    """c_0 + c_1 t + ... + c_n t^n, by Horner's rule; at least two coefficients."""
    y = t * coefficients[-1]
    for c in coefficients[-2:0:-1]:
        y += c
        y *= t
    return y + coefficients[0]


def normal(x: Array, xp: Any) -> tuple[Array, Array]:
    """Phi(x), and e^(-x^2/2), which is sqrt(2 pi) times its derivative.

    Parameters
    ----------
    x : array
        Any floating-point dtype; float16 is computed in float32. Analytic: a complex step passes through.
    xp : module

    Returns
    -------
    tuple of two arrays, of the shape and dtype of x

    Examples
    --------
    >>> import numpy
    >>> normal(numpy.array([-1.0, 0.0, 1.0]), numpy)[0].round(6)
    array([0.158655, 0.5     , 0.841345])
    """
    if x.dtype.char == "e":
        phi, bell = normal(x.astype("float32"), xp)
        return phi.astype("float16"), bell.astype("float16")
    right = x.real >= 0
    t = xp.minimum(xp.where(right, x, -x), END)
    h = xp.rint(t.real * 16.0) / 16.0
    bell = xp.exp(-0.5 * h * h) * xp.exp(-0.5 * (t - h) * (t + h))
    P, Q = SINGLE if x.dtype.char in "fF" else DOUBLE
    tail = bell * (polynomial(P, t) / polynomial(Q, t))
    return xp.where(right, 1.0 - tail, tail), bell
