"""What attention to distances promises beyond the table: the composition of plain operations, buckets, memory, errors."""
import math

import numpy as np
import pytest
from conftest import fetch, place
from hypothesis import given
from hypothesis import strategies as st

from minilora import Parameter, engine, ops
from minilora.errors import ConfigError, DTypeError, OutOfRangeError, ShapeError


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def composed(q, k, v, rk, rq, buckets):
    """Plain operations: products with all rows, and the scores of pairs picked out of them."""
    T, hd = q.shape[-2:]
    rows = np.array(buckets)[np.arange(T)[:, None] - np.arange(T) + T - 1]
    t, s = np.arange(T)[:, None] + 0 * rows, np.arange(T)[None] + 0 * rows
    Z = ops.matmul(q, ops.transpose(k, (0, 1, 3, 2)))
    if rk is not None:
        Z = Z + ops.matmul(q, ops.transpose(rk, (0, 2, 1)))[:, :, place(t), place(rows)]
    if rq is not None:
        Z = Z + ops.matmul(k, ops.transpose(rq, (0, 2, 1)))[:, :, place(s), place(rows)]
    terms = 1 + (rk is not None) + (rq is not None)
    return ops.matmul(ops.softmax(Z * (1.0 / math.sqrt(terms * hd))), v)


@given(T=st.integers(1, 9), H=st.integers(1, 3), hd=st.integers(1, 4), n=st.integers(1, 6), by_query=st.booleans(),
       by_key=st.booleans(), seed=st.integers(0, 99))
def test_equals_the_composition_of_plain_operations(device, T, H, hd, n, by_query, by_key, seed):
    buckets = np.random.default_rng(seed).integers(0, n, 2 * T - 1)
    arrays = [draw(2, H, T, hd, seed=seed + i) for i in range(3)]
    arrays += [draw(H, n, hd, seed=seed + 5 + i) for i, there in enumerate((by_query, by_key)) if there]
    results = []
    for call in (ops.disentangled_attention, composed):
        parameters = [Parameter(place(a)) for a in arrays]
        tables = parameters[3:]
        rk, rq = tables.pop(0) if by_query else None, tables.pop(0) if by_key else None
        y = call(*parameters[:3], rk, rq, buckets)
        y.backward(place(draw(*y.shape, seed=99)))
        results.append([fetch(y), *(fetch(p.grad) for p in parameters)])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * max(1.0, np.abs(other).max(initial=0.0)))


def test_without_rows_of_distances_it_is_attention(device):
    q, k, v = (place(draw(2, 3, 5, 4, seed=i)) for i in range(3))
    zeros = place(np.zeros((3, 9, 4)))
    expected = fetch(ops.attention(q, k, v, scale=0.3))
    buckets = list(range(9))
    for rk, rq in ((None, None), (zeros, None), (zeros, zeros)):
        np.testing.assert_allclose(fetch(ops.disentangled_attention(q, k, v, rk, rq, buckets, scale=0.3)), expected, atol=1e-14)


def test_longer_than_a_block_of_queries(device):
    """300 tokens: the last 44 of them in a block of their own."""
    T, buckets = 300, np.clip(np.arange(-299, 300), -3, 3) + 3
    arrays = [draw(1, 1, T, 4, seed=i) for i in range(3)] + [draw(1, 7, 4, seed=4), draw(1, 7, 4, seed=5)]
    results = []
    for call in (ops.disentangled_attention, composed):
        parameters = [Parameter(place(a)) for a in arrays]
        y = call(*parameters, buckets)
        y.backward(place(draw(*y.shape, seed=9)))
        results.append([fetch(y), *(fetch(p.grad) for p in parameters)])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-11 * np.abs(other).max())


def test_nothing_of_size_queries_times_keys_is_kept(device):
    q, k, v, rk, rq = (ops.neg(Parameter(place(draw(*shape)))) for shape in [(1, 1, 200, 2)] * 3 + [(1, 3, 2)] * 2)
    kept = engine.ledger(ops.disentangled_attention(q, k, v, rk, rq, np.zeros(399, int))).nbytes
    assert kept == 8 * (4 * 200 * 2 + 2 * 200 + 2 * 3 * 2)  # q, k, v and y, m and n, rk and rq


