"""What the products do not compute: the gradients nobody needs."""
import numpy as np
import pytest
import standin
from conftest import place

from minilora import Parameter, Tensor, backend, lora, ops, optim

SHAPES = {"x": (6, 5), "W": (4, 5), "b": (4,), "A": (2, 5), "B": (4, 2)}


def inputs(trained):
    rng = np.random.default_rng(0)
    return [Parameter(place(rng.standard_normal(shape)), trainable=name in trained) for name, shape in SHAPES.items()]


def products(counts):
    return counts.calls["dot"] + counts.calls["matmul"]


@pytest.mark.parametrize("device", ["standin"], indirect=True)
@pytest.mark.parametrize(("trained", "forward", "backward"), [
    ("", 1, 0), ("x", 1, 1), ("W", 1, 1), ("b", 1, 0), ("xW", 1, 2), ("Wb", 1, 1), ("xWb", 1, 2),
])
def test_products_of_a_linear_layer(trained, forward, backward, device):
    x, W, b, _, _ = inputs(trained)
    with standin.counting() as counts:
        y = ops.linear(x, W, b)
    assert products(counts) == forward
    if trained:
        with standin.counting() as counts:
            y.backward(place(np.ones(y.shape)))
        assert products(counts) == backward


@pytest.mark.parametrize("device", ["standin"], indirect=True)
@pytest.mark.parametrize(("trained", "backward"), [
    ("", 0), ("A", 2), ("B", 1), ("AB", 3), ("xAB", 5), ("x", 3), ("W", 1), ("b", 0), ("xWbAB", 6),
])
def test_products_of_a_low_rank_layer(trained, backward, device):
    """dB one; u and dA; dx two more, with u shared; dW only if somebody trains W."""
    x, W, b, A, B = inputs(trained)
    with standin.counting() as counts:
        y = lora.lora_linear(x, W, b, A, B, 0.5)
    assert products(counts) == 3
    if trained:
        with standin.counting() as counts:
            y.backward(place(np.ones(y.shape)))
        assert products(counts) == backward


@pytest.mark.parametrize(("one", "two"), [((3, 4), (4, 2)), ((2, 3, 4), (4, 2)), ((2, 3, 4), (2, 4, 5))])
def test_products_of_matmul(one, two):
    standin.register()
    with backend.use("standin"):
        for needs, backward in [((True, True), 2), ((True, False), 1), ((False, True), 1)]:
            a, b = (Parameter(place(np.ones(shape)), trainable=n) for shape, n in zip((one, two), needs))
            y = a @ b
            with standin.counting() as counts:
                y.backward(place(np.ones(y.shape)))
            assert products(counts) == backward
    backend.unregister_device("standin")


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)])
def test_a_weights_gradient_is_written_into_the_optimizers_array(shape, device):
    rng = np.random.default_rng(0)
    W, unused = Parameter(place(rng.standard_normal((4, 5)), "float32")), Parameter(place(np.ones(3), "float32"))
    optim.SGD([unused, W], lr=0.1)
    x = rng.standard_normal(shape)
    for _ in range(2):
        W.grad = None
        y = ops.linear(Tensor(place(x, "float32")), W)
        y.backward(place(np.ones(y.shape), "float32"))
        assert W.gathered is W.room and unused.grad is None
        expected = np.tile(x.reshape(-1, 5).sum(axis=0), (4, 1))
        np.testing.assert_allclose(backend.to_host(W.grad), expected, rtol=1e-5, atol=1e-5)
