"""Layers: how they start, what they compute, and that they add nothing to their op."""
import math

import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora import nn, ops
from minilora.errors import ConfigError, DTypeError, ShapeError


def draw(*shape, dtype="float64", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# -- Linear -------------------------------------------------------------------------------------------------


def test_linear_starts_in_its_range_with_its_spread(device):
    n_in, n_out = 100, 400
    layer = nn.Linear(n_in, n_out, rng=np.random.default_rng(1))
    bound = 1 / math.sqrt(n_in)
    for p in (layer.weight, layer.bias):
        values = fetch(p)
        assert np.abs(values).max() <= np.float32(bound)
        assert np.abs(values).max() > 0.97 * bound
        # A uniform number on [-a, a] has mean 0 and variance a^2/3: six standard errors.
        assert abs(values.mean()) < 6 * bound / math.sqrt(3 * values.size)
        assert abs(values.var() * 3 / bound ** 2 - 1) < 6 * math.sqrt(0.8 / values.size)
    assert layer.weight.shape == (n_out, n_in) and layer.bias.shape == (n_out,)
    assert layer.weight.trainable and layer.bias.trainable


def test_linear_one_seed_gives_one_layer_on_every_device(device):
    layer = nn.Linear(5, 3, rng=np.random.default_rng(7))
    with minilora.use("cpu"):
        other = nn.Linear(5, 3, rng=np.random.default_rng(7))
    assert layer.weight.device.name == device
    assert fetch(layer.weight).tobytes() == fetch(other.weight).tobytes()
    assert fetch(layer.bias).tobytes() == fetch(other.bias).tobytes()
    assert fetch(layer.weight).tobytes() != fetch(nn.Linear(5, 3, rng=np.random.default_rng(8)).weight).tobytes()


def test_linear_weights_do_not_depend_on_the_bias_or_on_global_state():
    np.random.seed(0)
    before = np.random.get_state()[1].tobytes()
    with_bias = nn.Linear(5, 3, rng=np.random.default_rng(7))
    without = nn.Linear(5, 3, bias=False, rng=np.random.default_rng(7))
    assert fetch(with_bias.weight).tobytes() == fetch(without.weight).tobytes()
    assert without.bias is None
    nn.Linear(5, 3)
    assert np.random.get_state()[1].tobytes() == before


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_linear_keeps_its_dtype(device, dtype):
    layer = nn.Linear(4, 3, dtype=dtype, rng=np.random.default_rng(0))
    y = layer(minilora.tensor(draw(5, 4, dtype=dtype)))
    y.mean().backward()
    assert {a.dtype.name for a in (layer.weight, layer.bias, y, layer.weight.grad, layer.bias.grad)} == {dtype}


def test_linear_float32_is_the_rounded_float64_draw():
    single = nn.Linear(5, 3, rng=np.random.default_rng(7))
    double = nn.Linear(5, 3, dtype="float64", rng=np.random.default_rng(7))
    assert np.array_equal(fetch(single.weight), fetch(double.weight).astype("float32"))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4), (2, 1, 3, 4), (0, 4), (2, 0, 4)])
def test_linear_formula_and_gradients(device, shape, bias):
    layer = nn.Linear(4, 3, bias, dtype="float64", rng=np.random.default_rng(2))
    x = minilora.Parameter(place(draw(*shape)))
    dy = draw(*shape[:-1], 3, seed=1)
    y = layer(x)
    W, b = fetch(layer.weight), fetch(layer.bias) if bias else np.zeros(3)
    assert y.shape == shape[:-1] + (3,)
    np.testing.assert_allclose(fetch(y), np.einsum("...i,ki->...k", draw(*shape), W) + b, rtol=1e-13, atol=1e-14)
    y.backward(place(dy))
    np.testing.assert_allclose(fetch(x.grad), np.einsum("...k,ki->...i", dy, W), rtol=1e-13, atol=1e-14)
    flat_x, flat_dy = draw(*shape).reshape(-1, 4), dy.reshape(-1, 3)
    np.testing.assert_allclose(fetch(layer.weight.grad), np.einsum("nk,ni->ki", flat_dy, flat_x), rtol=1e-12,
                               atol=1e-14)
    if bias:
        np.testing.assert_allclose(fetch(layer.bias.grad), flat_dy.sum(0), rtol=1e-12, atol=1e-14)