def test_the_same_table_for_both_terms_gets_both_gradients(device):
    q, k, v = (place(draw(2, 2, 4, 3, seed=i)) for i in range(3))
    buckets, table = [0, 1, 2, 3, 4, 5, 6], draw(2, 7, 3, seed=5)
    shared, rk, rq = (Parameter(place(table)) for _ in range(3))
    for tables in ((shared, shared), (rk, rq)):
        ops.sum(ops.disentangled_attention(q, k, v, *tables, buckets) * place(draw(2, 2, 4, 3, seed=9))).backward()
    np.testing.assert_allclose(fetch(shared.grad), fetch(rk.grad) + fetch(rq.grad), atol=1e-14)


X, R = (2, 3, 4, 5), (3, 7, 5)
MISTAKES = {
    "other keys": (ShapeError, "one shape", [X, (2, 3, 3, 5), X, R, R], {}),
    "two axes": (ShapeError, "(..., H, T, hd)", [(4, 5)] * 3 + [R, R], {}),
    "no token": (ShapeError, "T and hd >= 1", [(2, 3, 0, 5)] * 3 + [R, R], {}),
    "heads of the table": (ShapeError, "(..., 3, n, 5)", [X, X, X, (2, 7, 5), R], {}),
    "two tables": (ShapeError, "(3, 6, 5)", [X, X, X, R, (3, 6, 5)], {}),
    "texts of the table": (ShapeError, "broadcast to (2,)", [X, X, X, (4, *R), R], {}),
    "axes of the table": (ShapeError, "broadcast to (2,)", [X, X, X, (1, 2, *R), R], {}),
    "a table of two axes": (ShapeError, "got (7, 5)", [X, X, X, (7, 5), R], {}),
    "buckets": (ShapeError, "(7,)", [X, X, X, R, R], dict(buckets=[0, 1, 2])),
    "a bucket": (OutOfRangeError, "bucket 7", [X, X, X, R, R], dict(buckets=[1, 2, 3, 4, 5, 6, 7])),
    "real buckets": (DTypeError, "integers", [X, X, X, R, R], dict(buckets=[0.0] * 7)),
    "padding": (ShapeError, "key_padding", [X, X, X, R, R], dict(key_padding=np.ones((2, 3), bool))),
    "scale": (ConfigError, "scale", [X, X, X, R, R], dict(scale=math.inf)),
}


@pytest.mark.parametrize("error, named, shapes, settings", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(error, named, shapes, settings, device):
    with pytest.raises(error) as caught:
        ops.disentangled_attention(*(place(np.ones(shape)) for shape in shapes), **{"buckets": list(range(7)), **settings})
    assert named in str(caught.value)


# -- buckets -------------------------------------------------------------------------------------------------------------


@given(T=st.integers(1, 400), span=st.integers(2, 64), more=st.integers(2, 600))
def test_buckets_rise_with_the_distance(T, span, more):
    """Never fall, meet the middle at the distance 0, and are a row for each distance near it."""
    for limit in (None, span // 2 + more):
        buckets = ops.distance_buckets(T, span, limit)
        assert buckets.shape == (2 * T - 1,) and buckets.dtype == "int64" and buckets[T - 1] == span
        assert (np.diff(buckets) >= 0).all() and buckets.min() >= 0 and buckets.max() <= 2 * span - 1
        near = span - 1 if limit is None else span // 2
        d = np.arange(-min(near, T - 1), min(near, T - 1) + 1)
        np.testing.assert_array_equal(buckets[d + T - 1], d + span)


@pytest.mark.parametrize("numbers, named", [
    ((0, 4), "T"), ((3, 0), "span"), ((3, 4, 3), "span of 4"), ((3, 1, 9), "span of 1")])
def test_mistakes_in_buckets(numbers, named):
    with pytest.raises(ConfigError, match=named):
        ops.distance_buckets(*numbers)
