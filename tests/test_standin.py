"""The stand-in itself: what it refuses, what it counts, and that its numbers are NumPy's."""
import copy
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from standin import CaptureError, asnumpy, capturing, counting, ndarray, synchronize, xp

HOST = np.arange(6, dtype=np.float32).reshape(2, 3)
ROWS = xp.asarray(np.array([1, 0]))


@pytest.fixture
def dev():
    return xp.asarray(HOST)


REFUSED = {
    "np.asarray(dev)": lambda x: np.asarray(x),
    "np.array([dev])": lambda x: np.array([x]),
    "np.sum(dev)": lambda x: np.sum(x),
    "np.concatenate([dev])": lambda x: np.concatenate([x]),
    "np.exp(dev)": lambda x: np.exp(x),
    "np.add(host, dev)": lambda x: np.add(HOST, x),
    "np.add.reduce(dev)": lambda x: np.add.reduce(x),
    "np.float32(dev)": lambda x: np.float32(x),
    "host + dev": lambda x: HOST + x,
    "dev + host": lambda x: x + HOST,
    "dev == host": lambda x: x == HOST,
    "dev == list": lambda x: x == [1, 2, 3],
    "dev == None": lambda x: x == None,  # noqa: E711
    "dev += host": lambda x: x.__iadd__(HOST),
    "dev @ host": lambda x: x @ HOST.T,
    "dev + list": lambda x: x + [1.0, 2.0, 3.0],
    "dev * float64": lambda x: x * np.float64(2),
    "float64 * dev": lambda x: np.float64(2) * x,
    "host[...] = dev": lambda x: HOST.copy().__setitem__(..., x),
    "host sum as operand": lambda x: x / HOST.sum(dtype=np.float64),
    "xp.add(dev, host)": lambda x: xp.add(x, HOST),
    "xp.exp(host)": lambda x: xp.exp(HOST),
    "xp.sum(host)": lambda x: xp.sum(HOST),
    "xp.sum(list)": lambda x: xp.sum([1.0, 2.0]),
    "xp.where(host, ...)": lambda x: xp.where(HOST > 0, x, 0.0),
    "xp.where(cond)": lambda x: xp.where(x > 0),
    "xp.concatenate([host])": lambda x: xp.concatenate([x, HOST]),
    "xp.concatenate(dev)": lambda x: xp.concatenate(x),
    "xp.einsum(host)": lambda x: xp.einsum("ij,ij->", x, HOST),
    "xp.take(host index)": lambda x: xp.take(x, np.array([0])),
    "xp.full(host)": lambda x: xp.full(3, np.array(1.0)),
    "xp.full(dev)": lambda x: xp.full(3, xp.sum(x)),
    "xp.copyto(host)": lambda x: xp.copyto(x, HOST),
    "xp.add.at(host)": lambda x: xp.add.at(x, xp.asarray([0]), HOST),
    "xp.add.at(bool)": lambda x: xp.add.at(x > 0, xp.asarray([0]), 1),
    "xp.asarray([dev])": lambda x: xp.asarray([x, x]),
    "xp.asarray(objects)": lambda x: xp.asarray(["text"]),
    "dev.sum(where=)": lambda x: x.sum(where=x > 0),
    "xp.stack(numbers)": lambda x: xp.stack([1.0, 2.0]),
    "xp.sum(a=dev)": lambda x: xp.sum(a=x),
    "sum(where=)": lambda x: xp.sum(x, where=x > 0),
    "max(initial=)": lambda x: xp.max(x, initial=0.0),
    "count_nonzero(keepdims=)": lambda x: xp.count_nonzero(x, keepdims=True),
    "axis on the device": lambda x: xp.sum(x, axis=xp.asarray(0)),
    "index by a host array": lambda x: x[np.array([0, 1])],
    "index by a list": lambda x: x[[0, 1]],
    "index by a bool": lambda x: x[True],
    "slice by a device array": lambda x: x[:xp.asarray(1)],
    "store a host array": lambda x: x.__setitem__(0, HOST[0]),
    "store float64": lambda x: x.__setitem__(0, np.float64(1)),
    "store float in int": lambda x: xp.zeros(3, xp.int64).__setitem__(slice(None), x[0]),
    "int += float": lambda x: xp.zeros((2, 3), xp.int32).__iadd__(x),
    "out= of another dtype": lambda x: xp.exp(x, out=xp.empty((2, 3), xp.float64)),
    "out= of another shape": lambda x: xp.add(x[0], x[0], out=xp.empty((2, 3), xp.float32)),
    "out= on the host": lambda x: xp.exp(x, out=HOST.copy()),
    "sum(out=) of another dtype": lambda x: xp.sum(x, axis=0, out=xp.empty(3, xp.float64)),
    "set() of another dtype": lambda x: x.set(HOST.astype(np.float64)),
    "set() from the device": lambda x: x.set(x),
    "float(matrix)": lambda x: float(x),
    "ndarray(shape)": lambda x: xp.ndarray((2, 3), xp.float32),
    "hash": lambda x: hash(x),
    "iteration of a 0-d array": lambda x: list(xp.sum(x)),
    "range(dev)": lambda x: range(xp.asarray(3)),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_refused_with_type_error(mistake, dev):
    with pytest.raises(TypeError):
        REFUSED[mistake](dev)
    assert (dev.get() == HOST).all()


def test_refusals_name_the_cure(dev):
    with pytest.raises(TypeError, match=r"Implicit conversion to a NumPy array is not allowed.*get\(\)"):
        np.asarray(dev)
    with pytest.raises(TypeError, match=r"numpy\.add met a device array: use xp\.add"):
        HOST + dev
    with pytest.raises(TypeError, match=r"numpy\.sum met a device array: use xp\.sum"):
        np.sum(dev)
    with pytest.raises(TypeError, match=r"xp\.asarray.*Python number"):
        dev * np.float64(2)
    with pytest.raises(TypeError, match=r"exp: out is float64 \(2, 3\), the result is float32 \(2, 3\)"):
        xp.exp(dev, out=xp.empty((2, 3)))


@pytest.mark.parametrize("name", ["errstate", "vecdot", "matvec", "unstack", "einsum_path", "no_such_name"])
def test_a_missing_name_is_an_attribute_error_that_names_it(name):
    with pytest.raises(AttributeError, match=rf"no xp\.{name}"):
        getattr(xp, name)
    with pytest.raises(AttributeError, match=rf"no xp\.linalg\.{name}"):
        getattr(xp.linalg, name)


def test_no_random():
    with pytest.raises(AttributeError, match="no xp.random: minilora draws on the host"):
        xp.random


def test_unknown_types_may_answer_an_operator_themselves(dev):
    class Guest:
        __array_ufunc__ = None

        def __radd__(self, other):
            return "guest"
    assert dev + Guest() == "guest"


@pytest.mark.parametrize("bad", [2, -3])
def test_a_gather_out_of_range_raises_where_cupy_wraps(bad, dev):
    rows = xp.asarray([0, bad])
    for gather in (lambda: dev[rows], lambda: xp.take(dev, rows, axis=0), lambda: dev.take(rows, axis=0),
                   lambda: xp.take_along_axis(dev, rows[:, None], axis=0), lambda: xp.add.at(dev, rows, 1.0),
                   lambda: dev.__setitem__(rows, 1.0)):
        with pytest.raises(IndexError):
            gather()


def test_several_values_at_one_place_raise():
    a, twice = xp.zeros(4), xp.asarray([1, 1])
    with pytest.raises(ValueError, match=r"undefined on a GPU.*xp\.add\.at"):
        a[twice] = xp.asarray([1.0, 2.0])
    with pytest.raises(ValueError):
        a[xp.asarray([1, -3])] = xp.asarray([1.0, 2.0])
    with pytest.raises(ValueError):
        a[twice] += xp.ones(2)
    matrix = xp.zeros((2, 2))
    with pytest.raises(ValueError):
        matrix[xp.asarray([0, 0]), xp.asarray([1, 1])] = xp.ones(2)
    matrix[xp.asarray([0, 0]), xp.asarray([1, 0])] = xp.ones(2)
    assert matrix.tolist() == [[1, 1], [0, 0]] and a.tolist() == [0, 0, 0, 0]


def test_one_value_at_one_place_twice_is_defined():
    a = xp.zeros(3)
    a[xp.asarray([1, 1])] = 5.0
    a[xp.asarray([2, 2])] = xp.asarray(7.0)
    assert a.tolist() == [0, 5, 7]


def test_add_at_adds_every_occurrence():
    a = xp.zeros((3, 2), xp.float32)
    with counting() as n:
        assert xp.add.at(a, xp.asarray([1, 1, 2]), xp.ones((3, 2), xp.float32)) is None
    assert a.tolist() == [[0, 0], [2, 2], [1, 1]] and n.calls["add.at"] == 1 and n.syncs == 0
    with pytest.raises(TypeError, match="int64"):
        xp.add.at(xp.zeros(3, xp.int64), xp.asarray([0]), 1)


@pytest.mark.parametrize("name", "float16 float32 float64 complex64 complex128".split())
def test_empty_is_poisoned_with_nan(name):
    for a in (xp.empty((2, 3), name), xp.empty_like(xp.zeros((2, 3), name))):
        assert a.dtype == name and a.shape == (2, 3) and np.isnan(a.get()).all()


@pytest.mark.parametrize("name", "int32 int64 uint8 uint64".split())
def test_empty_integers_are_poisoned_with_the_largest(name):
    assert xp.empty(3, name).tolist() == [np.iinfo(name).max] * 3


def test_the_poison_reaches_what_reads_it(dev):
    buffer = xp.empty((2, 3), xp.float32)
    assert np.isnan(float((buffer * 0.0 + dev).sum()))


def test_dtypes_are_kept_as_by_nep_50(dev):
    for result in (dev * 2, 2.5 * dev, dev ** 2, dev / 3, dev + np.float32(1), xp.where(dev > 0, dev, 0.0),
                   dev.mean(), xp.maximum(dev, 0.0), -dev, abs(dev), dev @ dev.T):
        assert result.dtype == xp.float32
    assert (dev + xp.zeros(3)).dtype == xp.float64
    assert (dev + xp.asarray(2.0)).dtype == xp.float64
    assert (dev > 1).dtype == xp.bool_
    assert (dev * 1j).dtype == xp.complex64


def test_in_place_operators_keep_array_and_dtype(dev):
    x = before = dev.copy()
    x += 1
    x *= xp.full((2, 3), 2.0)
    x -= dev
    x /= 2.0
    x **= 2
    assert x is before and x.dtype == xp.float32
    assert np.allclose(x.get(), ((HOST + 2) / 2) ** 2)


def test_out_is_written_and_returned(dev):
    out = xp.empty((2, 3), xp.float32)
    assert xp.exp(dev, out=out) is out and (out.get() == np.exp(HOST)).all()
    assert xp.add(dev, 1.0, out) is out and (out.get() == HOST + 1).all()
    product, total = xp.empty((2, 2), xp.float32), xp.empty((), xp.float32)
    assert xp.matmul(dev, dev.T, out=product) is product and (product.get() == HOST @ HOST.T).all()
    assert dev.sum(out=total) is total and total.item() == 15
    assert xp.add(dev, dev, dtype=xp.float64).dtype == xp.float64


def test_there_are_no_floating_point_warnings(dev):
    with np.errstate(all="warn"):
        assert np.isinf((dev / 0.0).get()[1, 1]) and np.isnan(xp.log(-dev).get()[1, 1])
        x = dev.copy()
        x /= 0.0


def test_complex_arrays():
    z = xp.asarray(np.array([1 + 2j, 3 - 1j], np.complex64))
    assert z.real.tolist() == [1, 3] and z.imag.tolist() == [2, -1] and z.conj().tolist() == [1 - 2j, 3 + 1j]
    z.real[0] = 5.0
    assert complex(z[0]) == 5 + 2j and z.real.base is z and abs(z).dtype == xp.float32


def test_reductions_and_0d_arithmetic_stay_on_the_device(dev):
    with counting() as n:
        total = xp.sum(dev)
        results = [total, dev.max(), xp.mean(dev), dev.any(), xp.argmax(dev), xp.dot(dev[0], dev[0]),
                   total + total, total * 2.0, total > 1, -total, xp.sqrt(total), dev[0, 0],
                   xp.count_nonzero(dev), xp.array_equal(dev, dev), xp.linalg.norm(dev),
                   xp.einsum("ij->", dev)]
    assert all(type(result) is ndarray and result.shape == () for result in results)
    assert n.syncs == n.d2h == n.h2d == 0


def test_views_share_memory_and_base_is_the_root_owner(dev):
    assert dev.base is None and dev.flags.owndata
    views = [dev[0], dev[:, 1:], dev[None], dev[..., 0], dev[1, 2], dev[0][1:], dev.T, dev.ravel(),
             dev.reshape(3, 2), dev.reshape(-1)[2:4], dev.view(xp.int32), xp.split(dev, 2)[1],
             xp.broadcast_to(dev, (4, 2, 3)), xp.squeeze(dev[:1]), xp.swapaxes(dev, 0, 1),
             xp.expand_dims(dev, 0), xp.moveaxis(dev, 0, 1)]
    assert all(view.base is dev and xp.shares_memory(view, dev) for view in views)
    assert not any(view.flags.owndata for view in views)
    owners = [dev.copy(), dev + 0, dev.astype(xp.float64), dev.flatten(), dev.T.reshape(-1), dev[ROWS],
              dev[dev > 1], dev[xp.asarray(0)], xp.tile(dev, 2),
              xp.zeros_like(dev), copy.copy(dev), copy.deepcopy(dev)]
    assert all(owner.base is None and not xp.may_share_memory(owner, dev) for owner in owners)
    dev[0][1:][0] = 9.0
    assert dev.get()[0, 1] == 9


def test_asarray_and_ascontiguousarray_give_the_same_object_back(dev):
    assert xp.asarray(dev) is dev and xp.ascontiguousarray(dev) is dev
    assert dev.astype(xp.float32, copy=False) is dev
    assert xp.array(dev) is not dev and xp.asarray(dev, xp.float64).base is None
    assert dev.T.flags.f_contiguous and not dev.T.flags.c_contiguous
    assert xp.ascontiguousarray(dev.T).flags.c_contiguous


def test_the_copy_to_the_device_and_back_is_a_copy():
    host = HOST.copy()
    x = xp.asarray(host)
    host[0, 0] = 7
    x.get()[0, 0] = 8
    asnumpy(x)[0, 0] = 9
    assert x.get()[0, 0] == 0 and asnumpy(host) is host


def test_attributes(dev):
    assert (dev.shape, dev.ndim, dev.size, dev.dtype) == ((2, 3), 2, 6, np.dtype("float32"))
    assert (dev.itemsize, dev.nbytes, dev.strides, len(dev)) == (4, 24, (12, 4), 2)
    assert xp.shape(dev) == (2, 3) and xp.ndim(dev) == 2 and xp.result_type(dev, xp.int32) == np.float64
    assert isinstance(dev, xp.ndarray) and not isinstance(dev, np.ndarray) and not hasattr(dev, "__index__")
    with pytest.raises(AttributeError):
        dev.note = 1


KEYS = [0, -1, (0, 1), slice(None, None, -1), (Ellipsis, 1), (slice(1), None, 2), ()]


@pytest.mark.parametrize("key", KEYS)
def test_indexing_is_numpys(key, dev):
    assert (dev[key].get() == HOST[key]).all() and dev[key].shape == HOST[key].shape
    dev[key] = -1.0
    expected = HOST.copy()
    expected[key] = -1
    assert (dev.get() == expected).all()


def test_indexing_by_device_arrays(dev):
    rows, columns = np.array([1, 0]), np.array([2, -1])
    assert (dev[xp.asarray(rows), xp.asarray(columns)].get() == HOST[rows, columns]).all()
    assert (dev[:, xp.asarray(columns)].get() == HOST[:, columns]).all()
    dev[dev > 2] = 0.0
    assert (dev.get() == np.where(HOST > 2, 0, HOST)).all()
    with pytest.raises(IndexError, match="float32"):
        dev[dev]


LOOKS = {
    "float": float, "int": int, "bool": bool, "complex": complex, "str": str, "repr": repr,
    "asnumpy": asnumpy,
    "item": lambda x: x.item(),
    "get": lambda x: x.get(),
    "tolist": lambda x: x.tolist(),
    "pickle": pickle.dumps,
    "format": lambda x: f"{x:.3f}",
    "if": lambda x: 1 if x else 0,
    "in": lambda x: 3.0 in x.reshape(1),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_at_a_value_is_a_counted_sync(look):
    x = xp.asarray(3.0)
    with counting() as n:
        LOOKS[look](x)
    assert n.syncs == n.d2h == 1 and n.h2d == 0
    with capturing(), pytest.raises(CaptureError):
        LOOKS[look](x)


DATA_SHAPED = {
    "gather by mask": lambda x: x[x > 0],
    "store by mask": lambda x: x.__setitem__(x > 1, xp.zeros(2)),
    "store a number by mask": lambda x: x.__setitem__(x > 1, 0.0),
    "nonzero": xp.nonzero,
    "unique": xp.unique,
    "inv": xp.linalg.inv,
    "qr": xp.linalg.qr,
    "svd": xp.linalg.svd,
    "solve": lambda x: xp.linalg.solve(x, x),
    "synchronize": lambda x: synchronize(),
}


@pytest.mark.parametrize("name", DATA_SHAPED)
def test_what_depends_on_the_data_is_a_counted_sync(name):
    x = xp.asarray(np.array([[2.0, 1.0], [0.0, 3.0]]))
    with counting() as n:
        DATA_SHAPED[name](x)
    assert n.syncs == 1 and n.d2h == 0
    with capturing(), pytest.raises(CaptureError):
        DATA_SHAPED[name](x)


COPIES_IN = {"asarray(host)": lambda x: xp.asarray(HOST), "array(list)": lambda x: xp.array([1.0]),
             "asarray(scalar)": lambda x: xp.asarray(2.0), "set": lambda x: x.set(HOST)}


@pytest.mark.parametrize("name", COPIES_IN)
def test_copies_to_the_device_are_counted(name, dev):
    with counting() as n:
        COPIES_IN[name](dev)
    assert (n.h2d, n.syncs, n.d2h, n.launches) == (1, 0, 0, 0)
    with capturing(), pytest.raises(CaptureError, match="h2d"):
        COPIES_IN[name](dev)


LAUNCHES = {
    1: {"ufunc": lambda x: x + x,
        "in place": lambda x: x.__iadd__(1.0),
        "out": lambda x: xp.exp(x, out=x),
        "reduction": lambda x: x.sum(),
        "matmul": lambda x: x @ x.T,
        "where": lambda x: xp.where(x, x, 0.0),
        "gather": lambda x: x[ROWS],
        "store": lambda x: x.__setitem__(0, 1.0),
        "stack": lambda x: xp.stack([x, x]),
        "copy": lambda x: x.copy(),
        "copyto": lambda x: xp.copyto(x, 0.0),
        "fill": lambda x: x.fill(0.0),
        "cast": lambda x: x.astype(xp.float64),
        "reshape that copies": lambda x: x.T.reshape(-1)},
    0: {"slice": lambda x: x[0],
        "reshape": lambda x: x.reshape(-1),
        "transpose": lambda x: x.T,
        "split": lambda x: xp.split(x, 3, axis=1),
        "broadcast": lambda x: xp.broadcast_to(x, (2, 2, 3)),
        "empty": lambda x: xp.empty(3),
        "query": lambda x: xp.shape(x),
        "length": len,
        "same array": lambda x: xp.ascontiguousarray(x)},
}


@pytest.mark.parametrize("expected, name", [(k, name) for k, table in LAUNCHES.items() for name in table])
def test_launches_are_counted_and_views_are_free(expected, name, dev):
    dev = dev + 0.0
    with counting() as n, capturing():
        LAUNCHES[expected][name](dev)
    assert (n.launches, n.syncs, n.h2d, n.d2h) == (expected, 0, 0, 0), n.calls


def test_adding_to_a_slice_is_one_launch(dev):
    with counting() as n:
        dev[0] += 1.0
        dev[:, 1:] *= dev[:, 1:]
    assert n.launches == 2 and n.calls == {"add": 1, "multiply": 1}


def test_counters_nest_and_stop_after_their_block(dev):
    with counting() as outer:
        dev + dev
        with counting() as inner:
            dev * dev
    dev - dev
    assert outer.launches == 2 and inner.launches == 1
    assert inner.calls == {"multiply": 1} and outer.calls == {"add": 1, "multiply": 1}


def test_the_end_of_a_capture_is_the_end_even_after_an_error(dev):
    with pytest.raises(CaptureError, match=r"float\(\).*captured.*syncs"):
        with capturing():
            float(dev.sum())
    assert float(dev.sum()) == 15
    assert issubclass(CaptureError, RuntimeError)


def step(x, w, a, b, loss_at=None):
    """One step of a rank-1 update on the squared error; `loss_at` is the place of a mistake."""
    z = x @ a.T
    y = x @ w.T + z @ b.T
    dy = y * (2.0 / y.size)
    loss = xp.mean(y * y)
    if loss_at is not None:
        loss_at(loss, dy)
    db, da = dy.T @ z, (dy @ b).T @ x
    b -= 0.1 * db
    a -= 0.1 * da
    return loss


def parameters():
    rng = np.random.default_rng(0)
    shapes = [(5, 4), (3, 4), (1, 4), (3, 1)]
    return [xp.asarray(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]


MISTAKES = {
    "float(loss)": lambda loss, dy: float(loss),
    "loss.item()": lambda loss, dy: loss.item(),
    "if loss:": lambda loss, dy: 1 if loss else 0,
    "if loss > 3:": lambda loss, dy: 1 if loss > 3.0 else 0,
    "print(loss)": lambda loss, dy: print(loss),
    "asarray during capture": lambda loss, dy: xp.asarray(np.ones(3, np.float32)),
    "np.add(host, dev)": lambda loss, dy: np.add(np.ones((5, 3), np.float32), dy),
    "xp.add(dev, host)": lambda loss, dy: xp.add(dy, np.ones((5, 3), np.float32)),
    "np.sum(dev)": lambda loss, dy: np.sum(dy),
    "math on the host": lambda loss, dy: np.sqrt(loss),
    "max(list of losses)": lambda loss, dy: max([loss, loss]),
    "dy[mask]": lambda loss, dy: dy[dy > 0],
    "a[dup] = v": lambda loss, dy: dy.__setitem__(xp.zeros(2, xp.int64), dy[:2]),
    "a[out of range]": lambda loss, dy: dy[xp.full(2, 5, dtype=xp.int64)],
    "out= of float64": lambda loss, dy: xp.multiply(dy, 2.0, out=xp.empty((5, 3))),
    "drawing on the device": lambda loss, dy: xp.random.standard_normal(3),
}


def test_a_clean_step_runs_in_a_capture():
    arrays = parameters()
    with counting() as n, capturing():
        loss = step(*arrays)
    assert loss.shape == () and n.syncs == n.h2d == n.d2h == 0 and n.launches == 14, n.calls


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_caught(mistake):
    arrays = parameters()
    with capturing(), pytest.raises((TypeError, ValueError, IndexError, AttributeError, CaptureError)):
        step(*arrays, loss_at=MISTAKES[mistake])


A = np.linspace(0.1, 0.9, 6, dtype=np.float32).reshape(2, 3)
B = np.array([[1, -2, 0.5], [3, 0.25, -1]], np.float32)
K = np.array([[2, 0, 1], [1, 1, 2]])

OF_ONE = """negative exp log sqrt square tanh abs absolute sign isfinite isnan reciprocal log1p expm1 sin cos
    floor rint logical_not sum mean max min any all prod argmax cumsum var std sort argsort
    count_nonzero ravel squeeze tril triu zeros_like ones_like""".split()
OF_TWO = """add subtract multiply divide true_divide power maximum minimum greater less equal not_equal
    greater_equal less_equal logical_and logical_or outer tensordot isclose allclose array_equal""".split()
OF_INTEGERS = "bitwise_and bitwise_or bitwise_xor left_shift right_shift".split()

VALUES = {name: (lambda xp, a, b, k, name=name: getattr(xp, name)(a)) for name in OF_ONE}
VALUES |= {name: (lambda xp, a, b, k, name=name: getattr(xp, name)(a, b)) for name in OF_TWO}
VALUES |= {name: (lambda xp, a, b, k, name=name: getattr(xp, name)(k, k)) for name in OF_INTEGERS}
VALUES |= {
    "ones": lambda xp, a, b, k: xp.ones((2, 1), xp.int32) + xp.identity(2),
    "sum axis": lambda xp, a, b, k: xp.sum(a, axis=1, keepdims=True),
    "sum dtype": lambda xp, a, b, k: a.sum(axis=0, dtype=xp.float64),
    "max axes": lambda xp, a, b, k: a.max(axis=(0, 1)),
    "amax": lambda xp, a, b, k: xp.amax(a, axis=-1, keepdims=True),
    "matmul": lambda xp, a, b, k: xp.matmul(a, b.T),
    "operators": lambda xp, a, b, k: (2 - a) / b ** 2 + (-a) * abs(b) - 1 / a,
    "integers": lambda xp, a, b, k: (k // 2 + k % 2) ^ (~k & 7) | (k << 2) >> 1,
    "comparisons": lambda xp, a, b, k: (a < b) | (a >= 0.5) & (b != 3) | (b == 3) | (1 > a) | (a <= b),
    "dot": lambda xp, a, b, k: a[0].dot(b[0]),
    "tensordot axes": lambda xp, a, b, k: xp.tensordot(a, b, axes=([0], [0])),
    "einsum": lambda xp, a, b, k: xp.einsum("ni,nj->ij", a, b),
    "where": lambda xp, a, b, k: xp.where(b > 0, a, 0.0),
    "clip": lambda xp, a, b, k: xp.clip(b, -1, 1.0),
    "concatenate": lambda xp, a, b, k: xp.concatenate([a, b], axis=1),
    "stack": lambda xp, a, b, k: xp.stack((a, b), axis=-1),
    "split": lambda xp, a, b, k: xp.split(a, [1], axis=1)[1],
    "pad": lambda xp, a, b, k: xp.pad(a, ((1, 0), (0, 2)), constant_values=3.0),
    "tile": lambda xp, a, b, k: xp.tile(a, (2, 1)),
    "repeat": lambda xp, a, b, k: xp.repeat(a, 2, axis=0),
    "take": lambda xp, a, b, k: xp.take(a, k[0], axis=1),
    "take_along_axis": lambda xp, a, b, k: xp.take_along_axis(a, k, axis=1),
    "transpose": lambda xp, a, b, k: xp.transpose(a, (1, 0)) + a.transpose(1, 0) + a.transpose() + b.T,
    "moveaxis": lambda xp, a, b, k: xp.moveaxis(a[None], 0, -1),
    "broadcast_to": lambda xp, a, b, k: xp.broadcast_to(a[:1], (4, 3)),
    "reshape": lambda xp, a, b, k: xp.reshape(a, (3, -1)) + a.reshape((3, 2)) + b.reshape(3, 2),
    "arange": lambda xp, a, b, k: xp.arange(2, 9, 3, dtype=xp.int32),
    "linspace": lambda xp, a, b, k: xp.linspace(0.0, 1.0, 5, dtype=xp.float32),
    "eye": lambda xp, a, b, k: xp.eye(3, dtype=xp.float32) + xp.zeros((3, 3)) + xp.full((3, 1), 2),
    "full_like": lambda xp, a, b, k: xp.full_like(a, 2.5),
    "norm": lambda xp, a, b, k: xp.linalg.norm(a, axis=1),
    "svd": lambda xp, a, b, k: xp.linalg.svd(a, compute_uv=False),
    "solve": lambda xp, a, b, k: xp.linalg.solve(a @ a.T, b),
    "inv": lambda xp, a, b, k: xp.linalg.inv(a @ a.T),
    "qr": lambda xp, a, b, k: xp.linalg.qr(a)[1],
    "nonzero": lambda xp, a, b, k: k[xp.nonzero(k)],
    "pi": lambda xp, a, b, k: a * xp.pi + xp.finfo(xp.float32).eps,
}


@pytest.mark.parametrize("name", VALUES)
def test_the_value_is_numpys_bit_for_bit(name):
    expected = np.asarray(VALUES[name](np, A, B, K))
    result = VALUES[name](xp, xp.asarray(A), xp.asarray(B), xp.asarray(K))
    assert type(result) is ndarray and (result.dtype, result.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(result.get(), expected)


def test_the_stand_in_needs_no_minilora():
    code = "import sys; sys.modules['minilora'] = None; import standin; standin.xp.ones(2)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
