"""Normalising layers, Embedding and CrossEntropyLoss: how they start, what they compute, and that they add nothing."""
import math

import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora import Parameter, lora, nn, ops, optim
from minilora.errors import ConfigError, OutOfRangeError, ShapeError


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


LAYERS = {
    "LayerNorm": (lambda: nn.LayerNorm(6, eps=1e-3, dtype="float64"), lambda x, w, b: ops.layer_norm(x, w, b, 1e-3)),
    "RMSNorm": (lambda: nn.RMSNorm(6, eps=1e-3, dtype="float64"), lambda x, w: ops.rms_norm(x, w, 1e-3)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6, eps=1e-3, dtype="float64"), lambda x, w, b: ops.group_norm(x, 2, w, b, 1e-3)),
}


@pytest.mark.parametrize("make, call", LAYERS.values(), ids=LAYERS)
def test_norm_starts_at_ones_and_zeros_and_adds_nothing(device, make, call):
    layer = make()
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"][:len(list(layer.parameters()))]
    for name, p in layer.named_parameters():
        np.testing.assert_array_equal(fetch(p), np.full(6, 1.0 if name == "weight" else 0.0))
        assert p.trainable and p.dtype == "float64" and p.device.name == device
        p.data += place(draw(6))
    x = place(draw(4, 6))
    np.testing.assert_array_equal(fetch(layer(x)), fetch(call(x, *layer.parameters())))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtype_is_kept(device, dtype):
    for layer in (nn.LayerNorm(6, dtype=dtype), nn.RMSNorm(6, dtype=dtype), nn.GroupNorm(3, 6, dtype=dtype)):
        y = layer(minilora.tensor(draw(4, 6), dtype))
        y.mean().backward()
        assert {a.dtype.name for p in layer.parameters() for a in (p, p.grad, y)} == {dtype}
    y = nn.Embedding(4, 3, dtype=dtype, rng=0)([0, 1, 1])
    y.mean().backward()
    assert y.dtype == dtype


def test_norm_without_parameters(device):
    x = place(draw(4, 6))
    for layer, expected in ((nn.LayerNorm(6, elementwise_affine=False, dtype="float64"), ops.layer_norm(x)),
                            (nn.RMSNorm(6, elementwise_affine=False, dtype="float64"), ops.rms_norm(x)),
                            (nn.GroupNorm(2, 6, affine=False, dtype="float64"), ops.group_norm(x, 2))):
        assert list(layer.parameters()) == []
        np.testing.assert_array_equal(fetch(layer(x)), fetch(expected))
        with pytest.raises(ShapeError):
            layer(place(draw(4, 8)))
    assert [name for name, _ in nn.LayerNorm(6, bias=False).named_parameters()] == ["weight"]


def test_norm_layers_refuse(device):
    for make in (lambda: nn.LayerNorm(0), lambda: nn.LayerNorm((2, 3)), lambda: nn.RMSNorm(2.0), lambda: nn.RMSNorm(()),
                 lambda: nn.GroupNorm(0, 4), lambda: nn.GroupNorm(4, 6), lambda: nn.GroupNorm(2, True),
                 lambda: nn.LayerNorm(3, eps=-1.0), lambda: nn.RMSNorm(3, eps=math.nan), lambda: nn.GroupNorm(1, 3, eps="0")):
        with pytest.raises(ConfigError):
            make()
    model = nn.Sequential(nn.GELU(), nn.LayerNorm(6))
    with pytest.raises(ShapeError, match="^1: .*6 values on axis -1.*5"):
        model(place(draw(2, 5).astype("float32")))
    with pytest.raises(ShapeError):
        nn.GroupNorm(2, 4)(place(draw(4).astype("float32")))
    assert nn.LayerNorm((6,)).normalized_shape == 6


def test_representations():
    assert repr(nn.LayerNorm(6)) == "LayerNorm(6, eps=1e-05, elementwise_affine=True, bias=True)"
    assert repr(nn.RMSNorm(6)) == "RMSNorm(6, eps=1e-06, elementwise_affine=True)"
    assert repr(nn.GroupNorm(2, 6)) == "GroupNorm(2, 6, eps=1e-05, affine=True)"
    assert repr(nn.Embedding(5, 2, rng=0)) == "Embedding(5, 2)"
    assert repr(nn.Embedding(5, 2, padding_idx=1, rng=0)) == "Embedding(5, 2, padding_idx=1)"
    assert repr(nn.CrossEntropyLoss()) == "CrossEntropyLoss(ignore_index=-100, label_smoothing=0.0)"
    assert repr(nn.GELU()) == "GELU(approximate='tanh')" and repr(nn.GELU("none")) == "GELU(approximate='none')"


