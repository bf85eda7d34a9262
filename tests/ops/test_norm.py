"""Normalisation: what it promises of its output, and where it is delicate."""
import math

import numpy as np
import pytest
from conftest import fetch, place
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minilora import Parameter, engine, ops
from minilora.errors import ConfigError, DTypeError, ShapeError

ROWS = hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 9)), elements=st.floats(-1e3, 1e3, width=32))


def spread(x):
    return x.std(axis=-1).min() > 1e-3


@given(x=ROWS.filter(spread))
def test_rows_have_mean_0_and_variance_1(device, x):
    y = fetch(ops.layer_norm(Parameter(place(x)), eps=0.0))
    tol = 1e-12 * (1 + abs(x).max() / x.std(axis=-1).min())
    np.testing.assert_allclose(y.mean(axis=-1), 0.0, atol=tol)
    np.testing.assert_allclose(y.var(axis=-1), 1.0, atol=tol)


@given(x=ROWS.filter(spread))
def test_rows_have_mean_square_1(device, x):
    y = fetch(ops.rms_norm(Parameter(place(x)), eps=0.0))
    np.testing.assert_allclose((y * y).mean(axis=-1), 1.0, rtol=1e-13)


def test_groups_have_mean_0_and_variance_1(device):
    x = np.random.default_rng(0).standard_normal((3, 6, 4, 5)) * 7 + 3
    y = fetch(ops.group_norm(Parameter(place(x)), 2, eps=0.0)).reshape(3, 2, -1)
    np.testing.assert_allclose(y.mean(axis=-1), 0.0, atol=1e-14)
    np.testing.assert_allclose(y.var(axis=-1), 1.0, rtol=1e-13)


@given(x=ROWS.filter(spread), power=st.integers(-20, 20), shift=st.integers(-8, 8))
def test_scale_changes_nothing_and_shift_only_rounds(device, x, power, shift):
    """A power of two changes no bit of the mantissas; a shift leaves the gradient orthogonal to ones."""
    p, scaled, shifted = (Parameter(place(a)) for a in (x, x * 2.0 ** power, x + shift))
    for norm in (ops.layer_norm, ops.rms_norm):
        np.testing.assert_array_equal(fetch(norm(scaled, eps=0.0)), fetch(norm(p, eps=0.0)))
    tol = 1e-12 * (1 + (8 + abs(x).max()) / x.std(axis=-1).min())
    np.testing.assert_allclose(fetch(ops.layer_norm(shifted, eps=0.0)), fetch(ops.layer_norm(p, eps=0.0)), atol=tol)


def test_gradient_is_orthogonal_to_what_the_norm_forgets(device):
    """Scale and shift do not reach the output, so the gradient has no part along x, and none along ones."""
    x = np.random.default_rng(1).standard_normal((5, 8)) + 2
    dy = np.random.default_rng(2).standard_normal(x.shape)
    for norm, forgets_shift in ((ops.layer_norm, True), (ops.rms_norm, False)):
        p = Parameter(place(x))
        norm(p, eps=0.0).backward(place(dy))
        np.testing.assert_allclose((fetch(p.grad) * x).sum(axis=-1), 0.0, atol=1e-14)
        if forgets_shift:
            np.testing.assert_allclose(fetch(p.grad).sum(axis=-1), 0.0, atol=1e-14)


def test_one_group_is_layer_norm_of_the_sample(device):
    x = np.random.default_rng(3).standard_normal((4, 6))
    dy = place(np.random.default_rng(4).standard_normal(x.shape))
    one, other = Parameter(place(x)), Parameter(place(x))
    y, expected = ops.group_norm(one, 1), ops.layer_norm(other)
    np.testing.assert_allclose(fetch(y), fetch(expected), rtol=1e-14, atol=1e-14)
    y.backward(dy)
    expected.backward(dy)
    np.testing.assert_allclose(fetch(one.grad), fetch(other.grad), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_mean_does_not_spoil_the_variance(dtype, device):
    """Mean of squares minus squared mean would lose every digit here."""
    y = fetch(ops.layer_norm(Parameter(place([[1e6, 1e6 + 1, 1e6 + 2]], dtype)), eps=0.0))
    np.testing.assert_allclose(y, [[-math.sqrt(1.5), 0.0, math.sqrt(1.5)]], rtol=1e-6, atol=1e-6)


def test_equal_numbers_give_zeros_and_no_warning(device):
    for norm in (ops.layer_norm, lambda x: ops.group_norm(x, 1)):
        p = Parameter(place(np.full((2, 4), 3.25)))
        y = norm(p)
        y.backward(place(np.ones((2, 4))))
        assert not fetch(y).any() and not fetch(p.grad).any()
    y = ops.rms_norm(Parameter(place(np.zeros((2, 4)))))
    assert not fetch(y).any()


def test_frozen_affine_parameters_cost_nothing(device):
    x = place(np.ones((3, 4)))
    w, b = Parameter(place(np.ones(4)), trainable=False), Parameter(place(np.zeros(4)), trainable=False)
    assert ops.layer_norm(x, w, b).node is None and ops.rms_norm(x, w).node is None
    y = ops.layer_norm(Parameter(x), w, b)
    assert y.node.backward(y.data)[1:] == (None, None)
    b.trainable = True
    assert engine.ledger(ops.layer_norm(x, w, b)).nbytes == 0  # b alone needs nothing but dy


def test_what_is_refused(device):
    x = Parameter(place(np.ones((2, 6))))
    w = Parameter(place(np.ones(5)))
    for call in (ops.layer_norm, ops.rms_norm, lambda x, w: ops.layer_norm(x, b=w), lambda x, w: ops.group_norm(x, 2, w),
                 lambda x, w: ops.group_norm(x, 4), lambda x, w: ops.group_norm(w, 1),
                 lambda x, w: ops.layer_norm(ops.sum(x)), lambda x, w: ops.rms_norm(place(np.ones((2, 0)))),
                 lambda x, w: ops.group_norm(place(np.ones((2, 4, 0))), 2)):
        with pytest.raises(ShapeError):
            call(x, w)
    for eps in (-1e-5, math.inf, math.nan, "1e-5", True, None):
        for call in (ops.layer_norm, ops.rms_norm, lambda x, eps: ops.group_norm(x, 2, eps=eps)):
            with pytest.raises(ConfigError, match="eps"):
                call(x, eps=eps)
    for groups in (0, -1, 2.0, True):
        with pytest.raises(ConfigError, match="groups"):
            ops.group_norm(x, groups)
    with pytest.raises(DTypeError):
        ops.layer_norm(place([[1, 2]]))
