"""LoftQ: base and adapter chosen together, so that their sum is near the weight."""

import numpy
import pytest

from minilora import lora, nn, quant
from minilora.errors import ConfigError, FormatError, StateError
from minilora.lora.layers.loftq import begin
from minilora.stored import Stored


def weight(*shape, seed=0):
    return numpy.random.default_rng(seed).normal(size=shape).astype("float32")


def rest(W, begun, s):
    return W.astype("float64") - begun.base.dense() - s * begun.B @ begun.A


@pytest.mark.parametrize("s", [1.0, 2.0, 0.25, -3.0])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_is_left_is_what_the_decomposition_says(kind, s):
    W = weight(48, 64)
    begun = begin(W, 6, s, kind)
    sigma = numpy.linalg.svd(W - begun.base.dense().astype("float64"), compute_uv=False)
    left = numpy.linalg.norm(rest(W, begun, s))
    assert left == pytest.approx(numpy.sqrt((sigma[6:] ** 2).sum()), rel=1e-9)
    assert begun.rests[1] == pytest.approx(left / numpy.linalg.norm(W), rel=1e-6)
    balance = numpy.linalg.norm(begun.A, axis=1) / numpy.linalg.norm(begun.B, axis=0)
    numpy.testing.assert_allclose(balance, 1.0, rtol=1e-6)


@pytest.mark.parametrize("s", [1.0, 4.0])
def test_the_rest_falls_from_turn_to_turn_and_is_never_more_than_qloras(s):
    """A trained weight has large directions beside its noise; then further turns help."""
    for seed in range(3):
        W = weight(96, 128, seed=seed) + 3.0 * weight(96, 4, seed=9) @ weight(4, 128, seed=8) / 2.0
        begun = begin(W, 8, s, "nf4", 6)
        qlora, *turns = begun.rests
        assert qlora == pytest.approx(numpy.linalg.norm(W - quant.stored(W).dense()) / numpy.linalg.norm(W), rel=1e-6)
        assert max(turns) < qlora and len(turns) == 6
        assert turns[1] < turns[0] and turns[3] < turns[1] and begun.rests[begun.turn] == min(turns)
        assert numpy.linalg.norm(rest(W, begun, s)) / numpy.linalg.norm(W) == pytest.approx(min(turns), rel=1e-6)


def test_large_weights_are_decomposed_by_random_projections(monkeypatch):
    W = weight(80, 96)
    exact = begin(W, 8, 1.0, "nf4", 2)
    monkeypatch.setattr("minilora.lora.layers.loftq.EXACT", 10)
    near = begin(W, 8, 1.0, "nf4", 2)
    assert near.rests[0] == exact.rests[0] and exact.rests[1] <= near.rests[1] < near.rests[0]
    assert near.rests[1] == pytest.approx(exact.rests[1], rel=0.01)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"fan_in_fan_out": True}], ids=str)
def test_a_layer_begins_near_the_exact_one(options):
    layers = {}
    for init in (True, "loftq"):
        layer = lora.Linear(64, 48, r=8, lora_alpha=16, rng=0, init_lora_weights=init,
                            **({"loftq_config": {"loftq_iter": 3}} if init == "loftq" else {}), **options)
        layers[init] = layer
    exact, begun = layers[True], layers["loftq"]
    assert begun.weight.data.kind == "nf4" and not isinstance(exact.weight.data, Stored) and begun.adapter.begun is None
    x = weight(20, 64, seed=4)
    y = exact(x).data
    quant.quantize(exact)
    assert numpy.linalg.norm(begun(x).data - y) < 0.97 * numpy.linalg.norm(exact(x).data - y)
    assert begun.lora_A.trainable and begun.lora_B.trainable and not begun.weight.trainable
    if "use_dora" in options:
        numpy.testing.assert_allclose(begun.rho(begun.adapter).data, 1.0, rtol=1e-6)


def net():
    return nn.Sequential(nn.Linear(64, 96, rng=0), nn.GELU(), nn.Linear(96, 32, rng=1), nn.Linear(32, 3, rng=2))


CONFIG = lora.Config(r=4, lora_alpha=8, target_modules=["0", "2"], init_lora_weights="loftq", loftq_config={"loftq_iter": 2})


