"""The gradient of a low-rank update of a table, and of the head tied to it, by independent oracles.

The oracles: sums over letters; the linear layer whose input is one-hot; the gradient of the merged table, projected
(dA = s B^T G^T, dB = s G^T A^T). Finite differences are in ops/test_ops.py. Both A and B are not 0 unless said. Integer-valued
arrays have no rounding: there the tolerance is 0.
"""
import tracemalloc

import numpy as np
import pytest
from conftest import fetch, place
from hypothesis import given
from hypothesis import strategies as st

import minilora
from minilora import Parameter, engine, lora, ops, optim
from minilora.errors import ConfigError, DTypeError, OutOfRangeError, ShapeError
from minilora.lora.gradients.embedding import lora_embedding, lora_head

NAMES = ("W", "A", "B")
V, D, R = 7, 3, 2
IDS = st.lists(st.integers(0, V - 1), max_size=30).map(lambda ids: np.array(ids, "int64"))


def integers(n, seed=0, dtype="float64", r=R):
    """W, A, B and dy, from -8 to 8: with a power of two as scaling, every sum below is exact."""
    rng = np.random.default_rng(seed)
    return [rng.integers(-8, 9, shape).astype(dtype) for shape in [(V, D), (r, V), (D, r), (n, D)]]


def engine_values(f, arrays, dy, trained=NAMES):
    leaves = [Parameter(place(a), name in trained) for name, a in zip(NAMES, arrays)]
    y = f(*leaves)
    y.backward(place(dy.reshape(y.shape)))
    return fetch(y), {name: None if p.grad is None else fetch(p.grad) for name, p in zip(NAMES, leaves)}


def assert_exact(got, expected):
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


# -- oracles -----------------------------------------------------------------------------------------------------------


@given(ids=IDS, s=st.sampled_from([1.0, 0.5, -4.0]), padding=st.sampled_from([None, 0, 3]), r=st.integers(1, 3),
       dtype=st.sampled_from(["float64", "float32"]), seed=st.integers(0, 99))
def test_sums_over_letters(device, ids, s, padding, r, dtype, seed):
    W, A, B, dy = integers(ids.size, seed, dtype, r)
    y, got = engine_values(lambda W, A, B: lora_embedding(ids, W, A, B, s, padding), (W, A, B), dy)
    expected = {"W": np.zeros_like(W), "A": np.zeros_like(A), "B": np.zeros_like(B)}
    for n, v in enumerate(ids):
        np.testing.assert_array_equal(y[n], [W[v, k] + s * sum(A[j, v] * B[k, j] for j in range(r)) for k in range(D)])
        expected["B"] += s * np.outer(dy[n], A[:, v])  # at a padding id, too
        if v != padding:
            expected["W"][v] += dy[n]
            expected["A"][:, v] += s * (dy[n] @ B)
    assert_exact(got, expected)
    assert all(array.dtype == dtype for array in got.values())


@given(ids=IDS, seed=st.integers(0, 99))
def test_projected_gradient_of_the_merged_table(device, ids, seed):
    W, A, B, dy = integers(ids.size, seed)
    s = 0.5
    y, got = engine_values(lambda W, A, B: lora_embedding(ids, W, A, B, s), (W, A, B), dy)
    merged = Parameter(place(W + s * A.T @ B.T))
    y_merged = ops.embedding(ids, merged)
    y_merged.backward(place(dy))
    G = fetch(merged.grad)
    np.testing.assert_array_equal(y, fetch(y_merged))
    assert_exact(got, {"W": G, "A": s * B.T @ G.T, "B": s * G.T @ A.T})


