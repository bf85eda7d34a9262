"""Exact GELU from a table: its error in units of float32's eps, and what stands at the ends of the table and beyond."""

import math

import numpy as np
import pytest

from minilora import Parameter, no_grad, ops
from minilora.kernels.cpu import normal as cpu_normal
from minilora.ops.erf import normal

EPS = np.finfo("float32").eps


def value_and_slope(x, dy=1.0):
    p = Parameter(np.asarray(x))
    y = ops.gelu(p, "none")
    y.backward(np.full_like(p.data, dy))
    return y.data, p.grad


def exact(x):
    x = x.astype("float64")
    phi, bell = normal(x, np)  # proved in tests/ops/test_erf.py to 6 eps of float64
    return x * phi, phi + x * bell / math.sqrt(2 * math.pi)


def points():
    """All over the line, and at each place where another point of the table becomes the nearest."""
    ends = (np.arange(-14.0 * 1024, 14.0 * 1024) / 1024).astype("float32")
    drawn = np.random.default_rng(0).normal(0, 4, 100_000).astype("float32")
    return np.concatenate([ends, np.nextafter(ends, np.float32(99)), np.nextafter(ends, np.float32(-99)), drawn])


def test_value_is_right_to_a_few_eps_of_its_size():
    x = points()
    x = x[(x > -12.9) & (abs(x) > 1e-37)]  # elsewhere Phi, or y, is no normal number
    y, _ = value_and_slope(x)
    error = abs(y / exact(x)[0] - 1) / EPS
    assert error.max() < 6 and error[x > -4].max() < 1.6 and error.mean() < 0.5


def test_slope_is_right_to_a_rounding():
    x = points()
    _, slope = value_and_slope(x)
    _, right = exact(x)
    assert abs(slope - right).max() < 1.6 * EPS
    left = (x > -12.9) & (x < -2)  # the slope is 0 at -0.75: relative to its size only on one side
    assert (abs(slope / right - 1) / EPS)[left].max() < 8


def test_far_out_at_zero_and_no_number():
    x = np.array([-np.finfo("float32").max, -1e4, -16.0, -15.0, 0.0, -0.0, 1e-30, 15.0, 16.0, 1e4, 3e38, np.nan], "float32")
    y, slope = value_and_slope(x)
    half = np.float32(0.5)
    np.testing.assert_array_equal(y, [0, 0, 0, 0, 0, 0, half * x[6], *x[7:]])
    np.testing.assert_array_equal(slope, [0, 0, 0, 0, half, half, half, 1, 1, 1, 1, np.nan])
    assert np.signbit(y[5])


@pytest.mark.parametrize("size", [0, 1, 7, cpu_normal.BLOCK // 2 + 1])
def test_any_size_and_the_same_bits_without_a_gradient(size):
    x = np.random.default_rng(1).normal(0, 3, (1, size)).astype("float32")
    y, slope = value_and_slope(x)
    assert y.dtype == slope.dtype == "float32" and y.shape == slope.shape == x.shape
    with no_grad():
        np.testing.assert_array_equal(ops.gelu(Parameter(x), "none").data, y)
    np.testing.assert_allclose(y, exact(x)[0], rtol=1e-6)


@pytest.mark.parametrize("x", [np.ones((3, 4), "float32").T, np.ones((3, 4))], ids=["with gaps", "float64"])
def test_the_rest_is_left_to_the_reference(x):
    p = Parameter(x)
    y = ops.gelu(p, "none")
    assert y.node.saved[0] is p.data
    y.backward(np.ones_like(x))
    np.testing.assert_allclose(p.grad, exact(x)[1], rtol=10 * np.finfo(x.dtype).eps)


def test_backward_writes_into_what_it_kept_and_nowhere_else():
    x, dy = np.random.default_rng(2).standard_normal((2, 50)).astype("float32")
    before = x.copy(), dy.copy()
    y = ops.gelu(Parameter(x), "none")
    (kept,) = y.node.saved
    assert kept.nbytes == x.nbytes
    op = y.node
    (dx,) = op.backward(dy)
    assert dx is kept
    np.testing.assert_allclose(dx, dy * exact(x)[1], rtol=2e-6, atol=1e-7)
    np.testing.assert_array_equal((x, dy), before)
