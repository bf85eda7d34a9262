"""Models whose linear layers are quantised, decoded, refused; and merging into them."""

import copy
import pickle

import numpy
import pytest

import minilora
from minilora import lora, nn, quant
from minilora.errors import ConfigError, DTypeError, StateDictError, StateError
from minilora.stored import Stored


def model(head="out", dtype="float32"):
    class Net(nn.Module):
        def __init__(self):
            self.embedding = nn.Embedding(9, 32, dtype=dtype, rng=0)
            self.layers = [nn.Linear(32, 48, dtype=dtype, rng=1), nn.Linear(48, 32, dtype=dtype, rng=2)]
            self.norm = nn.LayerNorm(32, dtype=dtype)
            setattr(self, head, nn.Linear(32, 5, dtype=dtype, rng=3))

        def forward(self, ids):
            x = self.embedding(ids)
            return getattr(self, head)(self.norm(self.layers[1](minilora.ops.gelu(self.layers[0](x)))))

    return Net().requires_grad(False)


IDS = numpy.array([[0, 3, 8], [1, 1, 2]])


def held(net):
    return [path for path, p in net.named_parameters() if isinstance(p.data, Stored)]


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_there_and_back(kind):
    net = model()
    before = net.state_dict()
    report = quant.quantize(net, kind)
    assert held(net) == ["layers.0.weight", "layers.1.weight", "out.weight"] == [row.path for row in report.rows]
    assert all(row.kind == kind for row in report.rows) and report.after < report.before / 3
    for row in report.rows:
        W, Q = before[row.path], dict(net.named_parameters())[row.path].data.dense()
        assert row.error == pytest.approx(numpy.linalg.norm(Q - W) / numpy.linalg.norm(W), rel=1e-5)
    y = net(IDS).data
    again = quant.dequantize(net)
    assert not held(net) and all(row.error == 0.0 and row.kind == "float32" for row in again.rows)
    numpy.testing.assert_allclose(net(IDS).data, y, rtol=1e-5, atol=1e-6)
    for name, array in net.state_dict().items():  # what is not linear is the same bits
        if name not in [row.path for row in report.rows]:
            assert array.tobytes() == before[name].tobytes()
    assert "3 weights" in str(report) and "bits a weight" in str(report)


def test_what_is_left_as_it_is():
    net = model("lm_head")
    net.tied = nn.Linear(32, 9, bias=False, rng=0)
    net.tied.weight = net.embedding.weight
    net.twin = nn.Linear(32, 48, rng=0)
    net.twin.weight = net.layers[0].weight
    report = quant.quantize(net.requires_grad(False), exclude=["layers.1"])
    assert held(net) == ["layers.0.weight"] and net.twin.weight is net.layers[0].weight
    assert dict(report.left) == {"layers.1": "excluded by 'layers.1'", "lm_head": "output heads stay as they are (lm_head)",
                                 "tied": "shares its weight with embedding"}
    more = quant.quantize(net)
    assert [row.path for row in more.rows] == ["layers.1.weight"] and dict(more.left)["layers.0"] == "held as nf4 already"
    with pytest.raises(StateError, match="held as nf4 already"):
        quant.quantize(net, "int8")
    net = model()
    report = quant.quantize(net, exclude=["layers"])
    assert held(net) == ["out.weight"]


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_16_bits_are_rounded_to_nearest_and_ties_to_even(kind):
    if kind == "bfloat16":
        pytest.importorskip("ml_dtypes")
    W = numpy.random.default_rng(0).normal(size=(8, 100)).astype("float32")
    W[0, :3] = [1.0 + 2.0 ** -8, 1.0 + 3 * 2.0 ** -8, 1.0 + 2.0 ** -8 + 2.0 ** -20]  # two ties of bfloat16, and more than one
    held = quant.stored(W, kind)
    half = 2.0 ** (-9 if kind == "bfloat16" else -12)
    assert (abs(held.dense() - W) <= 2.0 * half * abs(W)).all() and held.kind == kind and held.nbytes == 2 * W.size
    if kind == "bfloat16":
        assert held.dense()[0, :3].tolist() == [1.0, 1.0 + 2.0 ** -6, 1.0 + 2.0 ** -7]
    net = model()
    y = net(IDS).data
    report = quant.quantize(net, kind)
    assert report.bits == 16.0 and abs(net(IDS).data - y).max() < 0.02
    with pytest.raises(StateError, match=f"held as {kind} already"):
        quant.quantize(net, kind)
    W[7, 99] = 1e6 if kind == "float16" else 3.4e38
    with pytest.raises(StateError, match="would be infinite"):
        quant.stored(W, kind)


