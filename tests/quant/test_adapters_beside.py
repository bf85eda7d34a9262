"""Adapters of every kind beside a weight in low precision: the layer computes what it computes with the decoded weight."""

import tracemalloc

import numpy
import pytest

from minilora import lora, nn, quant
from minilora.tensor import Parameter

KINDS = {"nf4": {}, "fp4": {"double": False, "blocksize": 32}, "int8": {}, "float16": {}, "bfloat16": {}}

LAYERS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora_exact": {"use_dora": True, "exact": True},
    "lora_bias": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.4},
    "random": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "slots": {"enable_lora": (True, False, True)},
    "on_output": {"on_output": True},
}


def two(kind, dtype="float64", out=12, n_in=70, **options):
    """The same layer twice: on the weight in low precision, and on what it decodes to."""
    layers = []
    for held in (True, False):
        base = nn.Linear(n_in, out, dtype=dtype, rng=0).requires_grad(False)
        W = quant.stored(base.weight.data, kind, **KINDS[kind])
        base.weight = Parameter(W if held else W.dense(), trainable=False)
        layers.append(lora.adapt(base, 4, 8, rng=1, **options))
    return layers


def shaken(layer, seed=2):
    """Adapters with nothing in them that is 0."""
    rng = numpy.random.default_rng(seed)
    for p in layer.parameters():
        if p.trainable:
            p.data[...] += 0.3 * rng.normal(size=p.shape)
    return layer


def step(layer, x, needs_x=True, seed=3):
    """What comes out, and every gradient, of one pass with a random cotangent."""
    given = Parameter(x.copy(), trainable=needs_x)
    y = layer(given)
    (y * numpy.random.default_rng(seed).normal(size=y.shape).astype(y.dtype)).sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.trainable}
    return {"y": y.data, "x": given.grad, **grads}


def agree(one, other, tolerance=1e-11):
    assert one.keys() == other.keys()
    for name, a in one.items():
        b = other[name]
        assert (a is None) == (b is None), name
        if a is not None:
            numpy.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Tiles of a few rows, so that small matrices have several."""
    monkeypatch.setattr("minilora.stored.TILE", 250)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_option_computes_as_on_the_decoded_weight(name, kind):
    x = numpy.random.default_rng(4).normal(size=(2, 3, 70))
    for needs_x in (True, False):
        held, whole = (shaken(layer.train()) for layer in two(kind, **LAYERS[name]))
        agree(step(held, x, needs_x), step(whole, x, needs_x))
        assert held.weight.data.kind == kind and held.weight.grad is None


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_dora": True, "exact": True}], ids=str)
def test_weights_stored_as_in_out(options):
    x, layers = numpy.random.default_rng(4).normal(size=(5, 70)), []
    for held in (True, False):
        layer = lora.Linear(70, 12, r=2, fan_in_fan_out=True, dtype="float64", rng=0, **options)
        W = quant.stored(layer.weight.data, "nf4")
        layer.weight.data = W if held else W.dense()
        layers.append(shaken(layer))
    agree(*(step(layer, x) for layer in layers))


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters_and_mixed_batches(kind):
    x, results = numpy.random.default_rng(5).normal(size=(4, 70)), []
    for held in (True, False):
        model = nn.Sequential(nn.Linear(70, 16, dtype="float64", rng=0), nn.GELU(), nn.Linear(16, 3, dtype="float64", rng=1))
        model.requires_grad(False)
        quant.quantize(model, kind, **KINDS[kind])
        if not held:
            quant.dequantize(model)
        for name, dora in (("a", False), ("b", True), ("c", False)):
            lora.inject(model, lora.Config(r=2, target_modules=["0", "2"], use_dora=dora), name, rng=7)
        shaken(model)
        lora.activate(model, "a", "c", weights=[0.5, 2.0])
        one = step(model, x)
        with lora.mixed(model, ["b", "a", "__base__", "c"]):
            y = model(x).data
        with lora.disabled(model):
            results.append({**one, "mixed": y, "base": model(x).data})
    agree(*results)


def test_gradients_are_those_of_finite_differences():
    """Of the layer as it stands: the decoded weight is a constant."""
    from minilora.testing import gradcheck

    held, _ = two("nf4", out=4, n_in=9)
    shaken(held)
    x = numpy.random.default_rng(6).normal(size=(3, 9))
    gradcheck(lambda x, A, B: lora.lora_linear(x, held.weight, held.bias, A, B, held.scaling), x, held.lora_A.data,
              held.lora_B.data, mode="central")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes_to_compute_in(dtype):
    x = numpy.random.default_rng(4).normal(size=(6, 70)).astype(dtype)
    held, whole = (shaken(layer) for layer in two("nf4", dtype=dtype))
    assert held.weight.dtype == dtype and held.lora_A.dtype == "float32"
    agree(step(held, x), step(whole, x), 1e-4 if dtype == "float32" else 2e-2)


def test_the_bound_for_float32_is_that_of_adding_in_tiles():
    """In forward each number of y is one sum, in the order of BLAS; dx adds one partial sum a tile besides."""
    rng = numpy.random.default_rng(8)
    W = quant.stored(rng.normal(size=(64, 128)).astype("float32"), "nf4")
    x, dy = rng.normal(size=(5, 128)).astype("float32"), rng.normal(size=(5, 64)).astype("float32")
    whole = W.dense().astype("float64")
    eps = 2.0 ** -24
    for got, a, b in ((W.T.after(x), x, whole.T), (W.after(dy), dy, whole)):
        bound = (a.shape[1] + 64) * eps * (numpy.abs(a.astype("float64")) @ numpy.abs(b))
        assert (numpy.abs(got - a.astype("float64") @ b) <= bound).all()


def test_a_step_needs_a_tile_and_not_the_weight(monkeypatch):
    monkeypatch.setattr("minilora.stored.TILE", 1 << 16)
    layer = lora.adapt(nn.Linear(1024, 2048, rng=0), 4, rng=1)
    dense = layer.weight.data.nbytes
    quant.quantize(layer)
    assert layer.weight.data.nbytes * 8 <= 4.2 * layer.weight.size
    x = Parameter(numpy.random.default_rng(4).normal(size=(8, 1024)).astype("float32"))
    layer(x).sum().backward()
    tracemalloc.start()
    layer(x).sum().backward()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tile, activations = 4 * (1 << 16), 4 * 8 * (1024 + 2048)
    assert peak < 3 * tile + 6 * activations < dense / 4


@pytest.mark.parametrize("device", ["standin", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "bfloat16"])
def test_on_another_device(device, kind):
    """Made on the host, decoded where it lives: the same numbers."""
    import minilora
    W = numpy.random.default_rng(1).normal(size=(12, 70)).astype("float32")
    here, there = quant.stored(W, kind), quant.stored(minilora.to_device(W), kind)
    assert there.device.name == device and there.dense().shape == (12, 70)
    numpy.testing.assert_array_equal(minilora.to_host(there), here.dense())
    numpy.testing.assert_array_equal(minilora.to_host(there[3:7]), here[3:7])
    layer = lora.adapt(nn.Linear(70, 12, rng=0), 2, use_dora=kind == "nf4", rng=1)
    report = quant.quantize(layer, kind)
    assert 0.0 < report.rows[0].error < 0.2
    x = Parameter(minilora.to_device(numpy.random.default_rng(2).normal(size=(3, 70)).astype("float32")))
    layer(x).sum().backward()
    assert numpy.isfinite(minilora.to_host(x.grad)).all()
    quant.dequantize(layer)
    assert layer.weight.device.name == device
