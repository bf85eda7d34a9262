"""Cross-entropy, and its fusion with a linear layer: properties, extremes, memory, and what is refused."""
import math
import tracemalloc

import numpy as np
import pytest
from conftest import fetch, place
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import minilora
from minilora import Parameter, backend, ops
from minilora.errors import ConfigError, DTypeError, OutOfRangeError, ShapeError

EPS = np.finfo(float).eps
LOGITS = hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 6)),
                    elements=st.floats(-1e4, 1e4, allow_subnormal=False))
SMOOTHING = st.sampled_from([0.0, 0.1, 1.0])


def labels_of(x):
    return np.arange(len(x)) * 7 % x.shape[1]


@given(x=LOGITS, e=SMOOTHING)
def test_loss_is_never_negative_and_gradient_rows_sum_to_zero(device, x, e):
    p = Parameter(place(x))
    loss = ops.cross_entropy(p, labels_of(x), label_smoothing=e)
    assert 0.0 <= loss.item() < math.inf
    loss.backward()
    grad = fetch(p.grad)
    np.testing.assert_allclose(grad.sum(axis=1), 0.0, atol=4 * x.shape[1] * EPS)
    assert abs(grad).max() <= 1.0


@given(x=LOGITS, c=st.floats(-1e4, 1e4), e=SMOOTHING)
def test_a_shift_changes_nothing_but_rounding(device, x, c, e):
    here, there = (ops.cross_entropy(Parameter(place(a)), labels_of(x), label_smoothing=e).item() for a in (x, x + c))
    assert abs(here - there) <= 16 * EPS * (1 + abs(x).max() + abs(c))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_huge_logits(dtype, device):
    p = Parameter(place([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0]], dtype))
    loss = ops.cross_entropy(p, [0, 1])
    loss.backward()
    assert loss.item() == 1e4
    np.testing.assert_array_equal(fetch(p.grad), [[0.0, 0.0, 0.0], [0.5, -0.5, 0.0]])


def test_large_float32_logits_keep_the_precision_of_their_differences(device):
    """log-sum-exp as one number, 10000.69, would round at 1e-3."""
    x = np.array([[10000.0, 10000.0, 9999.0]], "float32")
    p = Parameter(place(x))
    loss = ops.cross_entropy(p, [2])
    loss.backward()
    q = math.e / (2 * math.e + 1)
    assert abs(loss.item() - math.log(2 * math.e + 1)) < 1e-6
    np.testing.assert_allclose(fetch(p.grad), [[q, q, -2 * q]], rtol=1e-6)


def test_forbidden_classes_have_a_logit_of_minus_infinity(device):
    p = Parameter(place([[0.0, -np.inf, 0.0], [-np.inf, -np.inf, 3.0]]))
    loss = ops.cross_entropy(p, [0, 2])
    loss.backward()
    assert abs(loss.item() - math.log(2) / 2) < 1e-15
    np.testing.assert_allclose(fetch(p.grad), [[-0.25, 0.0, 0.25], [0.0, 0.0, 0.0]], atol=1e-16)


@pytest.mark.parametrize("e", [0.0, 0.2])
def test_ignored_rows_count_nothing_and_get_zeros(device, e):
    x = np.random.default_rng(0).standard_normal((6, 5))
    labels = np.array([1, -100, 4, -100, 0, -100])
    p, kept = Parameter(place(x)), Parameter(place(x[::2]))
    loss = ops.cross_entropy(p, labels, label_smoothing=e)
    expected = ops.cross_entropy(kept, labels[::2], label_smoothing=e)
    assert abs(loss.item() - expected.item()) < 1e-15
    loss.backward()
    expected.backward()
    np.testing.assert_allclose(fetch(p.grad)[::2], fetch(kept.grad), rtol=1e-14, atol=1e-16)
    assert not fetch(p.grad)[1::2].any()


def test_labels_in_every_form(device):
    x = np.random.default_rng(0).standard_normal((3, 4))
    losses = {ops.cross_entropy(place(x), labels).item()
              for labels in ([1, 3, -100], (1, 3, -100), np.array([1, 3, -100], "int8"), place([1, 3, -100]),
                             minilora.tensor([1, 3, -100]))}
    assert len(losses) == 1
    assert ops.cross_entropy(place(x), np.array([1, 3, 0], "uint8")).item() > 0


