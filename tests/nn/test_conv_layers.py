"""Convolution and pooling layers: how they start, what they compute, and what they refuse."""
import math

import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora import nn, ops, optim
from minilora.errors import ConfigError, ShapeError


def images(*shape, seed=0):
    return minilora.Tensor(place(np.random.default_rng(seed).standard_normal(shape), "float32"))


LAYERS = [  # layer, input, weight's shape, inputs that an output meets
    (lambda **more: nn.Conv1d(4, 64, 5, **more), (2, 4, 9), (64, 4, 5), 20),
    (lambda **more: nn.Conv2d(4, 64, 3, **more), (2, 4, 5, 5), (64, 4, 3, 3), 36),
    (lambda **more: nn.Conv2d(4, 64, (1, 7), groups=2, **more), (2, 4, 5, 8), (64, 2, 1, 7), 14),
    (lambda **more: nn.Conv2d(64, 64, 3, groups=64, **more), (2, 64, 5, 5), (64, 1, 3, 3), 9),
]


@pytest.mark.parametrize(("make", "shape", "weight", "fan_in"), LAYERS)
def test_starts_in_its_range_with_its_spread(make, shape, weight, fan_in, device):
    layer = make(rng=np.random.default_rng(1))
    assert layer.weight.shape == weight and layer.bias.shape == weight[:1]
    assert list(dict(layer.named_parameters())) == ["weight", "bias"]
    bound = 1 / math.sqrt(fan_in)
    for p in (layer.weight, layer.bias):
        values = fetch(p)
        assert 0.9 * bound < np.abs(values).max() <= np.float32(bound)
        # A uniform number on [-a, a] has mean 0 and variance a^2/3: six standard errors.
        assert abs(values.mean()) < 6 * bound / math.sqrt(3 * values.size)
        assert abs(values.var() * 3 / bound ** 2 - 1) < 6 * math.sqrt(0.8 / values.size)
    assert make(bias=False, rng=0).bias is None
    assert fetch(make(bias=False, rng=1).weight).tobytes() == fetch(layer.weight).tobytes()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(("make", "shape", "weight", "fan_in"), LAYERS)
def test_computes_its_op_and_keeps_the_dtype(make, shape, weight, fan_in, dtype, device):
    layer = make(dtype=dtype, rng=np.random.default_rng(1))
    x = minilora.Tensor(place(np.random.default_rng(0).standard_normal(shape), dtype))
    function = ops.conv1d if len(shape) == 3 else ops.conv2d
    y = layer(x)
    assert fetch(y).tobytes() == fetch(function(x, layer.weight, layer.bias, groups=layer.groups)).tobytes()
    y.mean().backward()
    assert {a.dtype.name for a in (layer.weight, y, layer.weight.grad, layer.bias.grad)} == {dtype}


def test_settings_reach_the_op(device):
    layer = nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 1), groups=2, bias=False, rng=0)
    x = images(3, 2, 8, 6)
    assert fetch(layer(x)).tobytes() == fetch(ops.conv2d(x, layer.weight, None, (2, 1), (1, 2), (2, 1), 2)).tobytes()
    one = nn.Conv1d(2, 4, 3, stride=2, padding=3, dilation=2, groups=2, rng=0)
    x = images(3, 2, 8)
    assert fetch(one(x)).tobytes() == fetch(ops.conv1d(x, one.weight, one.bias, 2, 3, 2, 2)).tobytes()
    x = images(2, 3, 6, 5)
    assert fetch(nn.MaxPool2d(3, 2, 1)(x)).tobytes() == fetch(ops.max_pool2d(x, 3, 2, 1)).tobytes()
    assert fetch(nn.AvgPool2d((2, 3), padding=(1, 0))(x)).tobytes() == fetch(ops.avg_pool2d(x, (2, 3), None, (1, 0))).tobytes()
    assert fetch(nn.Upsample(scale_factor=(2, 3))(x)).tobytes() == fetch(ops.upsample(x, (2, 3))).tobytes()


def test_one_seed_gives_one_layer_on_every_device(device):
    layer = nn.Conv2d(2, 3, 3, rng=7)
    with minilora.use("cpu"):
        other = nn.Conv2d(2, 3, 3, rng=np.random.default_rng(7))
    assert layer.weight.device.name == device
    assert [fetch(p).tobytes() for p in layer.parameters()] == [fetch(p).tobytes() for p in other.parameters()]


