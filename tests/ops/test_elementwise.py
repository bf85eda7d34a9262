"""Where elementwise operations and softmax are delicate: large values, zeros, infinities, half precision."""
import math

import numpy as np
import pytest
from conftest import fetch, place
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minilora import Parameter, ops

HUGE = [-1e4, -100.0, -30.0, 30.0, 100.0, 1e4]
LIMITS = {  # value and derivative far to the left, and far to the right, of 0
    "relu": (ops.relu, lambda x: (0.0, 0.0), lambda x: (x, 1.0)),
    "tanh": (ops.tanh, lambda x: (-1.0, 0.0), lambda x: (1.0, 0.0)),
    "sigmoid": (ops.sigmoid, lambda x: (0.0, 0.0), lambda x: (1.0, 0.0)),
    "silu": (ops.silu, lambda x: (0.0, 0.0), lambda x: (x, 1.0)),
    "gelu": (ops.gelu, lambda x: (0.0, 0.0), lambda x: (x, 1.0)),
}


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("name", LIMITS)
def test_activations_far_from_zero(name, dtype, device):
    """No overflow, no NaN, and no warning on the way."""
    call, left, right = LIMITS[name]
    p = Parameter(place(HUGE, dtype))
    y = call(p)
    y.sum().backward()
    exact = [(left if x < 0 else right)(x) for x in fetch(p).astype(float)]
    np.testing.assert_allclose(fetch(y), [value for value, _ in exact], rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(fetch(p.grad), [slope for _, slope in exact], rtol=1e-3, atol=1e-7)


def test_sigmoid_keeps_its_relative_precision(device):
    x = np.array([-700.0, -100.0, -40.0, -1e-20, 0.0, 40.0])
    np.testing.assert_allclose(fetch(ops.sigmoid(Parameter(place(x)))), [math.exp(a) / (1 + math.exp(a)) for a in x],
                               rtol=4e-16)


def test_relu_at_zero_passes_nothing(device):
    p = Parameter(place([0.0, -0.0, 1e-300]))
    y = ops.relu(p)
    y.sum().backward()
    np.testing.assert_array_equal(fetch(y), [0.0, 0.0, 1e-300])
    np.testing.assert_array_equal(fetch(p.grad), [0.0, 0.0, 1.0])


@pytest.mark.parametrize("call", [ops.relu, ops.tanh, ops.sigmoid, ops.silu, ops.gelu, ops.exp, lambda x: x ** 2])
def test_nan_is_not_hidden(call, device):
    p = Parameter(place([np.nan, 1.0]))
    y = call(p)
    y.sum().backward()
    assert np.isnan(fetch(y)).tolist() == [True, False]
    assert not np.isnan(fetch(p.grad)[1])


@pytest.mark.parametrize(("exponent", "slope"), [(0, 0.0), (1, 1.0), (2, 0.0), (3.0, 0.0), (1.0, 1.0)])
def test_powers_at_zero(exponent, slope, device):
    p = Parameter(place([0.0]))
    y = p ** exponent
    y.sum().backward()
    assert fetch(y).tolist() == [0.0 ** exponent] and fetch(p.grad).tolist() == [slope]


# -- softmax -----------------------------------------------------------------------------------------------------------

ROWS = hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 6)),
                  elements=st.floats(-1e4, 1e4, allow_subnormal=False))


@given(x=ROWS)
def test_rows_sum_to_one_and_gradients_to_zero(device, x):
    p = Parameter(place(x))
    y = ops.softmax(p)
    n, eps = x.shape[1], np.finfo(float).eps
    assert fetch(y).min() >= 0
    np.testing.assert_allclose(fetch(y).sum(axis=1), 1.0, rtol=4 * n * eps)
    y.backward(place(np.ones(x.shape)))
    np.testing.assert_allclose(fetch(p.grad), 0.0, atol=4 * n * eps)
    p.grad = None
    dy = np.random.default_rng(0).standard_normal(x.shape)
    ops.softmax(p).backward(place(dy))
    np.testing.assert_allclose(fetch(p.grad).sum(axis=1), 0.0, atol=16 * n * eps)


@given(x=ROWS, c=st.floats(-1e4, 1e4))
def test_a_shift_changes_nothing_but_rounding(device, x, c):
    tol = 8 * np.finfo(float).eps * (1 + abs(x).max() + abs(c))
    for op in (ops.softmax, ops.log_softmax):
        there, here = fetch(op(Parameter(place(x + c)))), fetch(op(Parameter(place(x))))
        np.testing.assert_allclose(there, here, rtol=0, atol=4 * tol)


@given(x=ROWS)
def test_log_softmax_is_the_logarithm(device, x):
    p = Parameter(place(x))
    y = fetch(ops.log_softmax(p))
    assert np.isfinite(y).all() and y.max() <= 0
    np.testing.assert_allclose(np.exp(y), fetch(ops.softmax(p)), atol=1e-11)


def test_minus_infinity_is_a_probability_of_zero(device):
    x = np.array([[0.0, -np.inf, math.log(3.0)], [-np.inf, 5.0, -np.inf]])
    p = Parameter(place(x))
    y = ops.softmax(p)
    np.testing.assert_allclose(fetch(y), [[0.25, 0.0, 0.75], [0.0, 1.0, 0.0]], rtol=1e-15)
    y.backward(place(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])))
    np.testing.assert_allclose(fetch(p.grad), [[-0.375, 0.0, 0.375], [0.0, 0.0, 0.0]], atol=1e-15)
    p = Parameter(place(x))
    y = ops.log_softmax(p)
    np.testing.assert_allclose(fetch(y), [[math.log(0.25), -np.inf, math.log(0.75)], [-np.inf, 0.0, -np.inf]])
    y.backward(place(np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])))
    np.testing.assert_allclose(fetch(p.grad), [[0.75, 0.0, -0.75], [0.0, 0.0, 0.0]], atol=1e-15)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_softmax_of_equal_and_of_huge_numbers(dtype, device):
    for value in (0.0, 1e4, -1e4):
        y = fetch(ops.softmax(Parameter(place(np.full((2, 4), value), dtype))))
        np.testing.assert_array_equal(y, np.full((2, 4), 0.25, dtype), strict=True)
    y = fetch(ops.log_softmax(Parameter(place([[1e4, -1e4, 0.0]], dtype))))
    np.testing.assert_array_equal(y, np.array([[0.0, -2e4, -1e4]], dtype), strict=True)
