"""The gradient of low-rank updates of a fused projection, by independent oracles.

The oracles: a separate `lora_linear` for each slot; `lora_linear` with the block-diagonal B'; the gradient of the merged
weight, projected slot by slot (dA_e = s B_e^T G_l, dB_e = s G_l A_e^T). Finite differences are in ops/test_ops.py. B is not 0
unless said. Integer-valued arrays have no rounding: there the tolerance is 0.
"""
import tracemalloc

import numpy as np
import pytest
import standin
from conftest import fetch, place

import minilora
from minilora import Parameter, backend, engine, lora, ops
from minilora.errors import ConfigError, ShapeError
from minilora.lora.gradients.fused import block_diagonal, lora_merged_linear

NAMES = ("x", "W", "b", "A", "B")
SLOTS = [(True, False, True), (True, True, True), (False, True, False), (False, False, True, True), (True,), (True, False)]
slots = pytest.mark.parametrize("enable", SLOTS, ids=lambda e: "".join("-+"[on] for on in e))
QV = SLOTS[0]


def integers(enable, n=5, n_in=4, o=3, r=2, seed=0, dtype="float64"):
    """x, W, b, A, B and dy, from -8 to 8: with a power of two as scaling, every sum below is exact."""
    L, m = len(enable), sum(enable)
    rng = np.random.default_rng(seed)
    shapes = [(n, n_in), (L * o, n_in), (L * o,), (m * r, n_in), (m * o, r), (n, L * o)]
    return [rng.integers(-8, 9, shape).astype(dtype) for shape in shapes]


def engine_values(f, arrays, dy, trained=NAMES):
    leaves = [Parameter(place(a), name in trained) for name, a in zip(NAMES, arrays)]
    y = f(*leaves)
    y.backward(place(dy))
    return fetch(y), {name: None if p.grad is None else fetch(p.grad) for name, p in zip(NAMES, leaves)}


def fused(s, enable):
    return lambda *arrays: lora_merged_linear(*arrays, s, enable)


def by_slots(s, enable):
    """Slices of the parameters, a layer for each slot, and the outputs joined."""
    def f(x, W, b, A, B):
        o, r, e, parts = len(W.data) // len(enable), B.shape[1], 0, []
        for i, on in enumerate(enable):
            W_i, b_i = W[i * o:(i + 1) * o], b[i * o:(i + 1) * o]
            if on:
                parts.append(lora.lora_linear(x, W_i, b_i, A[e * r:(e + 1) * r], B[e * o:(e + 1) * o], s))
                e += 1
            else:
                parts.append(ops.linear(x, W_i, b_i))
        return ops.concatenate(parts, axis=-1)
    return f


def assert_exact(got, expected):
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


# -- oracles -----------------------------------------------------------------------------------------------------------


@slots
@pytest.mark.parametrize("n, o, r", [(5, 3, 2), (1, 2, 1), (4, 1, 3), (0, 2, 2)])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_layer_for_each_slot(device, enable, n, o, r, dtype):
    *arrays, dy = integers(enable, n, o=o, r=r, seed=1, dtype=dtype)
    y, got = engine_values(fused(0.5, enable), arrays, dy)
    y_slots, expected = engine_values(by_slots(0.5, enable), arrays, dy)
    np.testing.assert_array_equal(y, y_slots)
    assert_exact(got, expected)
    assert all(array.dtype == dtype for array in got.values())


@slots
def test_block_diagonal_factors_are_the_same_update(device, enable):
    """As an ordinary layer: the same output, dA and dx; dB is the blocks of its dB."""
    x, W, b, A, B, dy = integers(enable, seed=2)
    y, got = engine_values(fused(2.0, enable), (x, W, b, A, B), dy)
    A_whole, B_whole, s = block_diagonal(Parameter(place(A)), place(B), 2.0, enable, out=len(W))
    assert s == 2.0
    assert (backend.device_of(A_whole).name, backend.device_of(B_whole).name) == (device, device)
    y_whole, expected = engine_values(lambda *a: lora.lora_linear(*a, s), (x, W, b, fetch(A_whole), fetch(B_whole)), dy)
    np.testing.assert_array_equal(y, y_whole)
    blocks = [expected["B"][3 * i:3 * i + 3, 2 * e:2 * e + 2] for e, i in enumerate(np.flatnonzero(enable))]
    assert_exact(got, expected | {"B": np.concatenate(blocks)})