def test_reprs_say_what_was_asked_for():
    assert repr(nn.Conv1d(2, 4, 3)) == "Conv1d(2, 4, kernel_size=(3,), bias=True)"
    assert repr(nn.Conv2d(2, 4, 3, 2, 1, 3, 2, False)) == (
        "Conv2d(2, 4, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(3, 3), groups=2, bias=False)")
    assert repr(nn.MaxPool2d(2)) == "MaxPool2d(kernel_size=(2, 2), stride=(2, 2), padding=(0, 0))"
    assert repr(nn.AvgPool2d(3, 1, 1)) == "AvgPool2d(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))"
    assert repr(nn.Upsample(scale_factor=2)) == "Upsample(scale_factor=(2, 2))"
    assert repr(nn.Flatten()) == "Flatten(start_dim=1, end_dim=-1)"


BAD = [
    (lambda: nn.Conv2d(0, 4, 3), "in_channels"), (lambda: nn.Conv2d(4, 2.0, 3), "out_channels"),
    (lambda: nn.Conv2d(4, 4, 0), "kernel_size must be an int >= 1"), (lambda: nn.Conv2d(4, 4, (3,)), r"\(3,\)"),
    (lambda: nn.Conv1d(4, 4, (3, 3)), r"\(3, 3\)"), (lambda: nn.Conv2d(4, 4, 3, stride=0), "stride"),
    (lambda: nn.Conv2d(4, 4, 3, padding=-1), "padding"), (lambda: nn.Conv2d(4, 4, 3, padding="same"), "'same'"),
    (lambda: nn.Conv2d(4, 4, 3, dilation=0), "dilation"), (lambda: nn.Conv2d(4, 4, 3, groups=0), "groups"),
    (lambda: nn.Conv2d(4, 6, 3, groups=3), "groups=3 does not divide the 4 input channels"),
    (lambda: nn.Conv2d(6, 4, 3, groups=3), "groups=3 does not divide the 4 output channels"),
    (lambda: nn.MaxPool2d(0), "kernel_size"), (lambda: nn.MaxPool2d(2, padding=2), "more than half"),
    (lambda: nn.AvgPool2d(2, stride=0), "stride"), (lambda: nn.Upsample(scale_factor=0.5), "scale_factor"),
]


@pytest.mark.parametrize(("make", "named"), BAD)
def test_refused_at_construction(make, named):
    with pytest.raises(ConfigError, match=named):
        make()


def test_an_error_names_the_layer_that_got_the_shape(device):
    model = nn.Sequential(nn.Conv2d(1, 2, 3, rng=0), nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 2, 3, rng=0)))
    with pytest.raises(ShapeError, match=r"3 channels on axis 1.*\(2, 2, 3, 3\)") as caught:
        model(images(2, 1, 8, 8))
    assert caught.value.path == "1.1"


@pytest.mark.parametrize(("settings", "shape"), [
    ((), (2, 60)), ((0,), (120,)), ((0, 1), (6, 4, 5)), ((2, 3), (2, 3, 20)), ((-2, -1), (2, 3, 20)), ((1, 1), (2, 3, 4, 5)),
])
def test_flatten(settings, shape, device):
    x = images(2, 3, 4, 5)
    y = nn.Flatten(*settings)(x)
    assert y.shape == shape and fetch(y).tobytes() == fetch(x).tobytes()
    assert nn.Flatten()(images(0, 3, 4)).shape == (0, 12)


@pytest.mark.parametrize(("settings", "shape"), [((), (3,)), ((2, 1), (2, 3, 4)), ((1, 4), (2, 3)), ((-4,), (2, 3))])
def test_flatten_refuses(settings, shape):
    with pytest.raises(ShapeError, match="Flatten"):
        nn.Flatten(*settings)(images(*shape))


def test_a_small_network_learns(device):
    """Bars that lie or stand: a convolution, a maximum and a linear layer tell them apart."""
    rng = np.random.default_rng(0)
    pictures, labels = 0.1 * rng.standard_normal((32, 1, 8, 8)), np.zeros((32, 1))
    for i, at in enumerate(rng.integers(0, 8, 32)):
        pictures[i, 0, at if i % 2 else slice(None), slice(None) if i % 2 else at] += 1.0
        labels[i] = i % 2
    x, target = (minilora.Tensor(place(a, "float32")) for a in (pictures, labels))
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, rng=rng), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, rng=rng),
                          nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 1, rng=rng))
    optimizer = optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = ops.mse(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
