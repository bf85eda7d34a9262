"""What attention promises beyond the table: independence of masked keys, rows that see nothing, extremes, memory, errors."""
import math

import numpy as np
import pytest
import standin
from conftest import fetch, place
from hypothesis import given
from hypothesis import strategies as st

import minilora
from minilora import Parameter, Tensor, backend, engine, ops
from minilora.errors import ConfigError, DeviceError, DTypeError, ShapeError

EPS = float(np.finfo(float).eps)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def heads(T=6, S=6, H=4, KV=2, hd=5, batch=2, seed=0):
    """q, k and v on the host."""
    return draw(batch, H, T, hd, seed=seed), draw(batch, KV, S, hd, seed=seed + 1), draw(batch, KV, S, hd, seed=seed + 2)


def run(call, arrays, dy=None):
    """The output and the gradients of all inputs, on the host; dy may be a function of the output's shape."""
    parameters = [Parameter(place(a)) for a in arrays]
    y = call(*parameters)
    dy = draw(*y.shape, seed=99) if dy is None else dy
    y.backward(place(dy, y.dtype))
    return [fetch(y), *(fetch(p.grad) for p in parameters)]


def assert_all_close(got, expected, tol=1e-13):
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tol * max(1.0, np.abs(other).max(initial=0.0)))


def packed_of(q, k, v):
    """The same heads as a fused projection would give them."""
    return np.concatenate([np.moveaxis(x, -3, -2).reshape(*x.shape[:-3], x.shape[-2], -1) for x in (q, k, v)], axis=-1)


