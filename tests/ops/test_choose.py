"""Ties, NaN, places and parts: what random numbers in the table of operations do not meet."""
import numpy as np
import pytest
from conftest import fetch, place

from minilora import Parameter, Tensor, ops
from minilora.errors import ConfigError, DTypeError, ShapeError

INF, NAN = np.inf, np.nan


def gradient(call, *hosts, dtype="float64"):
    parameters = [Parameter(place(host, dtype)) for host in hosts]
    y = call(*parameters)
    y.sum().backward()
    assert all(p.grad.dtype == dtype for p in parameters)
    return [fetch(y).tolist(), *(fetch(p.grad).tolist() for p in parameters)]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_equal_numbers_share(device, dtype):
    assert gradient(ops.maximum, [1.0, 2.0, 3.0], [1.0, 3.0, 2.0], dtype=dtype)[1:] == [[0.5, 0.0, 1.0], [0.5, 1.0, 0.0]]
    assert gradient(ops.minimum, [1.0, 2.0, 3.0], [1.0, 3.0, 2.0], dtype=dtype)[1:] == [[0.5, 1.0, 0.0], [0.5, 0.0, 1.0]]
    assert gradient(lambda x: ops.maximum(x, 0.0), [0.0, -1.0, INF], dtype=dtype) == [[0.0, 0.0, INF], [0.5, 0.0, 1.0]]
    rows = [[5.0, 1.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 0.0, 1.0]]
    assert gradient(lambda x: ops.max(x, 1), rows, dtype=dtype)[1] == [[0.25, 0.0, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 0.0, 1.0]]
    assert gradient(lambda x: ops.min(x, (0, 1)), rows, dtype=dtype)[1] == [[0.0] * 5, [0.25, 0.25, 0.25, 0.25, 0.0]]
    assert gradient(ops.max, [-INF, -INF], dtype=dtype) == [-INF, [0.5, 0.5]]


def test_kinks(device):
    assert gradient(ops.abs, [-2.0, 0.0, 3.0]) == [[2.0, 0.0, 3.0], [-1.0, 0.0, 1.0]]
    assert gradient(lambda x: ops.clip(x, -1, 1), [-2.0, -1.0, 0.0, 1.0, 2.0])[1] == [0.0, 0.0, 1.0, 0.0, 0.0]
    assert gradient(lambda x: ops.clip(x, 1.0, 1.0), [0.0, 1.0, 2.0]) == [[1.0] * 3, [0.0] * 3]


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_nan_wins_in_pairs(device, name):
    x1, x2 = [NAN, 1.0, NAN], [1.0, NAN, NAN]
    y, d1, d2 = gradient(getattr(ops, name), x1, x2)
    np.testing.assert_array_equal(y, getattr(np, name)(x1, x2))
    assert d1 == d2 == [1.0] * 3


@pytest.mark.parametrize("name", ["max", "min"])
def test_nan_wins_over_axes(device, name):
    y, dx = gradient(lambda x: getattr(ops, name)(x, 1), [[1.0, NAN, 3.0, NAN], [1.0, 2.0, 3.0, 4.0]])
    assert np.isnan(y[0]) and np.isfinite(y[1])
    assert dx[0] == [0.0, 0.5, 0.0, 0.5]
    assert np.isnan(gradient(lambda x: ops.clip(x, 0, 1), [NAN])[0]).all() and np.isnan(gradient(ops.abs, [NAN])[0]).all()


def test_where_never_mixes(device):
    """The number that is not taken may be anything: no 0 times infinity."""
    y, da, db = gradient(lambda a, b: ops.where([True, False], a, b), [1.0, NAN], [INF, 2.0])
    assert (y, da, db) == ([1.0, 2.0], [1.0, 0.0], [0.0, 1.0])
    x = Parameter(place(2.0))
    ops.where(x.data > 0.0, x * 3.0, 0.0).backward()  # NumPy gives a scalar where no axis is left
    assert fetch(x.grad) == 3.0
    assert ops.where(Tensor(place([True])), x, 0.0).shape == (1,)


