"""Weights in 16 bits on a GPU, by the strict stand-in: where they lie, and what a step launches."""

import numpy
import pytest
import standin

from conftest import fetch, place
from plain_card import plain_card
from minilora import lora, nn, quant
from minilora.tensor import Parameter


@pytest.fixture(params=["float16", "bfloat16"])
def kind(request):
    if request.param == "bfloat16":
        pytest.importorskip("ml_dtypes")
    return request.param


def made(kind, bias=True):
    """A layer with an adapter on the host, and its input."""
    layer = lora.Linear(16, 24, r=2, bias=bias, rng=0)
    rng = numpy.random.default_rng(1)
    layer.lora_B.data[...] = rng.normal(size=layer.lora_B.shape)
    quant.quantize(layer, kind)
    return layer, rng.normal(size=(5, 16)).astype("float32")


def step(layer, x):
    given = Parameter(x)
    for p in layer.parameters():
        p.grad = None
    y = layer(given)
    y.sum().backward()
    return [fetch(a) for a in (y.data, given.grad, *(p.grad for p in layer.parameters() if p.trainable))]


def test_a_step_asks_nothing_of_the_host(kind):
    layer, x = made(kind)
    plain = lora.Linear(16, 24, r=2, rng=0)
    launches = []
    with standin.card() as device:
        x = place(x)
        for one in (plain, layer):
            one.to(device.name)
            given = Parameter(x)
            one(given).sum().backward()
            with standin.counting() as counts:
                one(given).sum().backward()
            assert not counts.syncs and not counts.h2d and not counts.d2h
            launches.append(counts.launches)
    each = 1 if kind == "float16" else 2  # to decode a tile, forward and again for dx
    assert launches[1] <= launches[0] + 2 * each


def test_the_request_changes_nothing_on_the_cpu_and_goes_with_the_weight(kind):
    layer, x = made(kind)
    expected = step(layer, x)
    quant.half_products(layer)
    for one, other in zip(step(layer, x), expected):
        numpy.testing.assert_array_equal(one, other)
    W = layer.weight.data
    assert all(other.as_it_is for other in (W.T, W.astype("float64"), W.with_arrays(W.arrays()), W.reshape(24, 16)))


def test_other_layers(kind):
    conv, table = lora.Conv2d(4, 6, 3, r=2, groups=2, rng=0), lora.Embedding(13, 8, r=2, use_dora=True, rng=1)
    x, ids = numpy.random.default_rng(2).normal(size=(2, 4, 5, 5)).astype("float32"), numpy.array([[3, 0, 12]])
    for layer, given in ((conv, x), (table, ids)):
        quant.quantize(layer, kind)
        expected = layer(given).data
        with plain_card() as device:  # kernels that are counted write no numbers
            layer.to(device.name)
            numpy.testing.assert_allclose(fetch(layer(place(given) if given.dtype.kind == "f" else given)), expected, rtol=1e-5,
                                          atol=1e-5)
            if layer is table:
                numpy.testing.assert_allclose(fetch(table.logits(place(expected))).shape, (1, 3, 13))
            layer.to("cpu")


def test_a_layer_without_numbers():
    W = quant.Sixteen(numpy.zeros((0, 3), "float16"))
    assert W.after_transposed(numpy.ones((2, 3), "float32")).shape == (2, 0)
    assert W.after(numpy.ones((2, 0), "float32")).tolist() == [[0.0] * 3] * 2
    V = quant.Sixteen(numpy.zeros((3, 0), "float16"))
    assert V.after(numpy.ones((2, 3), "float32")).shape == (2, 0)
    assert V.after_transposed(numpy.ones((2, 0), "float32")).tolist() == [[0.0] * 3] * 2
    assert nn.Linear(3, 1, rng=0).weight.size == 3