def test_embedding_starts_standard_normal_and_the_same_everywhere(device):
    layer = nn.Embedding(300, 40, padding_idx=7, rng=3)
    values = fetch(layer.weight)
    assert values.dtype == "float32" and not values[7].any()
    others = np.delete(values, 7, axis=0)
    assert abs(others.mean()) < 6 / math.sqrt(others.size) and abs(others.std() - 1) < 6 / math.sqrt(2 * others.size)
    with minilora.use("cpu"):
        assert fetch(nn.Embedding(300, 40, padding_idx=7, rng=3).weight).tobytes() == values.tobytes()
    without = fetch(nn.Embedding(300, 40, rng=3).weight)
    np.testing.assert_array_equal(np.delete(without, 7, axis=0), others)


def test_embedding_padding_gets_no_gradient(device):
    layer = nn.Embedding(5, 2, padding_idx=1, dtype="float64", rng=0)
    layer([[1, 2], [1, 2]]).sum().backward()
    np.testing.assert_array_equal(fetch(layer.weight.grad), [[0, 0], [0, 0], [2, 2], [0, 0], [0, 0]])


def test_embedding_refuses(device):
    for make in (lambda: nn.Embedding(0, 2), lambda: nn.Embedding(2, 0), lambda: nn.Embedding(2, 2, padding_idx=2),
                 lambda: nn.Embedding(2, 2, padding_idx=-1)):
        with pytest.raises(ConfigError):
            make()
    model = nn.Sequential(nn.Embedding(5, 2, rng=0))
    with pytest.raises(OutOfRangeError, match="^0: embedding: token id 5 at position 1"):
        model([0, 5])


def test_cross_entropy_loss_is_the_op(device):
    x, labels = place(draw(4, 6)), [0, 5, -1, 2]
    expected = ops.cross_entropy(x, labels, ignore_index=-1, label_smoothing=0.1)
    assert nn.CrossEntropyLoss(ignore_index=-1, label_smoothing=0.1)(x, labels).item() == expected.item()
    with pytest.raises(ConfigError):
        nn.CrossEntropyLoss(label_smoothing=2)


def test_exact_gelu_layer(device):
    x = place(draw(4, 6))
    np.testing.assert_array_equal(fetch(nn.GELU("none")(x)), fetch(ops.gelu(x, "none")))
    with pytest.raises(ConfigError):
        nn.GELU("exact")


@pytest.mark.parametrize("tied", [True, False])
def test_a_small_language_model_learns(device, tied):
    """Tokens that follow one another in a circle; with `tied`, one table serves both ends, and gets both gradients."""
    V, D = 11, 16
    rng = np.random.default_rng(0)
    table = nn.Embedding(V, D, dtype="float64", rng=rng)
    model = nn.Sequential(table, nn.LayerNorm(D, dtype="float64"), nn.Linear(D, D, dtype="float64", rng=rng), nn.GELU(),
                          nn.RMSNorm(D, dtype="float64"))
    head = table.weight if tied else nn.Linear(D, V, bias=False, dtype="float64", rng=rng).weight
    adam = optim.Adam([*model.parameters(), *([] if tied else [head])], lr=3e-2)
    tokens = rng.integers(0, V, (4, 8))
    for _ in range(60):
        loss = ops.linear_cross_entropy(model(tokens), head, (tokens + 1) % V, chunk_rows=7)
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert loss.item() < 0.05


def test_norms_pass_gradients_to_an_adapter_below_them(device):
    rng = np.random.default_rng(0)
    frozen = nn.Sequential(nn.LayerNorm(6), nn.RMSNorm(6)).requires_grad(False)
    adapted = lora.adapt(nn.Linear(6, 6, rng=rng).requires_grad(False), r=2, lora_alpha=4, rng=rng)
    x = minilora.tensor(draw(3, 6), "float32")
    loss = ops.cross_entropy(frozen(adapted(frozen(x))), [0, 1, 2])
    assert [row.op for row in minilora.engine.ledger(loss).rows][1:] == ["LayerNorm", "RMSNorm", "CrossEntropy"]
    loss.backward()
    assert {name for name, p in adapted.named_parameters() if p.grad is not None} == {
        "adapters.default.lora_A", "adapters.default.lora_B"}
    assert isinstance(frozen[0].weight, Parameter) and frozen[0].weight.grad is None