@pytest.mark.parametrize("device", ["standin"], indirect=True)
def test_labels_on_the_device_are_not_looked_at(device):
    import standin
    p, labels = Parameter(place(np.zeros((3, 4)))), place([-100, -100, -100])
    with standin.counting() as counts:
        loss = ops.cross_entropy(p, labels)
        loss.backward()
    assert (counts.h2d, counts.d2h, counts.syncs) == (0, 0, 0)
    assert math.isnan(loss.item())  # of nothing: on the host it would be refused
    labels = np.array([0, 1, -100])
    h, W = Parameter(place(np.zeros((3, 2)))), Parameter(place(np.zeros((4, 2))))
    with standin.counting() as counts:
        ops.linear_cross_entropy(h, W, labels, chunk_rows=2).backward()
    assert (counts.h2d, counts.d2h, counts.syncs) == (1, 0, 0)


# -- fused with a linear layer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_rows", [1, 3, 4, 11, 100, None])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_equals_unfused(device, chunk_rows, bias):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s) for s in [(11, 5), (9, 5), (9,)][:2 + bias]]
    labels = rng.integers(0, 9, 11)
    labels[[0, 7]] = -100
    results = []
    for fused in (True, False):
        h, W, *b = [Parameter(place(a)) for a in arrays]
        if fused:
            loss = ops.linear_cross_entropy(h, W, labels, *b, label_smoothing=0.1, chunk_rows=chunk_rows)
        else:
            loss = ops.cross_entropy(ops.linear(h, W, *b), labels, label_smoothing=0.1)
        (loss * 3.0).backward()
        results.append([fetch(loss), *(fetch(p.grad) for p in (h, W, *b))])
    for one, other in zip(*results):
        np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_fused_with_huge_logits(dtype, device):
    h, W = Parameter(place([[100.0], [100.0]], dtype)), Parameter(place([[100.0], [-100.0], [0.0]], dtype))
    loss = ops.linear_cross_entropy(h, W, [0, 1], chunk_rows=1)
    loss.backward()
    assert loss.item() == 1e4
    np.testing.assert_array_equal(fetch(h.grad), [[0.0], [100.0]])
    np.testing.assert_array_equal(fetch(W.grad), [[50.0], [-50.0], [0.0]])


