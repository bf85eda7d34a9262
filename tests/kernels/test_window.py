"""The columns of a convolution by their kernels: to the bit those of the reference, for any window, layout and grid."""
import numpy as np
import pytest
import standin
from conftest import fetch, need_gpu, place

import minilora
from minilora import Parameter, backend, lora, nn, ops
from minilora.kernels.gpu import window as gpu_window
from minilora.lora.gradients.convolution import lora_conv2d
from minilora.ops.window import Window, columns, from_columns, window_of

WINDOWS = {  # lengths, kernel, stride, padding, dilation
    "3 x 3": ((5, 6), (3, 3), 1, 1, 1), "strides": ((7, 8), (3, 2), (2, 3), 0, 1),
    "stride past the kernel": ((9, 4), 2, 4, 0, 1), "padding past the kernel": ((3, 2), 2, 1, 3, 1),
    "dilation": ((9, 8), (3, 2), 1, (1, 0), (2, 3)), "one row": ((1, 9), (1, 3), 1, 0, 1),
    "1-D": ((9,), (3,), 2, 2, 2), "1-D one output": ((4,), (4,), 1, 0, 1), "pointwise": ((3, 4), (1, 1), 1, 0, 1),
}


def window(name):
    lengths, *settings = WINDOWS[name]
    settings[0] = settings[0] if isinstance(settings[0], tuple) else (settings[0],) * len(lengths)
    return lengths, window_of(*settings, len(lengths))


def operation(lengths, window, n=2, channels=3):
    op = gpu_window.WideConv()
    op.xp, op.window, op.groups = backend.current_device().xp, window, 1
    return op, (n, channels, *lengths)


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_bits_of_the_reference(name, n, dtype, card):
    op, shape = operation(*window(name), n)
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(dtype)
    expected = columns(x, op.window, np)
    X = op.columns(place(x), None)
    assert fetch(X).tobytes() == np.ascontiguousarray(expected).tobytes()
    if not op.window.pointwise:
        assert op.columns(place(2 * x), X) is X and fetch(X).tobytes() == (2 * expected).tobytes()  # written anew, zeros too
    dX = rng.standard_normal(expected.shape).astype(dtype)
    into, back = x.copy(), place(x)
    from_columns(dX, op.window, into)
    op.from_columns(place(dX), back)
    assert fetch(back).tobytes() == into.tobytes()
    if card:
        assert len(card.launches) == (0 if op.window.pointwise else 3)


LAYOUTS = [lambda a: place(a.T.copy(order="C")).T, lambda a: place(a[..., ::-1])[..., ::-1],
           lambda a: place(np.repeat(a, 2, axis=-1))[..., ::2], lambda a: place(np.stack([a, a]))[1:].reshape(a.shape)]


@pytest.mark.parametrize("layout", range(len(LAYOUTS)))
def test_any_layout(layout, card):
    op, shape = operation(*window("dilation"))
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    expected = columns(x, op.window, np)
    assert fetch(op.columns(LAYOUTS[layout](x), None)).tobytes() == expected.tobytes()
    into, back = x.copy(), LAYOUTS[layout](x)
    from_columns(expected, op.window, into)
    op.from_columns(LAYOUTS[layout](expected), back)
    assert fetch(back).tobytes() == into.tobytes()


def test_a_row_of_several_pieces_on_any_grid(card, monkeypatch):
    """More columns than one block copies; and the same bits on any card."""
    op, shape = operation((48, 49), Window((3, 2), (1, 1), (1, 0), (1, 1)), n=2, channels=1)
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    expected, bits = columns(x, op.window, np), set()
    assert expected.shape[1] > 2 * gpu_window.PIECE
    for grid in [None, 1, 5] if card else [None]:
        if card:
            card.grid, card.threads = grid, 64
        bits.add(fetch(op.columns(place(x), None)).tobytes())
    assert bits == {expected.tobytes()}


@pytest.mark.parametrize("at_once", [1, 300, 1 << 24])
@pytest.mark.parametrize("groups", [1, 2])
def test_parts_of_any_size(at_once, groups, card, monkeypatch):
    """Whole numbers, whose sums are exact: the reference's, however many samples are taken together."""
    monkeypatch.setattr(gpu_window, "AT_ONCE", at_once), monkeypatch.setattr(gpu_window.Convolution, "at_once", 7)
    rng, results = np.random.default_rng(0), []
    hosts = [rng.integers(-4, 5, shape).astype("float32") for shape in (
        (5, 4, 6, 5), (6, 4 // groups, 3, 2), (6,), (2, 4 // groups, 3, 2), (6, 2 // groups, 1, 1))]
    dy = rng.integers(-4, 5, (5, 6, 6, 6)).astype("float32")
    for kernels in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not kernels:
                patch.setattr(backend.current_device(), "versions", {op: op for op in backend.current_device().versions})
            p = [Parameter(place(a)) for a in hosts]
            y = lora_conv2d(*p, 0.5, padding=1, groups=groups)
            y.backward(place(dy))
            results.append([fetch(y), *(fetch(q.grad) for q in p)])
    for one, other in zip(*results):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_the_star_of_a_ledger(dtype, card):
    x, W = (Parameter(place(np.ones(shape), dtype)) for shape in ((2, 3, 5, 5), (4, 3, 3, 3)))
    assert "*" in str(minilora.engine.ledger(ops.conv2d(x, W)))
    pointwise = Parameter(place(np.ones((4, 3, 1, 1)), dtype))
    assert "*" not in str(minilora.engine.ledger(ops.conv2d(x, pointwise)))
    assert ops.conv2d(place(np.ones((0, 3, 5, 5)), dtype), W).shape == (0, 4, 3, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [((4, 64, 64, 64), (96, 64, 3, 3)), ((2, 512, 33, 35), (64, 512, 3, 3)),
                                   ((300, 3, 32, 32), (16, 3, 5, 5))], ids=["4x64", "2x512", "300x3"])
def test_large_convolutions_on_a_gpu(shape):
    """What the CPU gives in float64."""
    need_gpu()
    rng, results = np.random.default_rng(0), []
    x, W = (rng.integers(-2, 3, s).astype("float32") for s in shape)
    A, B = rng.integers(-2, 3, (4, *W.shape[1:])).astype("float32"), rng.integers(-2, 3, (len(W), 4, 1, 1)).astype("float32")
    for device, dtype in (("gpu", "float32"), ("cpu", "float64")):
        with backend.use(device):
            p = [Parameter(place(a, dtype)) for a in (x, W, A, B)]
            y = lora_conv2d(p[0], p[1], None, p[2], p[3], 0.5, stride=2, padding=1)
            y.backward(place(np.sign(y.data.get() if device == "gpu" else y.data), dtype))
            results.append([fetch(y), *(fetch(q.grad) for q in p)])
    for one, other in zip(*results):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * abs(other).max())


def test_launches_of_a_layer():
    """Whatever the images and the kernel; many times as many before."""
    for size, kernel in ((5, 3), (64, 5)):
        with standin.card():
            layer = lora.adapt(nn.Conv2d(3, 8, kernel, padding=1, rng=0), r=2)
            x = Parameter(place(np.ones((4, 3, size, size), "float32")))
            with standin.counting() as forward:
                y = layer(x)
            dy = place(np.ones(y.shape, "float32"))
            with standin.counting() as backward:
                y.node.backward(dy)
        assert (forward.calls["columns_float"], forward.launches) == (1, 7)  # X; Z, W X and B Z; b; y and Z put in order
        assert (backward.calls["columns_float"], backward.calls["from_columns_float"], backward.launches) == (1, 1, 11)
