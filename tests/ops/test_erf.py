"""The normal distribution function against a series summed with hundreds of digits, and against math.erf; both GELUs."""
import decimal
import functools
import math

import numpy as np
import pytest
from conftest import fetch, place

from minilora import Parameter, backend, ops
from minilora.errors import ConfigError
from minilora.ops.erf import DOUBLE, SINGLE, normal


def tail(t):
    """Phi(-t) for t >= 0: 1/2 - e^(-t^2/2) / sqrt(2 pi) (t + t^3 / 3 + t^5 / 15 + ...), whose terms are all positive."""
    with decimal.localcontext() as context:
        context.prec = 40 + int(t * t / 4)  # as many digits cancel as Phi has zeros behind the point
        t = decimal.Decimal(t)
        root = (2 * pi(context.prec)).sqrt()
        term = total = t
        k = 1
        while term > total.scaleb(-context.prec):
            k += 2
            term = term * t * t / k
            total += term
        return decimal.Decimal(0.5) - (-t * t / 2).exp() / root * total


@functools.cache
def pi(digits):
    """pi by Machin's formula, 16 arctan 1/5 - 4 arctan 1/239, in integers."""
    one = 10 ** (digits + 10)

    def arctan_of_inverse(n):
        total, power, k, sign = 0, one // n, 1, 1
        while power:
            total += sign * (power // k)
            power, k, sign = power // (n * n), k + 2, -sign
        return total
    return decimal.Decimal(16 * arctan_of_inverse(5) - 4 * arctan_of_inverse(239)).scaleb(-digits - 10)


POINTS = [0.0, 1e-300, 1e-9, 0.01, 0.1, 0.5, 1.0, 1.5, 2.0, 3.1, 4.7, 5.0, 6.3, 8.0, 10.9, 13.0, 15.5, 19.9, 25.0, 28.1, 30.0,
          33.3, 37.0, *np.random.default_rng(0).uniform(0, 37, 60)]


def phi_of(x, dtype="float64"):
    return fetch(normal(place(x, dtype), backend.current_device().xp)[0])


def relative_errors(points, dtype):
    x = np.array(points, dtype)
    return [float(abs(decimal.Decimal(float(y)) / tail(t) - 1)) for y, t in zip(phi_of(-x, dtype), x.tolist())]


def test_left_tail_is_right_to_a_few_eps_of_its_size(device):
    assert max(relative_errors(POINTS, "float64")) < 6 * np.finfo("float64").eps
    assert max(relative_errors([t for t in POINTS if t < 13], "float32")) < 6 * np.finfo("float32").eps


def test_right_side_is_right_to_half_an_ulp_and_some(device):
    for dtype in ("float64", "float32"):
        x = np.array(POINTS, dtype)
        got = phi_of(x, dtype)
        exact = np.array([float(1 - tail(t)) for t in x.tolist()])
        # CUDA's expf may be 2 units in the last place off: of a tail of up to 1/2, that is up to one eps more
        allowed = 2.0 if device == "gpu" and dtype == "float32" else 1.0
        assert abs(got - exact).max() <= allowed * np.finfo(dtype).eps


def test_agrees_with_math_erf_over_the_whole_line(device):
    x = np.concatenate([np.linspace(-9, 9, 4001), np.linspace(-60, 60, 1001)])
    got = 2 * phi_of(x * math.sqrt(2)) - 1
    assert abs(got - [math.erf(a) for a in x]).max() < 1e-15


def test_phi_is_monotone_and_symmetric(device):
    x = np.linspace(-9, 9, 20001)
    phi = phi_of(x)
    assert (np.diff(phi) > -np.finfo(float).eps).all()
    np.testing.assert_allclose(phi + phi_of(-x), 1.0, rtol=4e-16)
    assert phi_of([0.0]) == 0.5


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_far_out_and_no_number(device, dtype):
    big = float(np.finfo(dtype).max)
    x = place([-np.inf, -big, -100.0, 100.0, big, np.inf, np.nan], dtype)
    phi, bell = map(fetch, normal(x, backend.current_device().xp))
    assert phi.dtype == bell.dtype == dtype
    np.testing.assert_array_equal(phi, [0, 0, 0, 1, 1, 1, np.nan])
    np.testing.assert_array_equal(bell, [0, 0, 0, 0, 0, 0, np.nan])


def test_complex_step_gives_the_density(device):
    x = np.linspace(-12, 12, 97)
    got = phi_of(x + 1e-30j, "complex128").imag / 1e-30
    np.testing.assert_allclose(got, [math.exp(-a * a / 2) / math.sqrt(2 * math.pi) for a in x], rtol=1e-12)


def test_tables_have_positive_coefficients_and_the_right_ends():
    for P, Q in (SINGLE, DOUBLE):
        assert min(*P, *Q) > 0 and len(Q) == len(P) + 1 and Q[-1] == 1.0
        assert P[0] / Q[0] == 0.5
        assert abs(P[-1] * math.sqrt(2 * math.pi) - 1) < 2e-6  # R(t) tends to 1 / (t sqrt(2 pi))


# -- the two forms of GELU --------------------------------------------------------------------------------------------


def test_forms_of_gelu(device):
    x = np.linspace(-6, 6, 1201)
    exact, approximate = (fetch(ops.gelu(place(x), form)) for form in ("none", "tanh"))
    np.testing.assert_allclose(exact, [a * math.erfc(-a / math.sqrt(2)) / 2 for a in x], rtol=1e-14, atol=1e-300)
    np.testing.assert_array_equal(fetch(ops.gelu(place(x))), approximate)
    difference = abs(exact - approximate)
    assert 4.7e-4 < difference.max() < 4.8e-4 and 2.6 < abs(x[difference.argmax()]) < 2.8
    for form in ("erf", None, True, ""):
        with pytest.raises(ConfigError, match="approximate"):
            ops.gelu(place(x), form)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_exact_gelu_far_from_zero(dtype, device):
    p = Parameter(place([-1e4, -100.0, 100.0, 1e4], dtype))
    y = ops.gelu(p, "none")
    y.sum().backward()
    np.testing.assert_array_equal(fetch(y), fetch(p) * [0, 0, 1, 1])
    np.testing.assert_array_equal(fetch(p.grad), [0, 0, 1, 1])


def test_exact_gelu_keeps_its_relative_precision_on_the_left(device):
    p = Parameter(place([-10.0, -20.0, -30.0]))
    exact = [float(tail(-a) * decimal.Decimal(a)) for a in fetch(p).tolist()]
    np.testing.assert_allclose(fetch(ops.gelu(p, "none")), exact, rtol=2e-15)