def peak(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_logits_are_never_held():
    n, width, classes, chunk_rows = 640, 8, 2000, 16
    rng = np.random.default_rng(0)
    h, W = (rng.standard_normal(s).astype("float32") for s in ((n, width), (classes, width)))
    labels = rng.integers(0, classes, n)
    chunk, logits = 4 * chunk_rows * classes, 4 * n * classes
    trained, frozen = Parameter(h), Parameter(W, trainable=False)

    def fused():
        ops.linear_cross_entropy(trained, frozen, labels, chunk_rows=chunk_rows).backward()
    fused()
    assert peak(fused) < 1.5 * chunk + 4 * h.nbytes + 64 * n  # logits, then G in their place; dh; labels and weights
    assert peak(fused) < logits / 10
    assert peak(lambda: ops.cross_entropy(ops.linear(trained, frozen), labels).backward()) > 2 * logits
    frozen.trainable = True
    assert peak(fused) < 1.5 * chunk + 4 * h.nbytes + 64 * n + 4 * W.nbytes


def test_default_chunk_holds_the_logits_to_64_megabytes():
    loss = ops.linear_cross_entropy(Parameter(np.ones((2, 1), "float32")), np.ones((50257, 1), "float32"), [0, 1])
    assert loss.node.chunk_rows == 2
    many = ops.linear_cross_entropy(Parameter(np.ones((700, 1), "float32")), np.ones((50257, 1), "float32"), [0] * 700)
    assert many.node.chunk_rows == 234  # three chunks of about equal size, where 333 rows would have fit


def test_default_chunk_is_the_devices(device, monkeypatch):
    op = backend.current_device().resolve(ops.LinearCrossEntropy)
    assert op.most == (1 << 26 if device == "gpu" else 1 << 24)
    monkeypatch.setattr(op, "most", 12)
    h, W = Parameter(place(np.ones((7, 2)))), place(np.ones((3, 2)))
    assert ops.linear_cross_entropy(h, W, [0] * 7).node.chunk_rows == 4
    assert ops.linear_cross_entropy(h.data, W, [0] * 7).node is None  # arrays are taken, too


@pytest.mark.parametrize("device", ["standin"], indirect=True)
def test_without_a_graph_it_does_half_the_work(device):
    import standin
    h, W = Parameter(place(np.ones((4, 2)))), Parameter(place(np.ones((3, 2))))
    with minilora.no_grad(), standin.counting() as frozen:
        ops.linear_cross_entropy(h, W, [0, 1, 2, 0])
    with standin.counting() as trained:
        ops.linear_cross_entropy(h, W, [0, 1, 2, 0])
    assert frozen.calls["dot"] == 1 and frozen.calls["setitem"] == 0
    assert trained.calls["dot"] == 3 and trained.calls["setitem"] == 1


def test_no_gradient_is_computed_without_a_graph(device):
    h, W = Parameter(place(np.ones((4, 2)))), Parameter(place(np.ones((3, 2))))
    with minilora.no_grad():
        assert ops.linear_cross_entropy(h, W, [0, 1, 2, 0]).node is None
    assert [a is not None for a in ops.linear_cross_entropy(h, W.detach(), [0, 1, 2, 0]).node.saved] == [True, False, False]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_refused(device, fused):
    W = Parameter(place(np.eye(3)))

    def call(x, labels, **settings):
        x = Parameter(place(x)) if isinstance(x, np.ndarray) else x
        return ops.linear_cross_entropy(x, W, labels, **settings) if fused else ops.cross_entropy(x, labels, **settings)
    x = np.ones((4, 3))
    with pytest.raises(OutOfRangeError, match=r"label 3 at position 2 .* 0 to 2, or -100"):
        call(x, [0, 1, 3, -100])
    with pytest.raises(OutOfRangeError, match=r"label -1 at position \(0, 1\)"):
        call(x.reshape(2, 2, 3), [[0, -1], [0, 0]])
    with pytest.raises(OutOfRangeError, match="-100"):
        call(x, [0, -100, 0, 0], ignore_index=-1)
    with pytest.raises(ShapeError, match="nothing to average.*4 labels"):
        call(x, [-100] * 4)
    with pytest.raises(ShapeError, match="nothing to average.*empty"):
        call(np.ones((0, 3)), np.zeros(0, "int64"))
    for labels in ([0, 1], [[0, 1, 2, 0]], 0):
        with pytest.raises(ShapeError, match=r"\(4,\)"):
            call(x, labels)
    for labels in ([0.0, 1.0, 2.0, 0.0], np.eye(4), [True] * 4, None):
        with pytest.raises(DTypeError):
            call(x, labels)
    for e in (-0.1, 1.1, math.nan, "0", None, True):
        with pytest.raises(ConfigError, match="label_smoothing"):
            call(x, [0, 1, 2, 0], label_smoothing=e)
    for index in (None, 1.5, True):
        with pytest.raises(ConfigError, match="ignore_index"):
            call(x, [0, 1, 2, 0], ignore_index=index)
    with pytest.raises((ShapeError, DTypeError)):
        call(place(np.ones((4, 3), "int64")), [0, 1, 2, 0])
    with pytest.raises(ShapeError):
        call(Parameter(place(1.0)), 0)


LABELS = {"list": [0, 2], "array": np.array([0, 2]), "tensor": minilora.Tensor(np.array([0, 2]))}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_swapped_arguments_are_named_and_the_advice_works(labels):
    logits = minilora.tensor(np.eye(2, 3, dtype="float32"))
    for first, second in ((labels, logits), (labels, logits.data)):
        with pytest.raises(DTypeError, match=r"the logits come first.*float32 \(2, 3\): swap the two"):
            ops.cross_entropy(first, second)
        assert np.isfinite(ops.cross_entropy(second, first).item())


def test_one_hot_labels_are_named_and_the_advice_works():
    logits, labels = minilora.tensor(np.eye(2, 3, dtype="float32")), np.eye(2, 3, dtype=int)
    with pytest.raises(ShapeError, match=r"one-hot rows take labels\.argmax\(axis=-1\)"):
        ops.cross_entropy(logits, labels)
    assert ops.cross_entropy(logits, labels.argmax(axis=-1)).item() == ops.cross_entropy(logits, [0, 1]).item()


def test_what_the_fused_one_refuses(device):
    h, W = Parameter(place(np.ones((4, 3)))), place(np.ones((5, 3)))
    for rows in (0, -1, 2.0, True):
        with pytest.raises(ConfigError, match="chunk_rows"):
            ops.linear_cross_entropy(h, W, [0] * 4, chunk_rows=rows)
    with pytest.raises(ShapeError):
        ops.linear_cross_entropy(h, place(np.ones((5, 4))), [0] * 4)
    with pytest.raises(ShapeError):
        ops.linear_cross_entropy(h, W, [0] * 4, place(np.ones(4)))
    with pytest.raises(ShapeError):
        ops.linear_cross_entropy(h, place(np.ones((0, 3))), [-100] * 4)