def test_places(device):
    host = np.array([[1.0, 5.0, 5.0], [7.0, 2.0, 0.0]])
    x = Parameter(place(host))
    for axis in (None, 0, 1, -1):
        y = ops.argmax(x * 1.0, axis)
        assert (y.node, y.dtype, y.device.name) == (None, "int64", device)
        np.testing.assert_array_equal(fetch(y), host.argmax(axis))
    assert fetch(ops.argmax(place([3.0, 70000.0], "float32"))) == 1
    assert fetch(x[ops.argmax(x, 0)]).shape == (3, 3)
    assert fetch(ops.argmax(place([1.0, NAN], "float16"))) == 1


@pytest.mark.parametrize(("cuts", "axis"), [(2, 0), (1, 1), (np.int64(3), -1), ([1, 3], 0), ([2, 2], 1), ([-1], 0), ([], 0),
                                            ([3, 1], 0), ([9], 1), (np.array([1]), 0)])
def test_parts(device, cuts, axis):
    host = np.arange(12.0).reshape(4, 3)
    x = Parameter(place(host))
    parts = ops.split(x, cuts, axis)
    expected = np.split(host, cuts, axis)
    assert isinstance(parts, tuple) and len(parts) == len(expected)
    dx = np.zeros_like(host)
    places = np.split(np.arange(12).reshape(4, 3), cuts, axis)
    total = 0.0
    for i, (part, host_part, named) in enumerate(zip(parts, expected, places)):
        np.testing.assert_array_equal(fetch(part), host_part)
        total = part.sum() * float(i + 1) + total
        np.add.at(dx.reshape(-1), named, i + 1.0)
    total.backward()
    np.testing.assert_array_equal(fetch(x.grad), dx)


REFUSED = {
    "max of nothing": (ShapeError, lambda x: ops.max(x[:0])),
    "min of nothing": (ShapeError, lambda x: ops.min(x[:, :0], 1)),
    "argmax of nothing": (ShapeError, lambda x: ops.argmax(x[:0])),
    "max axis": (ShapeError, lambda x: ops.max(x, 2)),
    "argmax axis": (ShapeError, lambda x: ops.argmax(x, 2)),
    "stack of nothing": (ShapeError, lambda x: ops.stack([])),
    "stack of two shapes": (ShapeError, lambda x: ops.stack([x, x[0]])),
    "stack axis": (ShapeError, lambda x: ops.stack([x], 3)),
    "split axis": (ShapeError, lambda x: ops.split(x, 1, 2)),
    "split of a number": (ShapeError, lambda x: ops.split(x[0, 0], 1)),
    "unequal parts": (ShapeError, lambda x: ops.split(x, 2, 1)),
    "no parts": (ShapeError, lambda x: ops.split(x, 0)),
    "maximum": (ShapeError, lambda x: ops.maximum(x, x[:, :2])),
    "minimum": (ShapeError, lambda x: ops.minimum(x, x[:, :2])),
    "where": (ShapeError, lambda x: ops.where([True, False], x, x)),
    "condition of numbers": (DTypeError, lambda x: ops.where(x, x, x)),
    "condition of text": (DTypeError, lambda x: ops.where("a", x, x)),
    "where of None": (DTypeError, lambda x: ops.where(True, x, None)),
    "two numbers": (DTypeError, lambda x: ops.where(True, 1.0, 2.0)),
    "ragged condition": (DTypeError, lambda x: ops.where([[True], []], x, x)),
    "maximum of None": (DTypeError, lambda x: ops.maximum(x, None)),
    "low above high": (ConfigError, lambda x: ops.clip(x, 2, 1)),
    "a bound that is NaN": (ConfigError, lambda x: ops.clip(x, NAN)),
    "an array as a bound": (ConfigError, lambda x: ops.clip(x, x)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(device, name):
    error, call = REFUSED[name]
    with pytest.raises(error):
        call(Tensor(place(np.ones((4, 3)))))
