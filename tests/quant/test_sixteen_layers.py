"""Every kind of layer on weights in 16 bits: outputs and gradients are those of the same layer on the decoded weight.

A further kind joins by a line in KINDS; a further use by one in USES.
"""

import copy
import pickle
import tracemalloc

import numpy
import pytest

import minilora
from minilora import lora, nn, ops, parallel, quant
from minilora.errors import ConfigError, StateError
from minilora.stored import Stored
from minilora.tensor import Parameter

KINDS = ["float16", "bfloat16"]
IDS = numpy.array([[3, 0, 3], [12, 5, 1]])


def kind_or_skip(kind):
    if kind == "bfloat16":
        pytest.importorskip("ml_dtypes")
    return kind


@pytest.fixture(params=KINDS)
def kind(request):
    return kind_or_skip(request.param)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Tiles of a few rows, so that small matrices have several; and both ways of computing dx."""
    monkeypatch.setattr("minilora.stored.TILE", 60)
    monkeypatch.setattr("minilora.quant.sixteen.NARROW", 4)


class Tied(nn.Module):
    def __init__(self, dtype):
        self.wte = nn.Embedding(13, 8, dtype=dtype, rng=0)
        self.middle = nn.Linear(8, 8, dtype=dtype, rng=1)

    def forward(self, ids):
        return self.wte.logits(ops.exp(self.middle(self.wte(ids)) * 0.3))


def floats(*shape):
    return numpy.random.default_rng(5).normal(size=shape)


def tied(dtype, **config):
    model = Tied(dtype)
    if config:
        lora.inject(model, lora.Config(r=2, **config), rng=3)
    return model


USES = {  # name: (what makes the model, its input)
    "linear": (lambda dtype: nn.Linear(7, 13, dtype=dtype, rng=0), floats(4, 5, 7)),
    "no rows given": (lambda dtype: nn.Linear(7, 13, dtype=dtype, rng=0), floats(0, 7)),
    "no outputs": (lambda dtype: lora.Linear(7, 1, r=1, bias=False, dtype=dtype, rng=0), floats(3, 7)),
    "one column": (lambda dtype: lora.Linear(1, 13, r=1, dtype=dtype, rng=0), floats(3, 1)),
    "embedding": (lambda dtype: nn.Embedding(13, 8, dtype=dtype, rng=0), IDS),
    "lora embedding": (lambda dtype: lora.Embedding(13, 8, r=2, padding_idx=3, dtype=dtype, rng=0), IDS),
    "dora embedding": (lambda dtype: lora.Embedding(13, 8, r=2, use_dora=True, dtype=dtype, rng=0), IDS),
    "exact dora embedding": (lambda dtype: lora.Embedding(13, 8, r=2, use_dora=True, exact=True, padding_idx=5, dtype=dtype,
                                                          rng=0), IDS),
    "conv1d": (lambda dtype: nn.Conv1d(4, 6, 3, padding=1, dtype=dtype, rng=0), floats(2, 4, 9)),
    "conv2d in groups": (lambda dtype: nn.Conv2d(4, 6, (3, 2), stride=2, groups=2, dtype=dtype, rng=0), floats(2, 4, 7, 6)),
    "conv by channel": (lambda dtype: nn.Conv2d(6, 6, 3, groups=6, dtype=dtype, rng=0), floats(2, 6, 5, 5)),
    "lora conv1d": (lambda dtype: lora.Conv1d(4, 6, 3, r=2, dtype=dtype, rng=0), floats(2, 4, 9)),
    "lora conv2d": (lambda dtype: lora.Conv2d(4, 6, 3, r=2, groups=2, padding=1, dtype=dtype, rng=0), floats(3, 4, 5, 5)),
    "dora conv2d": (lambda dtype: lora.Conv2d(4, 6, 3, r=2, use_dora=True, dtype=dtype, rng=0), floats(2, 4, 5, 5)),
    "exact dora in groups": (lambda dtype: lora.Conv2d(4, 6, 3, r=2, groups=2, use_dora=True, exact=True, dtype=dtype, rng=0),
                             floats(2, 4, 5, 5)),
    "fan in fan out": (lambda dtype: lora.Linear(7, 13, r=2, fan_in_fan_out=True, dtype=dtype, rng=0), floats(5, 7)),
    "dora fan in fan out": (lambda dtype: lora.Linear(7, 13, r=2, fan_in_fan_out=True, use_dora=True, exact=True, dtype=dtype,
                                                      rng=0), floats(5, 7)),
    "merged linear": (lambda dtype: lora.MergedLinear(7, 12, r=2, enable_lora=(True, False, True), dtype=dtype, rng=0),
                      floats(5, 7)),
    "projected": (lambda dtype: lora.adapt(nn.Linear(7, 13, dtype=dtype, rng=0), 2, on_output=True, rng=1), floats(5, 7)),
    "tied head": (lambda dtype: tied(dtype), IDS),
    "tied head adapted": (lambda dtype: tied(dtype, target_modules=["wte", "middle"]), IDS),
    "biases": (lambda dtype: tied(dtype, target_modules=["middle"], bias="all"), IDS),
    "token rows": (lambda dtype: tied(dtype, target_modules=["middle"], trainable_token_indices={"wte": [3, 12]}), IDS),
}


def pair(use, kind, dtype="float64"):
    """The same model twice: on weights in 16 bits, and on what they decode to."""
    made = []
    for held in (True, False):
        model = USES[use][0](dtype)
        for p in model.parameters():
            p.trainable = p.trainable and not any(p is q for _, q in weights_of(model))
        quant.quantize(model, kind)
        if not held:
            quant.dequantize(model)
        rng = numpy.random.default_rng(7)
        for _, p in model.named_parameters():
            if p.trainable:
                p.data[...] += 0.3 * rng.normal(size=p.shape)
        made.append(model)
    return made


def weights_of(model):
    kinds = nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d
    return [(path, module.weight) for path, module in model.named_modules() if isinstance(module, kinds)]


def step(model, x, needs_x=True):
    given = Parameter(x.copy(), trainable=needs_x) if x.dtype.kind == "f" else x
    for p in model.parameters():
        p.grad = None
    y = model(given)
    if y.node is not None:
        (y * numpy.random.default_rng(3).normal(size=y.shape).astype(y.dtype)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.trainable}
    return {"y": y.data, **({"x": given.grad} if x.dtype.kind == "f" else {}), **grads}


def agree(one, other, tolerance=1e-11):
    assert one.keys() == other.keys()
    for name, a in one.items():
        assert (a is None) == (other[name] is None), name
        if a is not None:
            numpy.testing.assert_allclose(a, other[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("use", USES)
def test_every_kind_of_layer(use, kind):
    held, whole = pair(use, kind)
    assert all(isinstance(p.data, Stored) and p.data.kind == kind for _, p in weights_of(held)) and weights_of(held)
    for needs_x in (True, False):
        agree(step(held, USES[use][1], needs_x), step(whole, USES[use][1], needs_x))


@pytest.mark.parametrize("use", USES)
def test_copies_pickles_and_other_dtypes(use, kind):
    held, whole = pair(use, kind)
    x = USES[use][1]
    for other in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        agree(step(other, x), step(held, x), 0.0)
    held.to(dtype="float32"), whole.to(dtype="float32")
    x = x.astype("float32") if x.dtype.kind == "f" else x
    agree(step(held, x), step(whole, x), 2e-5)
    assert all(p.dtype == "float32" for p in held.parameters())


@pytest.mark.parametrize("use", USES)
def test_state_dicts(use, kind):
    held, _ = pair(use, kind)
    state = held.state_dict()
    assert all(state[path + ".weight" if path else "weight"].dtype.name == kind for path, _ in weights_of(held) if path in
               dict(held.named_modules()) and (path + ".weight" if path else "weight") in state)
    other = USES[use][0]("float64")
    for p in other.parameters():
        p.trainable = False
    quant.quantize(other, kind)
    other.load_state_dict(state)
    agree({"y": other(USES[use][1]).data}, {"y": held(USES[use][1]).data}, 0.0)


@pytest.mark.parametrize("use", ["linear", "no outputs", "lora embedding", "lora conv2d", "conv2d in groups", "fan in fan out",
                                 "merged linear", "tied head adapted", "token rows"])
def test_products_in_one_tile_have_the_same_bits(use, kind, monkeypatch):
    monkeypatch.setattr("minilora.stored.TILE", 1 << 20)
    held, whole = pair(use, kind, "float32")
    x = USES[use][1]
    x = x.astype("float32") if x.dtype.kind == "f" else x
    one, other = step(held, x), step(whole, x)
    agree(one, other, 0.0 if use not in ("conv2d in groups",) else 1e-6)


# -- other ways to run --------------------------------------------------------------------------------------------------


def test_linear_cross_entropy_and_its_gradients(kind):
    h, labels = floats(6, 8), numpy.array([0, 12, 5, -100, 5, 1])
    W, results = quant.stored(floats(13, 8), kind), []
    for weight in (W, W.dense()):
        given = Parameter(h.copy())
        loss = ops.linear_cross_entropy(given, Parameter(weight, trainable=False), labels, chunk_rows=4)
        loss.backward()
        results.append({"loss": loss.data, "h": given.grad})
    agree(*results)


def test_checkpointed_blocks_and_threads(kind):
    results = []
    for held in (True, False):
        model = nn.Sequential(nn.Linear(7, 9, dtype="float64", rng=0), nn.GELU(), nn.Linear(9, 3, dtype="float64", rng=1))
        lora.inject(model, lora.Config(r=2, target_modules=["0", "2"], init_lora_weights=False), rng=2)
        quant.quantize(model, kind)
        if not held:
            quant.dequantize(model)
        x = floats(8, 7)
        plain = step(model, x, False)
        model.grad_checkpoint = True
        agree(step(model, x, False), plain)
        for p in model.parameters():
            p.grad = None
        parallel.backward(lambda part: model(minilora.tensor(part)).sum(), x, threads=2)
        results.append({**plain, **{f"threads {name}": p.grad for name, p in model.named_parameters() if p.trainable}})
    agree(*results)


def test_copies_in_modules_to_save_are_decoded_and_trained(kind):
    model = Tied("float32")
    model.requires_grad(False)
    quant.quantize(model, kind)
    held = model.wte.weight.data
    lora.inject(model, lora.Config(r=2, target_modules=["middle"], modules_to_save=["wte"]), rng=1)
    trained = {path: p for path, p in model.named_parameters() if p.trainable}
    own, = [p for path, p in trained.items() if path.endswith("weight")]
    assert own.dtype == "float32" and type(own.data) is numpy.ndarray and own.data.flags.writeable
    numpy.testing.assert_array_equal(own.data, held.dense())
    optimizer = minilora.optim.AdamW(trained.values(), lr=0.1)
    (model(IDS) * floats(2, 3, 13).astype("float32")).sum().backward()
    optimizer.step()
    assert (own.data != held.dense()).any() and model.wte.original.weight.data is held


# -- merging ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["lora embedding", "lora conv2d", "fan in fan out", "merged linear", "projected",
                                 "dora fan in fan out", "tied head adapted", "token rows", "biases"])
def test_merging_rounds_to_what_is_held_and_unmerging_gives_its_bits_back(use, kind):
    held, whole = pair(use, kind, "float32")
    x = USES[use][1].astype("float32") if USES[use][1].dtype.kind == "f" else USES[use][1]
    held.eval()
    apart = held(x).data
    before = {path: (p.data, p.data.codes.copy()) for path, p in weights_of(held)}
    for _, (data, _) in before.items():
        data.codes.flags.writeable = False  # as where it lies in a file
    report = lora.merge(held)
    assert str(report) and any(p.data.kind == kind for _, p in weights_of(held))
    far = {"float16": 2e-2, "bfloat16": 0.3}[kind]
    numpy.testing.assert_allclose(held(x).data, apart, atol=far * numpy.abs(apart).max())
    for path, p in weights_of(held):
        assert isinstance(p.data, Stored) and p.data.kind == kind
    again = pickle.loads(pickle.dumps(held))
    lora.unmerge(again)  # without the array that it was: computed
    lora.unmerge(held)
    for model in (held, again):
        for path, p in weights_of(model):
            numpy.testing.assert_array_equal(p.data.codes.view("uint16"), before[path][1].view("uint16"))
    numpy.testing.assert_array_equal(held(x).data, apart)


def test_an_update_that_overflows_or_is_swallowed_is_told(kind):
    layer = lora.adapt(nn.Linear(8, 8, rng=0), 2, rng=1)
    quant.quantize(layer, kind)
    layer.lora_B.data[...] = 1e-6
    before = layer.weight.data
    with pytest.raises(StateError, match="of the update would arrive"):
        lora.merge(layer)
    layer.lora_B.data[...] = 1e6 if kind == "float16" else 3e38
    layer.lora_A.data[...] = 1.0 if kind == "float16" else 3e38
    with pytest.raises(StateError, match="overflow|NaN|inf"):
        lora.merge(layer)
    assert layer.weight.data is before and not layer.merged


def test_baking_keeps_16_bits(kind):
    held, _ = pair("tied head adapted", kind, "float32")
    lora.bake(held)
    assert type(held.wte) is nn.Embedding and all(p.data.kind == kind for _, p in weights_of(held))


# -- making them --------------------------------------------------------------------------------------------------------


def test_rounding_is_to_nearest_and_ties_to_even(kind):
    rng = numpy.random.default_rng(0)
    dtype = quant.stored(numpy.ones((1, 1)), kind).codes.dtype
    W = rng.normal(size=(40, 50)).astype("float32")
    ties = (quant.stored(W, kind).dense().view("uint32") + (0x1000 if kind == "float16" else 0x8000)).view("float32")
    for given in (W, ties, numpy.zeros((0, 3), "float32"), numpy.zeros((3, 0), "float32"), W.T, W[:, ::3],
                  numpy.array([[numpy.nan, numpy.inf, -numpy.inf, 0.0, -0.0, 1e-8, 1e-45]], "float32")):
        got, expected = quant.stored(given, kind).codes, given.astype(dtype)
        numpy.testing.assert_array_equal(numpy.isnan(got.astype("float32")), numpy.isnan(expected.astype("float32")))
        sound = ~numpy.isnan(given)
        numpy.testing.assert_array_equal(got.view("uint16")[sound], expected.view("uint16")[sound])
    # float64 is rounded once: just above a tie of two neighbours, whose lower one is even
    assert quant.stored(numpy.array([[1.0 + 2.0 ** -8 + 2.0 ** -40, 1.0 + 2.0 ** -11 + 2.0 ** -40]]), kind).dense().tolist()[0][
        kind == "float16"] > 1.0
    assert quant.stored(numpy.array([[1.0 + 2.0 ** -8 - 2.0 ** -40, 1.0 + 2.0 ** -11 - 2.0 ** -40]]), kind).dense().tolist()[0][
        kind == "float16"] == 1.0


def test_what_overflows_is_refused_with_its_path():
    model = nn.Sequential(nn.Linear(3, 3, rng=0), nn.Linear(3, 3, rng=1)).requires_grad(False)
    layers = list(model.parameters())
    layers[2].data[1, 1], before = 7e4, [p.data for p in layers]
    with pytest.raises(StateError, match=r"^1.weight: 1 of 9 numbers would be infinite in float16.*65504.*7e\+04.*bfloat16"):
        quant.quantize(model, "float16")
    assert all(p.data is data for p, data in zip(layers, before))
    with pytest.raises(ConfigError, match="'bfloat16' or 'float16'"):
        quant.quantize(model, "half")


def test_quantize_holds_all_layers_and_prints_it(kind):
    model = Tied("float32").requires_grad(False)
    report = quant.quantize(model, kind)
    assert [row.path for row in report.rows] == ["wte.weight", "middle.weight"] and report.bits == 16.0
    assert str(report).count(kind) == 2
    assert quant.dequantize(model).rows[0].error == 0.0


@pytest.mark.parametrize("layer", ["linear", "in, out", "conv", "head"])
def test_a_step_needs_a_tile_and_not_the_weight(layer, kind, monkeypatch):
    monkeypatch.setattr("minilora.stored.TILE", 1 << 16)
    monkeypatch.setattr("minilora.quant.sixteen.NARROW", 16)
    if layer == "conv":
        model, x = lora.Conv2d(256, 512, 3, r=2, padding=1, rng=0), floats(1, 256, 4, 4)
    elif layer == "head":
        model, x = lora.Linear(64, 32768, r=1, rng=0), floats(2, 64)
    else:
        model, x = lora.Linear(1024, 2048, r=4, fan_in_fan_out=layer == "in, out", rng=0), floats(4, 1024)
    dense = model.weight.data.nbytes
    quant.quantize(model, kind)
    assert model.weight.data.nbytes * 2 == dense
    given = Parameter(x.astype("float32"))
    model(given).sum().backward()
    tracemalloc.start()
    y = model(given)
    y.sum().backward()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    trained = sum(p.data.nbytes for p in model.parameters() if p.trainable)
    columns = 9 * x.nbytes if layer == "conv" else 0
    assert peak < 5 * 4 * (1 << 16) + 4 * (given.data.nbytes + y.data.nbytes) + 3 * trained + 2 * columns
    assert layer == "head" or peak < dense / 2
