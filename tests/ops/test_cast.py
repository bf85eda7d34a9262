"""What the table of operations cannot say of `cast`: there, every output has the dtype of the inputs."""
import numpy as np
import pytest
from conftest import fetch, place

from minilora import Parameter, Tensor, errors, ops

FLOATS = ("float16", "float32", "float64")


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("was", FLOATS)
def test_each_gradient_comes_back_in_the_dtype_of_x(was, to, device):
    host = np.array([[0.1, -2.0, 300.0]], was)
    w = Parameter(place(host))
    y = ops.cast(w, to)
    assert (y.dtype, y.device.name) == (to, device)
    np.testing.assert_array_equal(fetch(y), host.astype(to))
    dy = np.array([[1.0 / 3.0, 2.0, -1.0]], to)
    y.backward(place(dy))
    assert w.grad.dtype == was
    np.testing.assert_array_equal(fetch(w.grad), dy.astype(was))


def test_two_dtypes_meet_where_a_cast_says_so(device):
    half, single = Parameter(place([3.0], "float16")), Parameter(place([0.5], "float32"))
    with pytest.raises(errors.DTypeError):
        half * single
    (ops.cast(half, single.dtype) * single).sum().backward()
    assert (half.grad.dtype, single.grad.dtype) == ("float16", "float32")
    assert (fetch(half.grad), fetch(single.grad)) == (0.5, 3.0)


def test_its_own_dtype_costs_no_copy(device):
    x = Tensor(place([1.0, 2.0]))
    assert x.device.xp.shares_memory(ops.cast(x, "float64").data, x.data)


def test_whole_numbers_are_constants(device):
    w = Parameter(place([1.5, -2.5]))
    y = ops.cast(w * 2.0, "int64")
    assert (y.node, y.dtype, fetch(y).tolist()) == (None, "int64", [3, -5])
    assert fetch(ops.cast(Tensor(place([0, 3])), "float32")).dtype == "float32"
    assert fetch(ops.cast(place([0.0, 3.0]), bool)).tolist() == [False, True]


@pytest.mark.parametrize("dtype", [None, "complex128", "object", "datetime64[s]", "float33", "U3", 7])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(errors.DTypeError, match="expected a dtype of numbers"):
        ops.cast(Tensor(np.ones(2)), dtype)