@slots
def test_projected_gradient_of_the_merged_weight(device, enable):
    x, W, b, A, B, dy = integers(enable, seed=3)
    s = 0.25
    y, got = engine_values(fused(s, enable), (x, W, b, A, B), dy)
    merged, dA, dB = W.copy(), np.zeros_like(A), np.zeros_like(B)
    places = [(slice(3 * i, 3 * i + 3), slice(3 * e, 3 * e + 3), slice(2 * e, 2 * e + 2))
              for e, i in enumerate(np.flatnonzero(enable))]
    for out, rows, ranks in places:
        merged[out] += s * B[rows] @ A[ranks]
    leaf = Parameter(place(merged))
    expected = ops.linear(place(x), leaf, place(b))
    expected.backward(place(dy))
    G = fetch(leaf.grad)
    for out, rows, ranks in places:
        dA[ranks], dB[rows] = s * B[rows].T @ G[out], s * G[out] @ A[ranks].T
    np.testing.assert_array_equal(y, fetch(expected))
    assert_exact(got, {"W": G, "b": dy.sum(axis=0), "A": dA, "B": dB, "x": dy @ merged})


def test_at_the_start_and_where_there_is_no_update(device):
    """With B = 0 the base's output bit for bit, dA = 0 and dB not; a slot without an update always gives the base's output."""
    x, W, b, A, B, dy = (0.1 * a for a in integers(QV, seed=5))
    base = fetch(ops.linear(place(x), place(W), place(b)))
    y, got = engine_values(fused(1.5, QV), (x, W, b, A, 0 * B), dy)
    assert y.tobytes() == base.tobytes()
    assert not got["A"].any() and got["B"].all()
    y, _ = engine_values(fused(1.5, QV), (x, W, b, A, B), dy)
    changed = (y != base).all(axis=0)
    assert changed.tolist() == [True] * 3 + [False] * 3 + [True] * 3 and y[:, 3:6].tobytes() == base[:, 3:6].tobytes()


# -- which gradients are wanted, and what is made and kept for them ---------------------------------------------------------


@pytest.mark.parametrize("trained", ["x", "W", "b", "A", "B", "AB", "xAB", "WB"])
def test_kept(device, trained):
    """x once for W and A, z for B; parameters' own arrays are free."""
    *arrays, _ = integers(QV)
    tensors = [Parameter(place(a), name in trained) for name, a in zip(NAMES, arrays)]
    if "x" not in trained:
        tensors[0] = minilora.Tensor(place(arrays[0]))
    (row,) = engine.ledger(lora_merged_linear(*tensors, 2.0, QV)).rows
    x_kept = bool(set(trained) & set("WA")) and "x" not in trained
    assert row.nbytes == 8 * 5 * (4 * x_kept + 4 * ("B" in trained))


@pytest.mark.parametrize("device", ["standin"], indirect=True)
@pytest.mark.parametrize(("trained", "backward"), [
    ("A", 3), ("B", 2), ("AB", 5), ("xAB", 7), ("x", 4), ("W", 1), ("b", 0), ("xWbAB", 8),
])
def test_products(trained, backward, device):
    """With two slots: dB two; u two, and dA; dx two more, with u shared; dW only if somebody trains W."""
    *arrays, dy = integers(QV)
    leaves = [Parameter(place(a), name in trained) for name, a in zip(NAMES, arrays)]
    with standin.counting() as counts:
        y = lora_merged_linear(*leaves, 2.0, QV)
    assert counts.calls["dot"] + counts.calls["matmul"] == 4
    dy = place(dy)
    with standin.counting() as counts:
        y.backward(dy)
    assert (counts.calls["dot"] + counts.calls["matmul"], counts.syncs) == (backward, 0)


def test_nothing_of_the_size_of_the_weight():
    """A step through a frozen weight makes a few arrays of the size of y, and none of that of W."""
    rng = np.random.default_rng(0)
    n, n_in, out = 8, 400, 600
    W, x = rng.standard_normal((out, n_in)), Parameter(rng.standard_normal((n, n_in)))
    A, B = Parameter(rng.standard_normal((4, n_in))), Parameter(rng.standard_normal((400, 2)))
    dy = rng.standard_normal((n, out))
    tracemalloc.start()
    try:
        lora_merged_linear(x, W, None, A, B, 0.5, QV).backward(dy)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < W.nbytes / 8


