"""bake: plain layers with merged weights; and what of an adapter goes into state dicts, or must not be lost by them."""

import copy

import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora import lora, nn
from minilora.errors import ConfigError, StateError
from minilora.lora import Config


class Net(nn.Module):
    """A layer to adapt, a head that is a Sequential and gets looped over, and heads in a list."""

    def __init__(self, rng=0):
        rng = np.random.default_rng(rng)
        self.first = nn.Linear(4, 5, rng=rng)
        self.table = nn.Embedding(7, 4, rng=rng)
        self.head = nn.Sequential(nn.Linear(5, 3, rng=rng), nn.ReLU())
        self.heads = [nn.Linear(3, 3, rng=rng), {"last": nn.Linear(3, 2, rng=rng)}]

    def forward(self, ids):
        x = self.first(self.table(ids))
        for layer in self.head:
            x = layer(x)
        assert len(self.head) == 2 and self.head[1] in list(self.head)
        return self.heads[1]["last"](self.heads[0](x))


IDS = [[1, 2, 3], [4, 5, 6]]
OPTIONS = {
    "plain": {}, "dora": {"use_dora": True}, "saved": {"modules_to_save": ["head"]}, "list": {"modules_to_save": ["heads"]},
    "bias": {"bias": "lora_only"}, "all": {"bias": "all", "modules_to_save": ["head", "heads"]},
}


def trained(option, name="default", model=None, seed=0):
    model = Net() if model is None else model
    lora.inject(model, Config(r=2, target_modules=["first", "table"], **OPTIONS[option]), name, rng=seed)
    rng = np.random.default_rng(seed)
    for p in model.parameters():
        if p.trainable:
            p.data[...] = p.data + place(0.3 * rng.standard_normal(p.shape), p.dtype)
    return model


def outputs(model):
    with minilora.no_grad():
        return fetch(model(IDS))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("already", [False, True])
def test_bake_leaves_plain_layers_with_the_same_outputs(device, option, already):
    model = trained(option)
    model.extra = lora.Linear(3, 3, r=1, rng=0)  # also one that was made, not injected
    y = outputs(model)
    if already:
        merged = lora.merge(model)
    report = lora.bake(model)
    assert {type(m).__module__.split(".")[1] for _, m in model.named_modules() if m is not model} == {"nn"}
    np.testing.assert_allclose(outputs(model), y, rtol=1e-5, atol=1e-5)
    assert [name for name, _ in model.named_parameters()] == [*(name for name, _ in Net().named_parameters()),
                                                              "extra.weight", "extra.bias"]
    assert [row.path for row in report.rows] == ["first", "table", "extra"]
    assert not already or report == merged
    assert not any(p.trainable for path, p in model.named_parameters() if path == "first.weight")
    before = fetch(model.first.weight)
    model.first.weight.data[...] += 1.0  # what a way back had made read-only may be written again
    assert np.array_equal(fetch(model.first.weight), before + 1.0)
    state = model.state_dict()
    model.load_state_dict(state)
    model.to(dtype="float64")
    lora.inject(model, Config(r=1, target_modules=["first"]), rng=0)


def test_bake_of_one_layer_makes_it_plain():
    layer = lora.Linear(4, 3, r=2, fan_in_fan_out=True, rng=0)
    layer.lora_B.data[...] = 1.0
    x = minilora.tensor(np.ones((2, 4), "float32"))
    y = fetch(layer(x))
    lora.bake(layer)
    assert type(layer) is nn.Linear and set(vars(layer)) == set(vars(nn.Linear(4, 3, rng=0)))
    np.testing.assert_allclose(fetch(layer(x)), y, rtol=1e-6)


def test_bake_takes_what_is_merged_and_merges_the_rest():
    model = trained("plain")
    y = outputs(model)
    model.first.merge()
    assert [row.path for row in lora.bake(model).rows] == ["", "table"]
    np.testing.assert_allclose(outputs(model), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spoil, match", [
    (lambda m: lora.activate(m), "no adapter is active"),
    (lambda m: m.table.lora_B.data.fill(np.nan), r"NaN or inf \(found in: lora_B\)"),
    (lambda m: m.table.__setattr__("weight", m.first.weight), "share one weight"),
])
def test_a_bake_that_fails_changes_nothing(spoil, match):
    model = trained("saved")
    spoil(model)
    before = {name: (p, p.data, fetch(p).tobytes()) for name, p in model.named_parameters()}
    with pytest.raises(StateError, match=match):
        lora.bake(model)
    assert type(model.first) is lora.Linear and type(model.head).__name__ == "SavedModule"
    after = {name: (p, p.data, fetch(p).tobytes()) for name, p in model.named_parameters()}
    assert all(after[name][0] is p and after[name][1] is data and after[name][2] == bits
               for name, (p, data, bits) in before.items())