def test_injecting_quantises_what_is_adapted_and_says_how_near_it_is(tmp_path):
    model = net()
    report = lora.inject(model, CONFIG, rng=3)
    assert "loftq" in str(report) and "turn" in str(report)
    kinds = [getattr(model[i].weight.data, "kind", "dense") for i in (0, 2, 3)]
    assert kinds == ["nf4", "nf4", "dense"]
    assert [row.path for row in quant.quantize(model).rows] == ["3.weight"]
    # an ordinary adapter of that base from now on
    config = model[0].adapter.config
    assert config.init_lora_weights is True and not config.loftq_config and config.r == 4
    state = model.state_dict()
    other = net().requires_grad(False)
    quant.quantize(other)
    lora.inject(other, config, rng=5)
    other.load_state_dict(state)
    x = weight(5, 64)
    numpy.testing.assert_array_equal(other(x).data, model(x).data)


def test_all_of_it_or_nothing():
    model = net()
    before = {path: p.data for path, p in model.named_parameters()}
    model[2].weight.data[3, 3] = numpy.inf
    with pytest.raises(StateError, match="^2: "):
        lora.inject(model, CONFIG, rng=3)
    assert all(before[path] is p.data for path, p in model.named_parameters())
    model = net()
    lora.inject(model, lora.Config(r=2, target_modules=["0"]), rng=1)
    with pytest.raises(ConfigError, match="it can only be the first"):
        lora.inject(model, CONFIG, "second", rng=3)
    model = net().requires_grad(False)
    quant.quantize(model)
    with pytest.raises(StateError, match="held as nf4 already"):
        lora.inject(model, CONFIG, rng=3)
    model = net()
    model[3] = nn.Linear(64, 96, rng=0)
    model[3].weight = model[0].weight
    with pytest.raises(ConfigError, match="which other layers share: 0"):
        lora.inject(model, CONFIG, rng=3)
    assert not isinstance(model[0].weight.data, Stored)


def test_what_cannot_begin_so():
    for layer in (nn.Embedding(9, 8, rng=0), nn.Conv1d(8, 8, 3, rng=0)):
        with pytest.raises(ConfigError, match="loftq"):
            lora.adapt(layer, 2, init_lora_weights="loftq", rng=0)
    for options in ({"on_output": True}, {"enable_lora": (True, False)}, {"lora_bias": True}):
        with pytest.raises(ConfigError):
            lora.adapt(nn.Linear(8, 8, rng=0), 2, init_lora_weights="loftq", rng=0, **options)
    with pytest.raises(ConfigError, match="r is at most"):
        lora.adapt(nn.Linear(8, 8, rng=0), 9, init_lora_weights="loftq", rng=0)
    for wrong in ({"loftq_bits": 3}, {"loftq_bits": True}, {"loftq_iter": 0}, {"loftq_iter": 1.5}, {"bits": 4}, [4]):
        with pytest.raises(ConfigError, match="loftq_config"):
            lora.Config(target_modules=["q"], init_lora_weights="loftq", loftq_config=wrong)


def test_the_config_is_pefts():
    config = lora.Config(target_modules=["q"], init_lora_weights="loftq", loftq_config={"loftq_bits": 8, "loftq_iter": 5})
    assert lora.Config.from_dict(config.to_dict()) == config and config.to_dict()["loftq_config"]["loftq_bits"] == 8
    assert lora.Config(target_modules=["q"]).to_dict()["loftq_config"] == {}
    # a file of PEFT's whose start was set to true, as its documentation advises, may still say how it began
    assert lora.Config.from_dict({"target_modules": ["q"], "loftq_config": {"loftq_iter": 5}}).init_lora_weights is True
    assert lora.Config.from_dict({"target_modules": ["q"], "loftq_config": None}).loftq_config == {}
    layer = lora.adapt(nn.Linear(40, 30, rng=0), 4, init_lora_weights="loftq", loftq_config={"loftq_bits": 8}, rng=1)
    assert layer.weight.data.kind == "int8"


def test_a_file_that_began_so_is_refused_with_the_way_out(tmp_path):
    import json

    from minilora.formats.adapters.peft.settings import read_settings

    with pytest.raises(FormatError, match="a quantised base of its own"):
        read_settings(tmp_path, json.loads(json.dumps(CONFIG.to_dict())))
