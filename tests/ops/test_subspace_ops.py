"""What the table of operations does not say of Fastfood, its transform, and of a network with computed weights."""
import copy
import pickle
import threading

import cases  # noqa: F401  (first: cases_subspaces needs it, and it needs that)
import numpy as np
import pytest
from cases_subspaces import as_matrix, drawn, hadamard_matrix
from hypothesis import given
from hypothesis import strategies as st

from minilora import Parameter, engine, no_grad, ops, optim
from minilora.errors import DTypeError, GraphError, ShapeError
from minilora.ops.hadamard import hadamard
from minilora.ops.weights import COMPUTED, put_weights

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 150), st.integers(0, 2)).map(
    lambda sizes: (sizes[0], sizes[1], max(1, 1 << (sizes[0] - 1).bit_length()) << sizes[2]))


@pytest.mark.parametrize("length", [1, 2, 4, 16, 32, 64, 128, 1024, 2048])
def test_the_transform_is_the_matrix(length):
    x = np.random.default_rng(0).integers(-9, 10, (3, length)).astype("float64")
    y = hadamard(np, x)
    np.testing.assert_array_equal(y, x @ hadamard_matrix(length))  # of whole numbers, exactly
    np.testing.assert_array_equal(hadamard(np, y), length * x)
    assert hadamard(np, np.zeros((0, length))).shape == (0, length)


@given(sizes=SIZES, seed=st.integers(0, 2**32 - 1))
def test_the_adjoint_is_the_true_one(sizes, seed):
    d, size, length = sizes
    draws, rng = drawn(d, size, length, seed), np.random.default_rng(seed)
    v, w, y = Parameter(rng.standard_normal(d)), rng.standard_normal(d), rng.standard_normal(size)
    z = ops.fastfood(v, *draws, size)
    z.backward(y)
    scale = np.linalg.norm(v.data) * np.linalg.norm(y)
    assert abs(z.data @ y - v.data @ v.grad) <= 1e-12 * scale
    np.testing.assert_allclose(v.grad, as_matrix(d, size, *draws).T @ y, rtol=0, atol=1e-12 * scale)
    both = ops.fastfood(2.0 * v.data - 3.0 * w, *draws, size).data
    np.testing.assert_allclose(both, 2.0 * z.data - 3.0 * ops.fastfood(w, *draws, size).data, rtol=0, atol=1e-12 * scale)


def test_the_length_is_kept_in_the_mean():
    v = np.random.default_rng(1).standard_normal(5)
    for size, length in ((37, 64), (37, 8), (5, 8), (3, 8)):
        found = [float((ops.fastfood(v, *drawn(5, size, length, seed), size).data ** 2).sum()) for seed in range(800)]
        expected = float((v ** 2).sum())
        assert abs(np.mean(found) - expected) < 5 * np.std(found) / len(found) ** 0.5, (size, length)