def test_bake_within_a_context_is_refused():
    model = trained("plain")
    with lora.disabled(model), pytest.raises(StateError, match="leave the with block first"):
        lora.bake(model)
    with pytest.raises(StateError, match="no LoRA layer in this Net"):
        lora.bake(Net())


@pytest.mark.parametrize("option", OPTIONS)
def test_the_state_of_a_merged_model_is_that_of_the_merged_base(device, option):
    model = trained(option)
    trained("plain", "idle", model, seed=9)
    lora.activate(model, "default")
    y = outputs(model)
    lora.merge(model)
    state = model.state_dict()
    base = Net(rng=5)
    base.load_state_dict(state)
    np.testing.assert_allclose(outputs(base), y, rtol=1e-5, atol=1e-5)
    lora.unmerge(model)
    assert "first.adapters.default.lora_A" in model.state_dict()


# -- state of an adapter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
def test_a_lora_state_makes_the_same_outputs_in_a_twin(device, option):
    bias = OPTIONS[option].get("bias", "none")
    model, twin = trained(option), trained(option, seed=3)
    lora.load_lora_state_dict(twin, lora.lora_state_dict(model, bias=bias), bias=bias)
    assert outputs(twin).tobytes() == outputs(model).tobytes()


def test_a_saved_list_is_trained():
    model = trained("list")
    assert lora.match(Net(), Config(target_modules=["first"], modules_to_save=["heads"])).saved == ("heads.0", "heads.1.last")
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.trainable} == {"first", "table", "heads"}
    with pytest.raises(ConfigError, match="'head5' matches nothing"):
        lora.match(Net(), Config(target_modules=["first"], modules_to_save=["head5"]))


def test_a_saved_sequential_is_indexed_and_looped_over():
    model = trained("saved")
    assert model.head[0] is model.head.copies["default"][0] and len(model.head) == 2 and bool(model.head)
    with lora.disabled(model):
        assert model.head[0] is model.head.original[0]
    with lora.mixed(model, ["default", "__base__"]), pytest.raises(StateError, match="takes a module in modules_to_save apart"):
        outputs(model)
    with lora.mixed(model, ["__base__", "__base__"]):
        base = Net()
        assert outputs(model).tobytes() == outputs(base).tobytes()
    lora.remove(model, "default")
    model = nn.Sequential(nn.Linear(4, 4, rng=0), nn.Linear(4, 2, rng=0))
    lora.inject(model, Config(target_modules=["0"], modules_to_save=["1"]), rng=0)
    with pytest.raises(TypeError):
        len(model[1])
    assert model[1]


@pytest.mark.parametrize("option", ["dora", "pissa", "olora"])
def test_another_base_below_what_was_taken_from_the_old_one_is_refused(option):
    options = {"use_dora": True} if option == "dora" else {"init_lora_weights": option}
    model, other = Net(), Net(rng=5)
    lora.inject(model, Config(r=2, target_modules=["first"], **options), rng=0)
    before = {name: fetch(p).tobytes() for name, p in model.named_parameters()}
    with pytest.raises(StateError, match="load the base first, then lora.inject") as caught:
        model.load_state_dict(other.state_dict(), strict=False)
    assert caught.value.path == "first" and {name: fetch(p).tobytes() for name, p in model.named_parameters()} == before
    whole = copy.deepcopy(model)
    model.load_state_dict(whole.state_dict())  # one that holds both
    plain = Net()
    lora.inject(plain, Config(r=2, target_modules=["first"]), rng=0)
    plain.load_state_dict(other.state_dict(), strict=False)  # A and B do not depend on the weight
    assert np.array_equal(fetch(plain.first.weight), fetch(other.first.weight))


def test_an_adapter_stays_float32_when_its_model_is_converted():
    model = trained("dora").to(dtype="float16")
    assert model.first.weight.dtype == "float16"
    assert {p.dtype for p in model.first.adapters["default"].parameters()} == {np.dtype("float32")}
    assert outputs(model).dtype == "float16"
    assert model.to(dtype="float64").first.lora_A.dtype == "float64"