def test_weights_in_16_bits_can_be_held_in_four():
    net = model()
    net.layers[0].weight.data = quant.Sixteen(net.layers[0].weight.data.astype("float16"))
    quant.quantize(net)
    assert net.layers[0].weight.data.kind == "nf4"


def test_refusals_name_all_layers_and_change_nothing():
    net = model()
    net.layers[0].weight.trainable = net.out.weight.trainable = True
    before = {id(p): p.data for p in net.parameters()}
    with pytest.raises(StateError) as refused:
        quant.quantize(net)
    assert all(name in str(refused.value) for name in ("layers.0.weight", "out.weight", "requires_grad(False)"))
    quant.quantize(model().requires_grad(False), exclude=["out"])
    net.requires_grad(False)
    net.out.weight.data[2, 3] = numpy.nan
    with pytest.raises(StateError, match="^out.weight: a weight with NaN or inf"):
        quant.quantize(net)
    assert all(before[id(p)] is p.data for p in net.parameters())
    for wrong in ({"kind": "int4"}, {"blocksize": 48}, {"exclude": ["lay"]}):
        with pytest.raises(ConfigError):
            quant.quantize(net, **wrong)
    with pytest.raises(DTypeError, match="expected a model"):
        quant.quantize(net.out.weight)
    with pytest.raises(DTypeError, match="expected a model"):
        quant.dequantize(None)
    with pytest.raises(StateError, match="no weight of this Net"):
        quant.dequantize(net)
    with pytest.raises(StateError, match="no linear layer"):
        quant.quantize(nn.LayerNorm(3).requires_grad(False))


def test_an_interrupt_between_two_layers_changes_nothing(monkeypatch):
    net = model()
    before = {id(p): p.data for p in net.parameters()}
    made = []

    def stop(W, *settings, **more):
        made.append(W)
        if len(made) == 3:
            raise KeyboardInterrupt
        return original(W, *settings, **more)

    original = quant.FourBit.of
    monkeypatch.setattr(quant.FourBit, "of", stop)
    with pytest.raises(KeyboardInterrupt):
        quant.quantize(net)
    assert all(before[id(p)] is p.data for p in net.parameters())


def test_adapters_can_come_before_or_after():
    outputs = []
    for first in (True, False):
        net = model()
        if first:
            lora.inject(net, lora.Config(r=2, target_modules="all-linear"), rng=5)
        quant.quantize(net)
        if not first:
            lora.inject(net, lora.Config(r=2, target_modules="all-linear"), rng=5)
        outputs.append(net(IDS).data)
        assert len(held(net)) == 3
        trained = {path for path, p in net.named_parameters() if p.trainable}
        assert len(trained) == 6 and all("lora_" in path for path in trained)
    numpy.testing.assert_array_equal(*outputs)


def test_training_moves_adapters_and_leaves_the_codes():
    net = model()
    quant.quantize(net)
    lora.inject(net, lora.Config(r=4, lora_alpha=8, target_modules=["layers.0", "layers.1"]), rng=5)
    codes = {path: p.data.arrays() for path, p in net.named_parameters() if isinstance(p.data, Stored)}
    before = {path: {name: a.tobytes() for name, a in arrays.items()} for path, arrays in codes.items()}
    adam = minilora.optim.AdamW([p for p in net.parameters() if p.trainable], lr=0.02)
    losses = []
    for _ in range(30):
        adam.zero_grad()
        loss = minilora.ops.cross_entropy(net(IDS), numpy.array([[0, 1, 2], [3, 4, 0]]))
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    assert before == {path: {name: a.tobytes() for name, a in arrays.items()} for path, arrays in codes.items()}