def test_it_is_the_formula_of_the_paper_where_one_block_holds_all():
    d, size, length = 6, 21, 32
    rng = np.random.default_rng(2)
    v, gauss = rng.standard_normal(d), rng.standard_normal(length)
    signs, order = rng.choice([-1, 1], length), rng.permutation(length)
    H = hadamard_matrix(length)
    long = np.concatenate([v, np.zeros(length - d)])
    paper = (H @ (gauss * (H @ (signs * long))[order]))[:size] / np.sqrt(length * (gauss ** 2).sum()) / np.sqrt(size / length)
    ours = ops.fastfood(v, signs[None], order[None], (gauss / np.sqrt((gauss ** 2).sum() * size))[None], size)
    np.testing.assert_allclose(ours.data, paper, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("change", [
    lambda v, signs, order, gauss, size: (v[None], signs, order, gauss, size),
    lambda v, signs, order, gauss, size: (v, signs[:, :2], order[:, :2], gauss[:, :2], size),
    lambda v, signs, order, gauss, size: (v[:2], signs[:, :3], order[:, :3], gauss[:, :3], size),
    lambda v, signs, order, gauss, size: (v, signs, order[:1], gauss, size),
    lambda v, signs, order, gauss, size: (v, signs, order, gauss, 13),
    lambda v, signs, order, gauss, size: (v, signs[0], order[0], gauss[0], size),
])
def test_fastfood_refuses_what_does_not_fit(change):
    with pytest.raises(ShapeError, match="a power of 2"):
        ops.fastfood(*change(np.ones(3), *drawn(3, 12, 4), 12))
    with pytest.raises(DTypeError, match="floating-point"):
        ops.fastfood(np.arange(3), *drawn(3, 12, 4), 12)


def test_displace_refuses_what_does_not_fit():
    z, start = np.ones(5), [np.ones((2, 2)), np.ones(1)]
    for arguments in ((z[:4], None, start), (z, np.ones(3), start), (z, np.ones((2, 1)), start), (np.ones(0), None, [])):
        with pytest.raises(ShapeError, match="displace: expected z"):
            ops.displace(*arguments)


def test_displace_widens_where_it_starts():
    start = [Parameter(np.array([0.1, 0.2], "float16")), Parameter(np.array([[3.0]], "float32"))]
    theta = ops.displace(np.full(3, 1e-6, "float32"), None, start)
    assert theta.dtype == "float32" and (theta.data[:2] > start[0].data.astype("float32")).all()
    theta.backward(np.ones(3, "float32"))
    assert [p.grad.dtype.name for p in start] == ["float16", "float32"]


# -- a network with computed weights -----------------------------------------------------------------------------------


def network(seed=0):
    """theta, a weight and a function of it, where theta is the weight."""
    rng = np.random.default_rng(seed)
    theta = Parameter(rng.standard_normal(6))
    W = Parameter(np.zeros((2, 3)), trainable=COMPUTED)
    put_weights(theta.data, [W], ["float64"])
    return theta, W, rng.standard_normal((4, 3))


def test_weights_are_leaves_inside_and_frozen_outside():
    theta, W, x = network()
    assert not W.trainable and W.node is None
    seen = []
    ops.with_weights(lambda x: (seen.append(bool(W.trainable)), ops.linear(x, W))[1], [W], theta, [], x).sum().backward()
    assert seen == [True] and not W.trainable and W.grad is None and theta.grad.shape == (6,)
    with pytest.raises(Exception, match="no trainable parameter was given"):
        optim.SGD([W], lr=0.1)
    with pytest.raises(ZeroDivisionError):
        ops.with_weights(lambda x: 1 / 0, [W], theta, [], x)
    assert not W.trainable


def test_threads_see_their_own():
    theta, W, x = network()
    inside, outside = threading.Event(), threading.Event()
    seen = []

    def slow(x):
        inside.set()
        assert outside.wait(10)
        return ops.linear(x, W)

    def other():
        assert inside.wait(10)
        seen.append(bool(W.trainable))
        outside.set()
    thread = threading.Thread(target=other)
    thread.start()
    ops.with_weights(slow, [W], theta, [], x).sum().backward()
    thread.join()
    assert seen == [False] and theta.grad is not None


def test_copies_are_computed_too():
    for again in (copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        assert again(COMPUTED) is COMPUTED and again(network()[1]).trainable is COMPUTED
    assert "COMPUTED" in repr(COMPUTED)


def test_what_else_is_trained():
    theta, W, x = network()
    head, given = Parameter(np.ones((1, 2))), Parameter(np.ones((4, 3)))

    def f(a, b=None):
        return ops.linear(ops.linear(a * b["x"], W), head)
    ops.with_weights(f, [W], theta, [head], x, b={"x": given}).sum().backward()
    assert head.grad.shape == (1, 2) and given.grad.shape == (4, 3)
    y = ops.with_weights(f, [W], theta, [], x, b={"x": given}).sum()
    with pytest.raises(GraphError, match=r"parameters of shape \(1, 2\) took part"):
        y.backward()


def test_inputs_and_weights_that_are_not_used():
    theta, W, x = network()
    one, other = Parameter(np.ones(3)), ops.mul(Parameter(np.ones(3)), 2.0)
    ops.with_weights(lambda a, b: a * a, [W], theta, [], ops.mul(one, 1.0), other).sum().backward()
    np.testing.assert_array_equal(one.grad, 2.0)
    np.testing.assert_array_equal(theta.grad, 0.0)


def test_one_output_while_it_trains_and_any_without_a_graph():
    theta, W, x = network()
    with pytest.raises(DTypeError, match="expected one Tensor, got tuple"):
        ops.with_weights(lambda: (W, W), [W], theta, [])
    with no_grad():
        assert ops.with_weights(lambda: (1, 2), [W], theta, []) == (1, 2)
    with pytest.raises(ShapeError, match="have 6 numbers together"):
        ops.with_weights(lambda: W, [W], theta[:5], [])


def test_a_second_backward_is_refused_and_the_graph_is_freed():
    theta, W, x = network()
    y = ops.with_weights(lambda x: ops.linear(x, W), [W], theta, [], x).sum()
    y.backward()
    with pytest.raises(GraphError, match="used by an earlier backward"):
        y.backward()
    assert engine.ledger(ops.with_weights(lambda x: ops.linear(x, W), [W], theta, [], x)).nbytes == 0
