"""SiLU in blocks: right to a few roundings, also far out; the rest is left to the reference."""
import numpy as np
import pytest

from minilora import Parameter, engine, ops
from minilora.kernels.cpu import silu as cpu_silu


def exact(x):
    x = x.astype("longdouble")
    p = 1 / (1 + np.exp(-x))
    return x * p, p + x * p * (1 - p)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [0, 1, 7, cpu_silu.BLOCK // 4 + 1])
def test_value_and_slope(size, dtype):
    x = (np.random.default_rng(0).standard_normal(size) * 9).astype(dtype)
    p = Parameter(x)
    y = ops.silu(p)
    y.backward(np.ones_like(x))
    value, slope = exact(x)
    eps = np.finfo(dtype).eps
    assert (np.abs(y.data - value) <= 6 * eps * np.abs(value)).all()
    assert (np.abs(p.grad - slope) <= 12 * eps * (np.abs(value) + 1)).all()
    assert y.data.tobytes() == ops.silu(x).data.tobytes() and y.dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_far_out_at_zero_and_no_number(dtype):
    x = np.array([-1e30, -2e4, -1000.0, 0.0, -0.0, 1000.0, 1e30, np.nan], dtype)
    p = Parameter(x)
    y = ops.silu(p)
    y.backward(np.ones_like(x))
    assert (np.abs(y.data[:3]) < 1e-35).all() and y.data[3:5].tolist() == [0.0, 0.0]
    assert y.data[5:7].tolist() == x[5:7].tolist() and np.isnan(y.data[7])
    assert (np.abs(p.grad[:3]) < 1e-30).all() and p.grad[3:5].tolist() == [0.5, 0.5] and p.grad[5:7].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("x", [np.ones((4, 6))[:, ::2], np.ones((3, 4), order="F")], ids=["strided", "columns"])
def test_the_rest_is_left_to_the_reference(x):
    p = Parameter(x)
    y = ops.silu(p)
    y.backward(np.ones_like(x))
    np.testing.assert_allclose(y.data, x / (1 + np.exp(-x)), rtol=1e-15)
    np.testing.assert_allclose(p.grad, 0.7310585786300049 * (1 + 0.2689414213699951), rtol=1e-14)


def test_it_keeps_its_slope():
    x = ops.neg(Parameter(np.ones((2, 3), "float32")))
    y = ops.silu(x)
    assert engine.ledger(y).nbytes == 24 and not np.shares_memory(y.node.saved[0], x.data)