def test_linear_frozen_gets_no_gradient_and_keeps_nothing(device):
    frozen = nn.Linear(4, 4, rng=np.random.default_rng(0)).requires_grad(False)
    x = minilora.tensor(draw(5, 4, dtype="float32"))
    assert frozen(x).node is None
    top = nn.Linear(4, 2, rng=np.random.default_rng(1))
    loss = top(frozen(x)).mean()
    assert [row.op for row in minilora.engine.ledger(loss).rows] == ["Linear", "Mean"]
    loss.backward()
    assert frozen.weight.grad is None and frozen.bias.grad is None and top.weight.grad is not None


# -- Sequential ---------------------------------------------------------------------------------------------


def test_sequential_applies_in_order(device):
    rng = np.random.default_rng(3)
    first, second = nn.Linear(4, 5, rng=rng), nn.Linear(5, 2, rng=rng)
    model = nn.Sequential(first, nn.Tanh(), second)
    x = minilora.tensor(draw(6, 4, dtype="float32"))
    assert fetch(model(x)).tobytes() == fetch(second(ops.tanh(first(x)))).tobytes()
    assert len(model) == 3 and model[0] is first and model[-1] is second


def test_sequential_of_nothing_is_the_identity():
    x = minilora.tensor([1.0])
    assert nn.Sequential()(x) is x


def test_sequential_replaces_a_module():
    model = nn.Sequential(nn.Linear(4, 4, rng=np.random.default_rng(0)), nn.ReLU())
    model[0] = minilora.lora.adapt(model[0], r=2, lora_alpha=2, rng=np.random.default_rng(1))
    assert [name for name, p in model.named_parameters() if p.trainable] == [
        "0.adapters.default.lora_A", "0.adapters.default.lora_B"]
    with pytest.raises(IndexError):
        model[2]


# -- activations, loss --------------------------------------------------------------------------------------


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


ACTIVATIONS = {
    "ReLU": (nn.ReLU(), lambda x: np.where(x > 0, x, 0.0)),
    "Tanh": (nn.Tanh(), lambda x: (np.exp(x) - np.exp(-x)) / (np.exp(x) + np.exp(-x))),
    "Sigmoid": (nn.Sigmoid(), lambda x: 1 / (1 + np.exp(-x))),
    "SiLU": (nn.SiLU(), lambda x: x / (1 + np.exp(-x))),
    "GELU": (nn.GELU(), lambda x: x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))),
    "Softmax": (nn.Softmax(), softmax),
    "Softmax(0)": (nn.Softmax(0), lambda x: softmax(x, 0)),
    "LogSoftmax": (nn.LogSoftmax(), lambda x: np.log(softmax(x))),
    "LogSoftmax(1)": (nn.LogSoftmax(axis=1), lambda x: np.log(softmax(x, 1))),
}