def test_copies_pickles_and_state_dicts():
    net = model()
    quant.quantize(net)
    y = net(IDS).data
    for other in (copy.deepcopy(net.layers[0]), pickle.loads(pickle.dumps(net.layers[0]))):
        x = numpy.random.default_rng(0).normal(size=(2, 32)).astype("float32")
        numpy.testing.assert_array_equal(other(x).data, net.layers[0](x).data)
    state = net.state_dict()
    assert state["layers.0.weight"].dtype == "uint8" and "layers.0.weight.nested_offset" in state
    other = model()
    for p in other.parameters():
        p.data = p.data * 0.5
    quant.quantize(other)
    other.load_state_dict(state)
    numpy.testing.assert_array_equal(other(IDS).data, y)
    with pytest.raises(StateDictError, match="layers.0.weight"):
        model().load_state_dict(state)


def test_merging_is_refused_with_the_gain_that_would_be_left():
    net = model()
    lora.inject(net, lora.Config(r=2, target_modules=["layers.0", "layers.1", "out"]), rng=5)
    rng = numpy.random.default_rng(6)
    for path, p in net.named_parameters():
        if path.endswith("lora_B"):
            p.data[...] = 0.004 * rng.normal(size=p.shape)
    quant.quantize(net, exclude=["out"])
    state = {name: array.tobytes() for name, array in net.state_dict().items()}
    for merging in (lora.merge, lora.bake, lambda net: lora.merge(net, allow_lossy=True), lambda net: net.layers[0].merge()):
        with pytest.raises(StateError) as refused:
            merging(net)
        assert "of the update would be left" in str(refused.value) and "quant.dequantize(model)" in str(refused.value)
    assert state == {name: array.tobytes() for name, array in net.state_dict().items()}
    with pytest.raises(StateError, match="2 layers hold(.|\n)*layers.0: nf4(.|\n)*layers.1: nf4"):
        lora.merge(net)
    y = net(IDS).data
    quant.dequantize(net.eval())
    lora.merge(net)
    numpy.testing.assert_allclose(net(IDS).data, y, rtol=1e-4, atol=1e-5)
    with pytest.raises(StateError, match="lora.unmerge"):
        quant.quantize(net)
    lora.unmerge(net)
    quant.quantize(net)


def test_the_gain_is_that_of_the_definition():
    from minilora.lora.merging.coarse import rounded_back

    W = numpy.random.default_rng(0).normal(size=(64, 256)).astype("float32")
    A, B = (numpy.random.default_rng(i).normal(size=shape).astype("float32") for i, shape in ((1, (4, 256)), (2, (64, 4))))
    gains = {}
    for size in (1e-3, 1e-2, 1e-1):
        s = size * numpy.linalg.norm(W) / numpy.linalg.norm(B @ A)
        Q = quant.FourBit.of(W)
        report = rounded_back(Q, (A, B, s))
        moved = Q.like(Q.dense() + s * B @ A).dense() - Q.dense()
        D = (s * B @ A).astype("float64")
        assert report.gain == pytest.approx((moved * D).sum() / (D * D).sum(), rel=1e-3)
        gains[size] = report.gain
    assert gains[1e-3] < 0.02 and gains[1e-2] < 0.1 and 0.7 < gains[1e-1] < 0.95


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_models_in_other_dtypes(dtype):
    net = model(dtype=dtype)
    quant.quantize(net)
    assert net(IDS).data.dtype == dtype
    assert net.to(dtype="float32")(IDS).data.dtype == "float32" and len(held(net)) == 3
    quant.dequantize(net)
    assert all(p.dtype == "float32" for p in net.parameters())