def test_gradients_go_into_the_optimizers_array(device):
    *arrays, dy = integers(QV, seed=6)
    _, expected = engine_values(fused(2.0, QV), arrays, dy)
    leaves = [Parameter(place(a)) for a in arrays]
    for p in leaves[1], leaves[3], leaves[4]:
        p.room = place(np.full(p.shape, np.nan))
    y = lora_merged_linear(*leaves, 2.0, QV)
    y.node.gathered = {}  # as in a walk
    returned = y.node.backward(place(dy))
    assert all(p.room is None or dx is p.room for dx, p in zip(returned, leaves))  # written there, not copied afterwards
    y.backward(place(dy))
    for name, p in zip(NAMES, leaves):
        assert p.room is None or p.gathered is p.room
        np.testing.assert_array_equal(fetch(p.grad), expected[name])


def test_product_added_into_columns(device):
    """`add_matmul` on a view that is not contiguous, and on one that is because it has one row."""
    for n in (4, 1):
        y, a, b = np.ones((n, 6)), np.arange(2.0 * n).reshape(n, 2), np.arange(4.0).reshape(2, 2)
        out = place(y)
        backend.add_matmul(out[:, 2:4], place(a), place(b), -2.0)
        y[:, 2:4] -= 2 * a @ b
        np.testing.assert_array_equal(fetch(out), y)


# -- what is refused ----------------------------------------------------------------------------------------------------------


def test_block_diagonal_shares_A():
    A, B = np.ones((4, 5)), np.arange(12.0).reshape(6, 2)
    whole = block_diagonal(A, B, 0.5, [True, False, True], out=9)
    assert whole[0] is A
    expected = np.zeros((9, 4))
    expected[:3, :2], expected[6:, 2:] = B[:3], B[3:]
    np.testing.assert_array_equal(whole[1], expected)
    half = block_diagonal(A.astype("float32"), B.astype("float32"), 0.5, (True, False, True), out=9)
    assert half[1].dtype == "float32"


@pytest.mark.parametrize("enable, match", [
    ((False, False, False), "enables none of its 3 slots"), ((), "enables none of its 0 slots"),
    ((True, True), "2 slots, which do not divide the 9 outputs evenly"), (True, "got True"), ("qkv", "got 'qkv'"),
    ((1, 0, 1), r"got \(1, 0, 1\)"), (None, "got None"),
], ids=str)
def test_slots_that_do_not_fit(enable, match):
    x, W, b, A, B, _ = integers(QV)
    for name, call in [("lora_merged_linear", lambda: lora_merged_linear(x, W, b, A, B, 1.0, enable)),
                       ("block_diagonal", lambda: block_diagonal(A, B, 1.0, enable, 9))]:
        with pytest.raises(ConfigError, match=f"{name}: .*{match}"):
            call()


@pytest.mark.parametrize("wrong, match", [
    ({"A": (2, 4)},
     r"9, 4\) in 3 slots of 3, 2 of them enabled, expected A \(2 r, 4\) and B \(6, r\), got A \(2, 4\) and B \(6, 2\)"),
    ({"B": (9, 2)}, r"B \(9, 2\). .*lora_linear"), ({"B": (2, 6)}, r"B \(2, 6\)"), ({"B": (6,)}, r"B \(6,\)"),
    ({"A": (4,)}, r"A \(4,\)"), ({"A": (4, 9)}, r"A \(4, 9\)"), ({"B": (6, 4)}, r"B \(6, 4\)"), ({"x": (5, 3)}, r"last axis 4"),
    ({"b": (3,)}, r"bias of shape \(9,\)"), ({"W": (9,)}, r"got shape \(9,\)"),
], ids=str)
def test_shapes_that_do_not_fit(wrong, match):
    right = dict(zip(NAMES, (a.shape for a in integers(QV))))
    arrays = [np.zeros(shape) for shape in (right | wrong).values()]
    with pytest.raises(ShapeError, match=match):
        lora_merged_linear(*arrays, 1.0, QV)


@pytest.mark.parametrize("A, B", [((3, 5), (6, 2)), ((4, 5), (5, 2)), ((4, 5), (6,)), ((4,), (6, 2)), ((2, 5), (9, 2))])
def test_factors_that_do_not_fit_block_diagonal(A, B):
    with pytest.raises(ShapeError, match=r"block_diagonal: for 9 outputs in 3 slots of 3, .*A \(2 r, in\) and B \(6, r\)"):
        block_diagonal(np.zeros(A), np.zeros(B), 1.0, QV, 9)