@pytest.mark.parametrize("layer, formula", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activation(device, layer, formula):
    x = 2 * draw(3, 4, 5)
    y = layer(minilora.tensor(x.copy()))
    np.testing.assert_allclose(fetch(y), formula(x), rtol=1e-13, atol=1e-15)
    assert list(layer.parameters()) == []
    assert y.dtype == np.float64 and layer(minilora.tensor(x.astype("float32"))).dtype == np.float32


def test_mse_loss(device):
    p, t = draw(4, 3), draw(4, 3, seed=1)
    prediction = minilora.Parameter(place(p))
    loss = nn.MSELoss()(prediction, minilora.tensor(t))
    assert loss.shape == ()
    np.testing.assert_allclose(fetch(loss), ((p - t) ** 2).mean(), rtol=1e-14)
    loss.backward()
    np.testing.assert_allclose(fetch(prediction.grad), 2 * (p - t) / p.size, rtol=1e-14)


def test_mse_loss_refuses_to_broadcast(device):
    with pytest.raises(ShapeError, match=r"prediction \(4, 1\) and target \(4,\).*target\.reshape\(4, 1\)"):
        nn.MSELoss()(minilora.tensor(draw(4, 1)), minilora.tensor(draw(4)))


# -- Dropout ------------------------------------------------------------------------------------------------


def test_dropout_in_training(device):
    p, n = 0.25, 40_000
    layer = nn.Dropout(p, rng=np.random.default_rng(5))
    x = minilora.Parameter(place(np.ones((200, n // 200))))
    y = layer(x)
    values = fetch(y)
    assert set(np.unique(values)) == {0.0, 1 / (1 - p)}
    # The share kept is binomial: six standard deviations. E[y] = x follows.
    assert abs((values > 0).mean() - (1 - p)) < 6 * math.sqrt(p * (1 - p) / n)
    y.backward(place(draw(200, n // 200)))
    np.testing.assert_array_equal(fetch(x.grad), draw(200, n // 200) * values)


def test_dropout_masks_repeat_with_the_seed_and_change_with_the_step(device):
    x = minilora.tensor(np.ones((20, 20), "float32"))
    one, two = (nn.Dropout(0.5, rng=np.random.default_rng(5)) for _ in range(2))
    first = [fetch(one(x)) for _ in range(3)]
    second = [fetch(two(x)) for _ in range(3)]
    assert all(np.array_equal(a, b) for a, b in zip(first, second))
    assert not np.array_equal(first[0], first[1]) and not np.array_equal(first[1], first[2])
    assert (one.step, two.step) == (3, 3)
    with minilora.use("cpu"):
        three = nn.Dropout(0.5, rng=np.random.default_rng(5))
        assert np.array_equal(fetch(three(minilora.tensor(np.ones((20, 20), "float32")))), first[0])


def test_dropout_neighbouring_steps_and_layers_are_independent():
    x = minilora.tensor(np.ones(10_000))
    rng = np.random.default_rng(5)
    masks = [fetch(layer(x)) > 0 for layer in (nn.Dropout(0.5, rng=rng), nn.Dropout(0.5, rng=rng))
             for _ in range(2)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a == b).mean() - 0.5) < 6 * 0.5 / math.sqrt(10_000)


def test_dropout_is_the_identity_in_evaluation_and_at_p_0(device):
    x = minilora.tensor(draw(3, 4))
    layer = nn.Dropout(0.5, rng=np.random.default_rng(0)).eval()
    assert layer(x) is x and layer.step == 0
    zero = nn.Dropout(0.0)
    assert zero(x) is x and zero.step == 0
    layer.train()
    assert layer(x) is not x


# -- settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "3", None, np.float64(3)])
def test_linear_sizes(size):
    with pytest.raises(ConfigError, match=r"in_features must be an int >= 1, got "):
        nn.Linear(size, 3)
    with pytest.raises(ConfigError, match=r"out_features must be an int >= 1, got "):
        nn.Linear(3, size)


def test_linear_takes_numpy_integers():
    layer = nn.Linear(np.int64(3), np.int32(2))
    assert repr(layer) == "Linear(in_features=3, out_features=2, bias=True)"
    assert type(layer.in_features) is int


@pytest.mark.parametrize("p", [1, 1.0, -0.1, 2, math.nan, math.inf, "0.5", None])
def test_dropout_probability(p):
    with pytest.raises(ConfigError, match=r"dropout must be a number in \[0, 1\), got "):
        nn.Dropout(p)


@pytest.mark.parametrize("dtype", ["int32", "bool", "object"])
def test_linear_dtype_must_float(dtype):
    with pytest.raises(DTypeError, match=f"numbers.* dtype {dtype}"):
        nn.Linear(3, 2, dtype=dtype)