@given(ids=IDS, seed=st.integers(0, 99))
def test_the_linear_layer_whose_input_is_one_hot(device, ids, seed):
    W, A, B, dy = integers(ids.size, seed)
    y, got = engine_values(lambda W, A, B: lora_embedding(ids, W, A, B, 2.0), (W, A, B), dy)
    x = minilora.Tensor(place(np.eye(V)[ids]))
    y_linear, expected = engine_values(lambda W, A, B: lora.lora_linear(x, W, None, A, B, 2.0), (W.T, A, B), dy)
    np.testing.assert_array_equal(y, y_linear)
    assert_exact(got, expected | {"W": expected["W"].T})


def test_the_same_from_plain_operations(device):
    rng = np.random.default_rng(0)
    W, A, B, dy = (rng.standard_normal(shape) for shape in [(V, D), (R, V), (D, R), (2, 5, D)])
    ids = rng.integers(0, V, (2, 5))
    y, got = engine_values(lambda W, A, B: lora_embedding(ids, W, A, B, 0.75, 2), (W, A, B), dy)
    y_plain, expected = engine_values(lambda W, A, B: ops.embedding(ids, W, 2) + 0.75 * ops.linear(
        ops.embedding(ids, ops.transpose(A), 2), B), (W, A, B), dy)
    np.testing.assert_allclose(y, y_plain, rtol=1e-12, atol=1e-13)
    for name in NAMES:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-12, atol=1e-13)


# -- what the derivation implies ------------------------------------------------------------------------------------------


def test_first_step_moves_A_alone_and_unseen_ids_never_move(device):
    W, _, B, dy = integers(4)
    A = Parameter(place(np.zeros((R, V))))
    B = Parameter(place(B))
    optimizer = optim.AdamW([A, B], lr=0.1)
    ids, start = [5, 1, 1, 4], fetch(B)
    for step in range(3):
        optimizer.zero_grad()
        lora_embedding(ids, place(W), A, B, 2.0).backward(place(dy))
        if step == 0:
            assert not fetch(B.grad).any() and fetch(A.grad)[:, ids].any()
        optimizer.step()
        assert not fetch(A)[:, [0, 2, 3, 6]].any() and fetch(A)[:, ids].all()
    assert (fetch(B) != start).all()


def test_padding_keeps_its_column_and_counts_in_B(device):
    W, A, B, dy = integers(3, 1)
    _, got = engine_values(lambda W, A, B: lora_embedding([2, 2, 2], W, A, B, 2.0, padding_idx=2), (W, A, B), dy)
    assert not got["A"].any() and not got["W"].any()
    np.testing.assert_array_equal(got["B"], 2 * np.outer(dy.sum(axis=0), A[:, 2]))
    A[:, 2] = 0
    _, got = engine_values(lambda W, A, B: lora_embedding([2, 2, 2], W, A, B, 2.0, padding_idx=2), (W, A, B), dy)
    assert not got["B"].any()


def test_the_same_bits_every_time_and_on_every_device(device):
    """In A and W: the sums over ids. dB is a product, whose order of sums is BLAS's; one number a column leaves none in u."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, V, 2000)
    arrays = [rng.standard_normal(shape).astype("float32") for shape in [(V, 1), (1, V), (1, 1)]]
    dy = rng.standard_normal((2000, 1)).astype("float32")

    def run():
        return engine_values(lambda W, A, B: lora_embedding(ids, W, A, B, 0.3), arrays, dy)[1]
    once, again = run(), run()
    with minilora.use("cpu"):
        on_cpu = run()
    for name in ("W", "A"):
        assert once[name].tobytes() == again[name].tobytes() == on_cpu[name].tobytes()


# -- which gradients are wanted, and what is made and kept for them ---------------------------------------------------------


@pytest.mark.parametrize("trained", ["W", "A", "B", "WA", "WB", "AB", "WAB"])
def test_kept(device, trained):
    """a for B, n r numbers; the plan, 2 n + u integers, for A and W; parameters' own arrays are free."""
    W, A, B, _ = integers(0)
    leaves = [Parameter(place(a), name in trained) for name, a in zip(NAMES, (W, A, B))]
    (row,) = engine.ledger(lora_embedding([[4, 1], [4, 0]], *leaves, 2.0)).rows
    assert row.nbytes == 8 * (4 * R * ("B" in trained) + (2 * 4 + 3) * (trained != "B"))