# -- masks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "S"), [(6, 6), (140, 140), (3, 7), (1, 5), (70, 90)])
def test_a_causal_query_knows_nothing_of_later_keys(T, S, device):
    """Not to rounding: to the last bit. And what is not seen gets no gradient."""
    q, k, v = heads(T, S)
    before = fetch(ops.attention(*map(place, (q, k, v)), causal=True))
    for t in sorted({*range(min(T, 6)), *range(T // 2 - 2, T // 2 + 2), T - 1} & set(range(T))):
        seen = S - T + t + 1
        k2, v2 = k.copy(), v.copy()
        k2[..., seen:, :] *= -3.0
        v2[..., seen:, :] += 100.0
        after = fetch(ops.attention(*map(place, (q, k2, v2)), causal=True))
        np.testing.assert_array_equal(after[..., :t + 1, :], before[..., :t + 1, :])
        dy = draw(*q.shape, seed=5)
        dy[..., t + 1:, :] = 0.0
        _, _, dk, dv = run(lambda *x: ops.attention(*x, causal=True), [q, k, v], dy)
        assert not dk[..., seen:, :].any() and not dv[..., seen:, :].any()
        if seen < S:
            assert np.abs(after[..., -1, :] - before[..., -1, :]).max() > 0.1


def test_a_causal_token_knows_nothing_of_later_tokens(device):
    qkv = draw(2, 9, 3 * 8)
    before = fetch(ops.packed_attention(place(qkv), 4, causal=True))
    for t in range(8):
        other = qkv.copy()
        other[:, t + 1:] = draw(2, 8 - t, 24, seed=3)
        after = fetch(ops.packed_attention(place(other), 4, causal=True))
        np.testing.assert_array_equal(after[:, :t + 1], before[:, :t + 1])


def test_padding_hides_keys_to_the_last_bit(device):
    q, k, v = heads()
    keep = np.array([[True] * 4 + [False] * 2, [False, True, True, False, True, True]])
    k2, v2 = k.copy(), v.copy()
    k2[~np.broadcast_to(keep[:, None], k.shape[:3])] = 1e3
    v2[~np.broadcast_to(keep[:, None], k.shape[:3])] = -1e3
    results = [run(lambda *x: ops.attention(*x, key_padding=keep), arrays) for arrays in ([q, k, v], [q, k2, v2])]
    for one, other in zip(*results):
        np.testing.assert_array_equal(one, other)
    hidden = ~np.broadcast_to(keep[:, None], k.shape[:3])
    assert not results[0][2][hidden].any() and not results[0][3][hidden].any()


def test_the_order_of_the_keys_does_not_matter(device):
    q, k, v = heads(5, 7)
    order = np.random.default_rng(3).permutation(7)
    mask, keep = draw(5, 7, seed=8), np.random.default_rng(4).random((2, 7)) < 0.7
    y, dq, dk, dv = run(lambda *x: ops.attention(*x, mask=place(mask), key_padding=keep), [q, k, v])
    y2, dq2, dk2, dv2 = run(lambda *x: ops.attention(*x, mask=place(mask[:, order]), key_padding=keep[:, order]),
                            [q, k[..., order, :], v[..., order, :]])
    assert_all_close([y2, dq2, dk2, dv2], [y, dq, dk[..., order, :], dv[..., order, :]], 1e-14)


def test_probabilities_are_positive_and_sum_to_one(device):
    """With the unit vectors for values, the output is P itself."""
    q, k, _ = heads(6, 5, hd=5)
    v = np.broadcast_to(np.eye(5), k.shape)
    P = fetch(ops.attention(*map(place, (10 * q, k, v))))
    assert P.min() >= 0.0
    np.testing.assert_allclose(P.sum(axis=-1), 1.0, rtol=8 * EPS)
    P = fetch(ops.attention(*map(place, (q, k, v)), causal=True))
    for t in range(6):
        assert (P[..., t, :] > 0).sum() == max(0, t) * 8 and not P[..., t, t:].any()
    np.testing.assert_allclose(P.sum(axis=-1)[..., 1:], 1.0, rtol=8 * EPS)
    assert not P[..., 0, :].any()  # six queries, five keys: the first query comes before every key


def test_a_query_that_sees_nothing_gives_zeros_and_gets_none(device):
    q, k, v = heads()
    blind = np.zeros((2, 1, 6), bool)
    blind[0, 0, [0, 3]] = blind[1, 0, 5] = True
    allowed = np.broadcast_to(~blind[..., None], (2, 1, 6, 6))
    for mask in (allowed, np.where(allowed, 0.0, -np.inf)):
        y, dq, dk, dv = run(lambda *x: ops.attention(*x, mask=place(mask)), [q, k, v])
        hidden = np.broadcast_to(blind, (2, 4, 6))
        assert not y[hidden].any() and not dq[hidden].any()
        dy = draw(*y.shape, seed=99)
        dy[hidden] = 0.0
        full = run(ops.attention, [q, k, v], dy)
        np.testing.assert_array_equal(y[~hidden], full[0][~hidden])
        assert_all_close([dq[~hidden], dk, dv], [full[1][~hidden], *full[2:]])


@pytest.mark.parametrize("call", [
    lambda q, k, v: ops.attention(q, k, v, key_padding=np.zeros((2, 6), bool)),
    lambda q, k, v: ops.attention(q, k, v, mask=np.zeros((6, 6), bool), causal=True),
    lambda q, k, v: ops.attention(q, k, v, mask=np.full((6, 6), -np.inf), key_padding=np.zeros((2, 6), bool)),
])
def test_nothing_to_attend_anywhere(call, device):
    for result in run(call, heads()):
        assert not result.any()


def test_masks_may_lie_on_the_host_or_on_the_device(device):
    q, k, v = heads()
    keep, mask = np.random.default_rng(1).random((2, 6)) < 0.6, draw(4, 6, 6)
    on_host = run(lambda *x: ops.attention(*x, key_padding=keep, mask=mask), [q, k, v])
    on_device = run(lambda *x: ops.attention(*x, key_padding=place(keep), mask=place(mask)), [q, k, v])
    assert [a.tobytes() for a in on_host] == [a.tobytes() for a in on_device]


def test_masks_are_not_changed(device):
    keep, mask = place(np.ones((2, 6), bool)), place(draw(6, 6))
    before = fetch(keep).tobytes(), fetch(mask).tobytes()
    run(lambda *x: ops.attention(*x, key_padding=keep, mask=mask, causal=True), heads())
    assert (fetch(keep).tobytes(), fetch(mask).tobytes()) == before


# -- the same by other means -----------------------------------------------------------------------------------------------


def composed(q, k, v, bias=None):
    """From plain operations; heads of keys and values are repeated by an index."""
    H, KV, hd = q.shape[-3], k.shape[-3], q.shape[-1]
    index = (slice(None), place([h * KV // H for h in range(H)]))
    k, v = k[index], v[index]
    Z = (q @ k.transpose(0, 1, 3, 2)) * (1 / math.sqrt(hd))
    if bias is not None:
        Z = Z + place(bias)
    return ops.softmax(Z) @ v


@given(T=st.integers(1, 5), S=st.integers(1, 5), KV=st.integers(1, 3), g=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_equals_the_composition_of_plain_operations(device, T, S, KV, g, seed):
    rng = np.random.default_rng(seed)
    arrays = heads(T, S, g * KV, KV, int(rng.integers(1, 5)), seed=seed)
    bias = rng.standard_normal((2, 1, T, S))
    bias[rng.random(bias.shape) < 0.3] = -np.inf
    bias[..., rng.integers(S)] = 0.0  # the composition cannot do rows that see nothing
    assert_all_close(run(lambda *x: ops.attention(*x, mask=place(bias)), arrays), run(lambda *x: composed(*x, bias), arrays))


@pytest.mark.parametrize("settings", [{}, {"causal": True}, {"key_padding": np.array([[True] * 5 + [False], [True] * 6])},
                                      {"mask": np.tri(6, dtype=bool)[::-1]}, {"scale": 0.1, "causal": True}], ids=str)
@pytest.mark.parametrize(("H", "KV"), [(2, 2), (4, 2), (3, 1)])
def test_packed_equals_attention_on_slices(H, KV, settings, device):
    q, k, v = heads(H=H, KV=KV)
    qkv = packed_of(q, k, v)

    def sliced(x):
        parts, start = [], 0
        for n in (H, KV, KV):
            part = x[..., start * 5:(start + n) * 5]
            parts.append(ops.transpose(ops.reshape(part, (2, 6, n, 5)), (0, 2, 1, 3)))
            start += n
        y = ops.attention(*parts, **settings)
        return ops.reshape(ops.transpose(y, (0, 2, 1, 3)), (2, 6, H * 5))

    assert_all_close(run(lambda x: ops.packed_attention(x, H, KV, **settings), [qkv]), run(sliced, [qkv]), 1e-14)


def test_grouped_equals_repeated_heads(device):
    q, k, v = heads(H=6, KV=2)
    y, dq, dk, dv = run(ops.attention, [q, k, v])
    y2, dq2, dk2, dv2 = run(ops.attention, [q, np.repeat(k, 3, axis=1), np.repeat(v, 3, axis=1)])
    summed = [a.reshape(2, 2, 3, 6, 5).sum(axis=2) for a in (dk2, dv2)]
    assert_all_close([y, dq, dk, dv], [y2, dq2, *summed])


def test_causal_and_padding_equal_the_same_mask_added(device):
    q, k, v = heads(4, 6)
    keep = np.random.default_rng(1).random((2, 6)) < 0.7
    M = np.where(keep[:, None, None] & (np.arange(6) <= np.arange(4)[:, None] + 2), 0.0, -np.inf)
    assert_all_close(run(lambda *x: ops.attention(*x, causal=True, key_padding=keep), [q, k, v]),
                     run(lambda *x: ops.attention(*x, mask=place(M)), [q, k, v]), 0)


# -- extremes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1e2, 1e8, 1e15])
def test_huge_scores_do_not_overflow(size, dtype, device):
    q, k, v = (a.astype(dtype) for a in heads())
    y, *gradients = run(lambda *x: ops.attention(*x, causal=True), [size * q, size * k, v])
    assert y.dtype == dtype and np.abs(y).max() <= np.abs(v).max() * (1 + 1e-6)
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_large_negative_number_hides_a_key_and_a_row_of_them_hides_none(dtype, device):
    """A finite mask is a number like others: where all scores have it, it cancels."""
    low = -6e4 if dtype == "float16" else float(np.finfo(dtype).min) / 2
    q, k, v = (a.astype(dtype) for a in heads())
    mask = np.zeros((6, 6), dtype)
    mask[2, 3:], mask[4] = low, low
    y, dq, dk, dv = run(lambda *x: ops.attention(*x, mask=mask), [0 * q, k, v], np.ones(q.shape))
    tol = 64 * float(np.finfo(dtype).eps)
    wide = np.repeat(v.astype(float), 2, axis=1)
    np.testing.assert_allclose(y[..., 4, :], wide.mean(axis=-2), atol=tol)
    np.testing.assert_allclose(y[..., 2, :], wide[..., :3, :].mean(axis=-2), atol=tol)
    np.testing.assert_allclose(dv[..., 5, :], 2 * 5 / 6, atol=tol)  # two query heads, five of six queries
    assert np.isfinite(dq).all() and np.isfinite(dk).all()


def test_a_constant_added_to_a_row_cancels(device):
    q, k, v = heads()
    assert_all_close(run(lambda *x: ops.attention(*x, mask=place(draw(6, 1))), [q, k, v]), run(ops.attention, [q, k, v]))


@pytest.mark.parametrize("name", "qkv")
def test_nan_is_not_hidden(name, device):
    q, k, v = heads()
    {"q": q, "k": k, "v": v}[name][0, 0, 1, 2] = np.nan
    y = fetch(ops.attention(place(q), place(k), place(v)))
    assert np.isnan(y[0, 0]).any() and not np.isnan(y[1]).any()


# -- memory and work -------------------------------------------------------------------------------------------------------


def test_nothing_of_size_queries_times_keys_is_kept(device):
    q, k, v = (ops.neg(Parameter(place(a, "float32"))) for a in heads(50, 60, hd=4))
    kept = engine.ledger(ops.attention(q, k, v, causal=True)).nbytes
    y = backend.current_device().name != "gpu"  # whose kernels do without it
    assert kept == 4 * ((1 + y) * 2 * 4 * 50 * 4 + 2 * 2 * 2 * 60 * 4 + 2 * 2 * 4 * 50)  # q and y, k and v, m and n


def test_heads_are_joined_without_a_copy():
    """Output and gradients lie in memory as the inputs do, so that (..., T, heads, hd) is a view of them."""
    parts = [ops.transpose(ops.reshape(Parameter(draw(2, 6, 20)), (2, 6, 4, 5)), (0, 2, 1, 3)) for _ in range(3)]
    y = ops.attention(*parts)
    for array in (y.data, *y.node.backward(draw(*y.shape))):
        assert array.base is None and np.shares_memory(array, array.swapaxes(1, 2).reshape(2, 6, 20))


def products(counts):
    return counts.calls["matmul"] + counts.calls["dot"]


@pytest.mark.parametrize("device", ["standin"], indirect=True)
@pytest.mark.parametrize(("trained", "backward"), [("q", 3), ("k", 3), ("v", 2), ("qk", 4), ("qv", 4), ("qkv", 5)])
def test_products(trained, backward, device):
    inputs = [Parameter(place(a), trainable=name in trained) for name, a in zip("qkv", heads())]
    with standin.counting() as counts:
        y = ops.attention(*inputs, causal=True)
    assert products(counts) == 2
    dy = place(draw(*y.shape))
    with standin.counting() as counts:
        y.backward(dy)
    assert products(counts) == backward


@pytest.mark.parametrize("device", ["standin"], indirect=True)
def test_no_synchronisation_and_no_copy(device):
    keep, mask = place(np.ones((2, 6), bool)), place(draw(6, 6))
    qkv, dy = Parameter(place(packed_of(*heads()))), place(draw(2, 6, 20))
    with standin.counting() as counts:
        ops.packed_attention(qkv, 4, 2, causal=True, key_padding=keep, mask=mask).backward(dy)
    assert (counts.syncs, counts.h2d, counts.d2h) == (0, 0, 0)


# -- mistakes --------------------------------------------------------------------------------------------------------------

Q, K = (2, 4, 6, 5), (2, 2, 7, 5)
MISTAKES = {
    "two axes": (ShapeError, "(6, 5)", ((6, 5), (7, 5), (7, 5)), {}),
    "k and v differ": (ShapeError, "(2, 2, 8, 5)", (Q, K, (2, 2, 8, 5)), {}),
    "an axis too few": (ShapeError, "(2, 7, 5)", (Q, (2, 7, 5), (2, 7, 5)), {}),
    "batches differ": (ShapeError, "(2,) and (3,)", (Q, (3, 2, 7, 5), (3, 2, 7, 5)), {}),
    "head sizes differ": (ShapeError, "5 and 4", (Q, (2, 2, 7, 4), (2, 2, 7, 4)), {}),
    "no key": (ShapeError, "0 keys", (Q, (2, 2, 0, 5), (2, 2, 0, 5)), {}),
    "empty heads": (ShapeError, "0 and 0", ((2, 4, 6, 0), (2, 2, 7, 0), (2, 2, 7, 0)), {}),
    "heads do not divide": (ShapeError, "4 query heads are not a multiple of 3", (Q, (2, 3, 7, 5), (2, 3, 7, 5)), {}),
    "no key heads": (ShapeError, "multiple of 0", (Q, (2, 0, 7, 5), (2, 0, 7, 5)), {}),
    "padding for the queries": (ShapeError, "(2, 7)", (Q, K, K), {"key_padding": np.ones((2, 6), bool)}),
    "padding for one": (ShapeError, "(7,)", (Q, K, K), {"key_padding": np.ones(7, bool)}),
    "padding in numbers": (ShapeError, "float64", (Q, K, K), {"key_padding": np.ones((2, 7))}),
    "padding of token ids": (DTypeError, "key_padding = ids != pad", (Q, K, K), {"key_padding": np.full((2, 7), 5)}),
    "padding in ragged lists": (DTypeError, "list makes no array", (Q, K, K), {"key_padding": [[1, 0], [1]]}),
    "mask transposed": (ShapeError, "(7, 6)", (Q, K, K), {"mask": np.zeros((7, 6))}),
    "mask of too many axes": (ShapeError, "(1, 2, 4, 6, 7)", (Q, K, K), {"mask": np.zeros((1, 2, 4, 6, 7))}),
    "mask of another dtype": (DTypeError, "float32", (Q, K, K), {"mask": np.zeros((6, 7), "float32")}),
    "mask of integers": (DTypeError, "int64", (Q, K, K), {"mask": np.zeros((6, 7), "int64")}),
    "mask of integers in a list": (DTypeError, "int64", (Q, K, K), {"mask": [[0] * 7] * 6}),
    "mask with a gradient": (DTypeError, "mask.data", (Q, K, K), {"mask": Tensor(np.zeros((6, 7)))}),
    "scale a string": (ConfigError, "'1'", (Q, K, K), {"scale": "1"}),
    "scale infinite": (ConfigError, "inf", (Q, K, K), {"scale": math.inf}),
}


@pytest.mark.parametrize(("error", "named", "shapes", "settings"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(error, named, shapes, settings, device):
    with pytest.raises(error) as caught:
        ops.attention(*(place(np.ones(shape)) for shape in shapes), **settings)
    assert named in str(caught.value)


@pytest.mark.parametrize("as_given", [np.ndarray.tolist, lambda a: a.astype("int64"), lambda a: a.astype("uint8").tolist(),
                                      lambda a: place(a.astype("int32"))], ids=["lists", "0/1", "lists of 0/1", "0/1 there"])
def test_key_padding_works_as_it_reads(as_given, device):
    rng = np.random.default_rng(3)
    q, k, v = (place(rng.standard_normal(shape).astype("float32")) for shape in (Q, K, K))
    keep = np.arange(7) < np.array([[4], [7]])
    expected = fetch(ops.attention(q, k, v, key_padding=keep))
    assert fetch(ops.attention(q, k, v, key_padding=as_given(keep))).tobytes() == expected.tobytes()
    assert np.abs(expected - fetch(ops.attention(q, k, v))).max() > 1e-3
    qkv = place(rng.standard_normal((2, 7, 24)).astype("float32"))
    assert fetch(ops.packed_attention(qkv, 4, 2, key_padding=as_given(keep))).tobytes() == \
        fetch(ops.packed_attention(qkv, 4, 2, key_padding=keep)).tobytes()


def test_masks_in_lists_take_the_dtype_they_meet(device):
    rng = np.random.default_rng(3)
    q, k, v = (place(rng.standard_normal(shape).astype("float32")) for shape in (Q, K, K))
    for mask in (rng.standard_normal((6, 7)).astype("float32"), np.tri(6, 7) > 0):
        assert fetch(ops.attention(q, k, v, mask=mask.tolist())).tobytes() == fetch(ops.attention(q, k, v, mask=mask)).tobytes()


PACKED_MISTAKES = {
    "width": (ShapeError, "(2, 6, 25)", (2, 6, 25), (4, 2), {}),
    "one axis": (ShapeError, "(24,)", (24,), (4, 2), {}),
    "no token": (ShapeError, "(2, 0, 24)", (2, 0, 24), (4, 2), {}),
    "no width": (ShapeError, "(2, 6, 0)", (2, 6, 0), (4, 2), {}),
    "heads": (ConfigError, "4 and 3", (2, 6, 24), (4, 3), {}),
    "no heads": (ConfigError, "num_heads must be an int >= 1, got 0", (2, 6, 24), (0,), {}),
    "half a head": (ConfigError, "num_kv_heads must be an int >= 1, got 0.5", (2, 6, 24), (4, 0.5), {}),
    "padding": (ShapeError, "(2, 6)", (2, 6, 24), (4, 2), {"key_padding": np.ones((6, 2), bool)}),
    "mask": (ShapeError, "(2, 4, 6, 6)", (2, 6, 24), (4, 2), {"mask": np.zeros((2, 6, 6))}),
    "scale": (ConfigError, "nan", (2, 6, 24), (4, 2), {"scale": math.nan}),
}


@pytest.mark.parametrize(("error", "named", "shape", "numbers", "settings"), PACKED_MISTAKES.values(), ids=PACKED_MISTAKES)
def test_mistakes_with_packed_heads(error, named, shape, numbers, settings, device):
    with pytest.raises(error) as caught:
        ops.packed_attention(place(np.ones(shape)), *numbers, **settings)
    assert named in str(caught.value)


def test_integers_and_lists_are_refused(device):
    for x in (place(np.ones(Q, "int64")), np.ones(Q).tolist()):
        with pytest.raises(DTypeError):
            ops.attention(x, x, x)
        with pytest.raises(DTypeError):
            ops.packed_attention(x, 1)


@pytest.mark.parametrize("device", ["standin"], indirect=True)
def test_a_mask_of_another_device_is_not_copied_back(device):
    q = np.ones(Q)
    with pytest.raises(DeviceError):
        ops.attention(q, q, q, mask=place(np.zeros((6, 6))))
    with pytest.raises(DeviceError):
        ops.attention(place(q), q, q)


# -- rotary ----------------------------------------------------------------------------------------------------------------


def tables(hd=8, length=64, dtype="float64", theta=10000.0):
    return ops.rotary_tables(ops.rotary_frequencies(hd, theta), length, dtype)


def test_a_turn_keeps_lengths_and_the_first_position(device):
    x = draw(2, 3, 10, 8)
    y = fetch(ops.rotary(place(x), *tables()))
    np.testing.assert_array_equal(y[..., 0, :], x[..., 0, :])
    np.testing.assert_allclose((y ** 2).sum(axis=-1), (x ** 2).sum(axis=-1), rtol=16 * EPS)
    assert np.abs(y - x).max() > 0.5


def test_the_gradient_turns_back(device):
    x = Parameter(place(draw(2, 3, 10, 8)))
    y = ops.rotary(x, *tables(), 4)
    y.backward(y.data)
    np.testing.assert_allclose(fetch(x.grad), fetch(x), rtol=0, atol=8 * EPS)


def test_scores_depend_on_the_distance_only(device):
    q, k = place(draw(1, 8)), place(draw(1, 8, seed=1))
    turned = {m: (fetch(ops.rotary(q, *tables(), m)), fetch(ops.rotary(k, *tables(), m))) for m in range(0, 60, 7)}
    scores = {}
    for m, (qm, _) in turned.items():
        for n, (_, kn) in turned.items():
            scores.setdefault(m - n, []).append(float((qm * kn).sum()))
    assert all(max(s) - min(s) < 1e-13 for s in scores.values())
    assert len({round(s[0], 3) for s in scores.values()}) > 10


def test_an_offset_moves_the_start(device):
    x = draw(2, 9, 8)
    whole = fetch(ops.rotary(place(x), *tables()))
    np.testing.assert_array_equal(fetch(ops.rotary(place(x[:, 4:]), *tables(), 4)), whole[:, 4:])


def test_tables_are_rounded_once(device):
    """float32 tables are the float64 ones, rounded: the angle itself never is."""
    wide, narrow = tables(length=5000), tables(length=5000, dtype="float32")
    for one, other in zip(wide, narrow):
        assert one.shape == (5000, 4) and fetch(one).astype("float32").tobytes() == fetch(other).tobytes()
    assert fetch(wide[0])[4999, 1] == math.cos(4999 * 10000.0 ** -0.25)
    assert fetch(wide[1])[4999, 0] == math.sin(4999.0)


ROTARY_MISTAKES = {
    "too short": (ShapeError, "positions 60 to 65", (2, 6, 8), {"offset": 60}),
    "head size": (ShapeError, "(2, 6, 10)", (2, 6, 10), {}),
    "one axis": (ShapeError, "(8,)", (8,), {}),
    "offset below 0": (ConfigError, "-1", (2, 6, 8), {"offset": -1}),
    "offset a float": (ConfigError, "1.5", (2, 6, 8), {"offset": 1.5}),
}


@pytest.mark.parametrize(("error", "named", "shape", "settings"), ROTARY_MISTAKES.values(), ids=ROTARY_MISTAKES)
def test_rotary_mistakes(error, named, shape, settings, device):
    with pytest.raises(error) as caught:
        ops.rotary(place(np.ones(shape)), *tables(), **settings)
    assert named in str(caught.value)


def test_mistakes_in_tables(device):
    cos, sin = tables()
    x = place(np.ones((2, 6, 8)))
    with pytest.raises(ShapeError, match="one shape"):
        ops.rotary(x, cos, sin[:5])
    with pytest.raises(DTypeError, match="float32"):
        ops.rotary(x, *tables(dtype="float32"))
    with pytest.raises(ConfigError, match="even int >= 2, got 7"):
        ops.rotary_frequencies(7)
    with pytest.raises(ConfigError, match="theta"):
        ops.rotary_frequencies(8, 0.0)
    with pytest.raises(ConfigError, match="length"):
        ops.rotary_tables((1.0,), 0)


@pytest.mark.parametrize("device", ["standin"], indirect=True)
def test_tables_of_another_device_are_refused(device):
    with minilora.use("cpu"):
        on_host = tables()
    with pytest.raises(DeviceError, match="cos on the cpu"):
        ops.rotary(place(np.ones((6, 8))), *on_host)
    assert backend.device_of(ops.rotary_tables((1.0,), 3, device="cpu")[0]).name == "cpu"


# -- a window of keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "S", "window"), [(6, 6, 2), (150, 150, 70), (150, 150, 3), (5, 9, 4), (1, 7, 3), (9, 5, 2)])
def test_a_window_equals_its_mask(T, S, window, device):
    arrays = heads(T, S)
    places = np.arange(T)[:, None] + S - T
    band = (np.arange(S) <= places) & (np.arange(S) > places - window)
    got = run(lambda *x: ops.attention(*x, causal=True, window=window), arrays)
    assert_all_close(got, run(lambda *x: ops.attention(*x, mask=place(band)), arrays))


def test_a_query_knows_nothing_of_what_lies_before_its_window(device):
    """To the last bit, and no gradient: over blocks of 64 queries, too."""
    q, k, v = heads(140, 140)
    before = fetch(ops.attention(*map(place, (q, k, v)), causal=True, window=9))
    k[:, :, :60] *= -3.0
    v[:, :, :60] += 100.0
    after, _, dk, dv = run(lambda *x: ops.attention(*x, causal=True, window=9)[:, :, 68:], [q, k, v])
    np.testing.assert_array_equal(after, before[:, :, 68:])
    assert not dk[:, :, :60].any() and not dv[:, :, :60].any() and dk[:, :, 60:].any()


def test_a_window_costs_no_square(device):
    """Blocks of queries meet the keys that any of them may see, and no others."""
    op = ops.Attention()
    op.causal, op.window = True, 10
    met = sum((rows.stop - rows.start) * (keys.stop - keys.start) for rows, keys in op.blocks(1000, 1000))
    assert met <= 1000 * (10 + 64) and max(keys.stop - keys.start for _, keys in op.blocks(1000, 1000)) <= 73


@pytest.mark.parametrize("settings", [dict(window=2), dict(window=0, causal=True), dict(window=1.5, causal=True),
                                      dict(window=True, causal=True)], ids=str)
def test_mistakes_with_a_window(settings, device):
    with pytest.raises(ConfigError, match="window"):
        ops.attention(*map(place, heads()), **settings)
