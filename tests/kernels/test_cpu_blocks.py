"""The CPU's versions give the numbers of their references however memory is cut up: blocks of a few numbers instead of 2^17."""

import numpy as np
import pytest
from cases import CASES

import minilora
from minilora import Parameter, Tensor, backend, ops, versions

OVERRIDES = versions.load("cpu")
from minilora.kernels.cpu import attention as cpu_attention  # noqa: E402
from minilora.kernels.cpu import blocks as cpu_blocks  # noqa: E402
from minilora.kernels.cpu import cross_entropy as cpu_cross_entropy  # noqa: E402
from minilora.kernels.cpu import low_rank as cpu_low_rank  # noqa: E402
from minilora.kernels.cpu import norm as cpu_norm  # noqa: E402

ROWS = [case for case in CASES if case.op in OVERRIDES]


@pytest.fixture(params=[1, 24, 200])
def small_blocks(request, monkeypatch):
    for module in (cpu_attention, cpu_cross_entropy, cpu_low_rank):
        monkeypatch.setattr(module, "BLOCK", request.param)
    monkeypatch.setattr(cpu_norm.BlockedLayerNorm, "block", request.param)
    monkeypatch.setattr(cpu_cross_entropy, "ROWS", 2)
    monkeypatch.setattr(cpu_cross_entropy, "ROOM", request.param)


def computed(call, arrays, needs, dy):
    parameters = [Parameter(a, trainable=n) for a, n in zip(arrays, needs)]
    y = call(*parameters)
    if dy is None:
        return y.data
    y.backward(np.array(dy))
    return [y.data, *(p.grad for p in parameters if p.grad is not None)]


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_small_blocks_change_nothing(case, small_blocks, monkeypatch):
    rng = np.random.default_rng(7)
    arrays = case.inputs(rng)
    dy = rng.standard_normal(case.call(*map(Tensor, arrays)).shape)
    first_only = [i == 0 for i in range(len(arrays))]
    for needs in ([True] * len(arrays), first_only):
        fast = computed(case.call, arrays, needs, dy)
        with monkeypatch.context() as patch:
            patch.setattr(backend.cpu, "versions", {case.op: case.op})
            slow = computed(case.call, arrays, needs, dy)
        for one, other in zip(fast, slow, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-12)


def against_reference(monkeypatch, op, call, arrays, needs, tol):
    fast = computed(call, arrays, needs, 1.0 if call(*map(Tensor, arrays)).shape == () else np.ones_like(arrays[0]))
    with monkeypatch.context() as patch:
        patch.setattr(backend.cpu, "versions", {op: op})
        slow = computed(call, arrays, needs, 1.0 if fast[0].shape == () else np.ones_like(arrays[0]))
    for one, other in zip(fast, slow, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tol * max(1.0, abs(other).max()))
    return fast


@pytest.mark.parametrize("width", [3, 7, 100])
def test_cross_entropy_over_classes(width, monkeypatch):
    """A row's largest logit may come with the first classes, the last, or between; and be very large."""
    monkeypatch.setattr(cpu_cross_entropy, "ROOM", 6 * width)
    rng = np.random.default_rng(0)
    h, W = rng.standard_normal((6, 4)), rng.standard_normal((50, 4)) * 30.0
    labels = np.array([0, 49, 25, -100, 3, 7])

    def call(h, W):
        return ops.linear_cross_entropy(h, W, labels, chunk_rows=6)

    for needs in ((True, False), (False, True)):
        loss, _ = against_reference(monkeypatch, ops.LinearCrossEntropy, call, [h, W], needs, 1e-13)
        assert loss > 0
    dh = computed(call, [h, W], (True, False), 1.0)[1]
    assert not dh[3].any()


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@pytest.mark.parametrize("settings", [{"label_smoothing": 0.1}, {"ignore_index": 1}, {}], ids=str)
def test_cross_entropy_of_logits_far_below_zero(needs, settings, monkeypatch):
    h, W = np.full((4, 1), 100.0), np.linspace(-12.0, -10.0, 9)[:, None]
    loss, _ = against_reference(monkeypatch, ops.LinearCrossEntropy,
                                lambda h, W: ops.linear_cross_entropy(h, W, [0, 8, 1, 4], **settings), [h, W], needs, 1e-13)
    assert loss > 10


def test_a_certain_prediction_loses_nothing():
    """No rounding makes a loss negative."""
    h = np.full((3, 1), 100.0, "float32")
    W = np.linspace(-1, 1, 9, dtype="float32")[:, None]
    assert ops.linear_cross_entropy(Tensor(h), Tensor(W), [8, 8, 8]).item() == 0.0


@pytest.mark.parametrize(("rows", "chunk_rows"), [(4, 1), (4, 2), (2000, 100)])
def test_logits_in_memory_are_at_most_what_was_asked_for(rows, chunk_rows, monkeypatch):
    asked = []

    def noted(size, x):
        asked.append(size)
        return np.empty(size, x.dtype)

    monkeypatch.setattr(cpu_cross_entropy, "scratch", noted)
    ops.linear_cross_entropy(Tensor(np.ones((rows, 2))), Tensor(np.ones((5000, 2))), [0] * rows, chunk_rows=chunk_rows)
    assert max(asked) <= min(cpu_cross_entropy.ROOM, 5000 * chunk_rows)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gelu_keeps_its_slope(dtype):
    x = np.array([-np.inf, -1e30, -50.0, -3.0, -0.0, 0.0, 1e-30, 0.7, 3.0, 50.0, 1e30, np.inf, np.nan], dtype)[1:]
    p = Parameter(x)
    y = ops.gelu(p)
    assert y.node.saved[0].nbytes == x.nbytes and y.node.saved[0] is not p.data
    y.backward(np.ones_like(x))
    np.testing.assert_array_equal(p.grad[[0, 1]], 0.0)
    np.testing.assert_array_equal(p.grad[[3, 4]], 0.5)
    np.testing.assert_array_equal(p.grad[-4:-1], 1.0)
    np.testing.assert_array_equal(y.data[-4:-1], x[-4:-1])
    assert np.isnan(p.grad[-1]) and np.isnan(y.data[-1])
    with minilora.no_grad():
        np.testing.assert_array_equal(ops.gelu(p).data, y.data)


def test_scratch_starts_at_a_cache_line_and_is_nobody_elses():
    n = cpu_blocks.SMALL
    large, other = cpu_blocks.scratch(n, np.zeros(0, "float32")), cpu_blocks.scratch(n, np.zeros(0, "float32"))
    assert large.shape == (n,) and large.dtype == "float32" and large.ctypes.data % 64 == 0
    assert not np.shares_memory(large, other)
    small = cpu_blocks.scratch(3, np.zeros(0))
    assert small.shape == (3,) and small.dtype == "float64"