def test_frozen_makes_no_plan_and_no_node(device):
    W, A, B, _ = integers(0)
    assert lora_embedding([0, 1], place(W), Parameter(place(A), trainable=False), place(B), 2.0).node is None


def test_nothing_of_the_size_of_the_table_but_dA():
    W, B = np.zeros((40_000, 16)), np.zeros((16, 2))  # W 5 MB, A 0.6 MB
    A = Parameter(np.zeros((2, 40_000)))
    ids, dy = np.arange(50) % 7, np.ones((50, 16))
    tracemalloc.start()
    try:
        y = lora_embedding(ids, W, A, Parameter(B), 2.0)
        assert tracemalloc.get_traced_memory()[1] < 50_000
        y.backward(dy)
        assert A.data.nbytes < tracemalloc.get_traced_memory()[1] < A.data.nbytes + 100_000
    finally:
        tracemalloc.stop()


def test_gradients_go_into_the_optimizers_array(device):
    W, A, B, dy = integers(3)
    _, expected = engine_values(lambda W, A, B: lora_embedding([6, 0, 6], W, A, B, 2.0), (W, A, B), dy)
    leaves = [Parameter(place(a)) for a in (W, A, B)]
    for p in leaves:
        p.room = place(np.full(p.shape, 9.0))
    y = lora_embedding([6, 0, 6], *leaves, 2.0)
    y.node.gathered = {}  # as in a walk
    assert all(dx is p.room for dx, p in zip(y.node.backward(place(dy)), leaves))  # written there, not copied afterwards
    y.backward(place(dy))
    for name, p in zip(NAMES, leaves):
        assert p.gathered is p.room
        np.testing.assert_array_equal(fetch(p.grad), expected[name])


@pytest.mark.parametrize("device", ["standin"], indirect=True)
def test_copies_to_the_device(device):
    import standin
    W, A, B, _ = integers(0)
    leaves = [Parameter(place(a)) for a in (W, A, B)]
    ids = np.random.default_rng(0).integers(0, V, 400)
    with standin.counting() as counts:
        y = lora_embedding(ids, *leaves, 2.0)
    assert (counts.h2d, counts.d2h, counts.syncs) == (2, 0, 0)  # the ids, and the plan
    dy = place(np.ones(y.shape))
    with standin.counting() as counts:
        y.backward(dy)
    assert (counts.h2d, counts.d2h, counts.syncs) == (0, 0, 0)
    leaves[0].trainable = leaves[1].trainable = False
    with standin.counting() as counts:
        lora_embedding(ids, *leaves, 2.0)
    assert (counts.h2d, counts.syncs) == (1, 0)  # B alone needs no plan


def test_ids_in_every_form(device):
    W, A, B, _ = integers(0)
    table = W + 2 * A.T @ B.T
    for ids in (3, [3, 0], np.array([[3], [0]], "uint16"), place([3, 0]), minilora.tensor([3, 0]), np.zeros((2, 0), "int64")):
        host = fetch(ids) if hasattr(ids, "dtype") else np.array(ids)
        leaf = Parameter(place(A))
        y = lora_embedding(ids, place(W), leaf, place(B), 2.0)
        np.testing.assert_array_equal(fetch(y), table[host])
        y.sum().backward()
        np.testing.assert_array_equal(fetch(leaf.grad), 2 * np.outer(B.sum(axis=0), np.bincount(host.ravel(), minlength=V)))


# -- the tied head ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [(4,), (2, 3), (), (0,)], ids=str)
def test_head_is_the_merged_table_as_a_weight(device, axes):
    W, A, B, _ = integers(0, 2)
    rng = np.random.default_rng(3)
    h, dy = rng.integers(-8, 9, (*axes, D)).astype(float), rng.integers(-8, 9, (*axes, V)).astype(float)
    leaf, merged = Parameter(place(h)), Parameter(place(W + 0.5 * A.T @ B.T))
    y, got = engine_values(lambda W, A, B: lora_head(leaf, W, A, B, 0.5), (W, A, B), dy)
    dh, leaf.grad = fetch(leaf.grad), None
    expected = ops.linear(leaf, merged)
    expected.backward(place(dy))
    np.testing.assert_array_equal(y, fetch(expected))
    np.testing.assert_array_equal(dh, fetch(leaf.grad))
    G = fetch(merged.grad)
    assert_exact(got, {"W": G, "A": 0.5 * B.T @ G.T, "B": 0.5 * G.T @ A.T})


def test_table_and_head_together_add_up(device):
    W, A, B, _ = integers(0, 4)
    dy = np.random.default_rng(5).integers(-8, 9, (3, V)).astype(float)
    ids, s = [6, 2, 6], 0.5
    y, got = engine_values(lambda W, A, B: lora_head(lora_embedding(ids, W, A, B, s), W, A, B, s), (W, A, B), dy)
    merged = Parameter(place(W + s * A.T @ B.T))
    ops.linear(ops.embedding(ids, merged), merged).backward(place(dy))
    G = fetch(merged.grad)
    assert_exact(got, {"W": G, "A": s * B.T @ G.T, "B": s * G.T @ A.T})


# -- what is refused ----------------------------------------------------------------------------------------------------------


def test_what_is_refused(device):
    W, A, B = (Parameter(place(a)) for a in integers(0)[:3])
    with pytest.raises(OutOfRangeError, match="lora_embedding: token id 7 at position 1 .*0 to 6"):
        lora_embedding([0, 7], W, A, B, 1.0)
    with pytest.raises(OutOfRangeError, match="-1"):
        lora_embedding([-1], W, A, B, 1.0)
    with pytest.raises(DTypeError, match="token ids must be integers"):
        lora_embedding([0.5], W, A, B, 1.0)
    with pytest.raises(DTypeError, match="floating-point"):
        lora_embedding([0], place(np.ones((V, D), int)), place(np.ones((R, V), int)), place(np.ones((D, R), int)), 1.0)
    for padding_idx in (-1, V, True):
        with pytest.raises(ConfigError, match="padding_idx"):
            lora_embedding([0], W, A, B, 1.0, padding_idx)


@pytest.mark.parametrize("wrong, match", [
    ({"W": (V,)}, r"table \(V, d\), got shape \(7,\)"),
    ({"A": (V, R)}, r"for a table \(7, 3\) expected A \(r, 7\) and B \(3, r\), got A \(7, 2\)"),
    ({"B": (R, D)}, r"got A \(2, 7\) and B \(2, 3\).*transpose both"), ({"A": (R, 6)}, r"A \(2, 6\)"),
    ({"A": (V,)}, r"A \(7,\)"), ({"B": (D, 1)}, r"B \(3, 1\)"), ({"A": (3, V)}, r"A \(3, 7\)"),
], ids=str)
def test_shapes_that_do_not_fit(device, wrong, match):
    shapes = {"W": (V, D), "A": (R, V), "B": (D, R)} | wrong
    arrays = [place(np.zeros(shape)) for shape in shapes.values()]
    for name, call in [("lora_embedding", lambda: lora_embedding([0], *arrays, 1.0)),
                       ("lora_head", lambda: lora_head(place(np.zeros((2, D))), *arrays, 1.0))]:
        with pytest.raises(ShapeError, match=f"{name}: .*{match}"):
            call()


def test_a_hidden_state_that_does_not_fit_the_head(device):
    with pytest.raises(ShapeError, match=r"last axis 3 .*got \(2, 4\)"):
        lora_head(place(np.zeros((2, 4))), *map(place, integers(0)[:3]), 1.0)
