"""Adapters as plain factors: out of a model, into one, combined, and exchanged in place."""
import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora import lora, nn, optim
from minilora.errors import ConfigError, StateDictError, StateError
from minilora.lora import Config, LowRank

RNG = np.random.default_rng(0)
IDS = [[1, 2, 5], [0, 5, 5]]


class Net(nn.Module):
    """One layer of each kind."""

    def __init__(self, dtype="float64"):
        made = dict(dtype=dtype, rng=np.random.default_rng(0))
        self.embed = nn.Embedding(6, 4, **made)
        self.line = nn.Conv1d(4, 4, 3, padding=1, **made)
        self.plane = nn.Conv2d(2, 2, (1, 3), padding=(0, 1), **made)
        self.fc = [nn.Linear(4, 5, **made), nn.Linear(5, 3, bias=False, **made)]

    def forward(self, ids):
        x = self.line(self.embed(ids).transpose(0, 2, 1))
        x = self.plane(x.reshape(2, 2, 2, 3)).reshape(2, 4, 3).transpose(0, 2, 1)
        return self.fc[1](self.fc[0](x))


PATHS = ["embed", "line", "plane", "fc.0", "fc.1"]


def scatter(model, seed=1, std=0.4):
    rng = np.random.default_rng(seed)
    for path, p in model.named_parameters():
        if "adapters" in path and "start" not in path:
            p.data += place((std * rng.standard_normal(p.shape)).astype(p.dtype))
    return model


def adapted(name="default", dtype="float64", seed=1, paths=PATHS, **settings):
    model = Net(dtype)
    lora.inject(model, Config(**{"r": 2, "lora_alpha": 3, "target_modules": list(paths), **settings}), name, rng=seed)
    return scatter(model, seed)


def base_bits(model):
    return {name: fetch(p).tobytes() for name, p in model.named_parameters() if "adapters" not in name}


def picture(model):
    """All that a failure must leave as it is."""
    modules = [(path, id(m), getattr(m, "active", None), getattr(m, "scaling", None)) for path, m in model.named_modules()
               if not hasattr(m, "adapters")]
    modules += [(path, id(m), dict(m.active), list(m.adapters)) for path, m in model.named_modules() if hasattr(m, "adapters")]
    return modules, [(path, id(p), id(p.data), fetch(p).tobytes(), p.trainable) for path, p in model.named_parameters()]


def out(model):
    return fetch(model(IDS))


# -- out and in again ---------------------------------------------------------------------------------------------------


def test_round_trip_keeps_every_bit(device):
    model = adapted(dtype="float32", rank_pattern={"plane": 1}, alpha_pattern={"embed": 7})
    updates = lora.low_rank_updates(model)
    assert list(updates) == PATHS
    assert {path: (D.shape, D.r, D.s) for path, D in updates.items()} == {
        "embed": ((4, 6), 2, 3.5), "line": ((4, 12), 2, 1.5), "plane": ((2, 6), 1, 3.0), "fc.0": ((5, 4), 2, 1.5),
        "fc.1": ((3, 5), 2, 1.5)}
    modules = dict(model.named_modules())
    for path, D in updates.items():
        dense, stored = fetch(D.dense()), fetch(modules[path].delta())
        np.testing.assert_allclose((dense.T if path == "embed" else dense).reshape(stored.shape), stored, rtol=1e-6, atol=1e-6)
    other = Net("float32")
    base = base_bits(other)
    lora.inject_updates(other, updates)
    assert out(other).tobytes() == out(model).tobytes() and base_bits(other) == base
    assert {p.device.name for p in other.parameters()} == {device}
    again = lora.low_rank_updates(other, "default")
    for path, D in updates.items():
        assert (fetch(again[path].A).tobytes(), again[path].s) == (fetch(D.A).tobytes(), D.s)
    given = dict(other.named_modules())["fc.0"].adapter
    assert given.lora_A.data is not updates["fc.0"].A and given.lora_A.trainable and given.config is None
    assert given.lora_alpha == given.scaling * given.r
    assert {name.split(".")[-1] for name, p in other.named_parameters() if p.trainable} == {"lora_A", "lora_B"}


def test_layers_whose_factors_are_stored_otherwise():
    layer = lora.Linear(4, 3, r=2, fan_in_fan_out=True, dtype="float64", rng=0)
    model = scatter(nn.Sequential(layer))
    D = lora.low_rank_updates(model)["0"]
    assert D.shape == (3, 4) and layer.weight.shape == (4, 3)
    np.testing.assert_allclose(D.dense(), layer.delta().T, atol=1e-14)
    conv = scatter(nn.Sequential(lora.Conv1d(4, 6, 2, r=4, groups=2, dtype="float64", rng=0)))
    D = lora.low_rank_updates(conv)["0"]  # of all groups, with zeros between them
    assert (D.r, D.shape) == (4, (6, 4))
    np.testing.assert_allclose(D.dense().reshape(6, 2, 2), conv[0].delta(), atol=1e-14)
    other = nn.Sequential(nn.Conv1d(4, 6, 2, groups=2, dtype="float64"))
    lora.inject_updates(other, {"0": D})
    np.testing.assert_allclose(other[0].delta(), conv[0].delta(), atol=1e-14)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_is_exported_as_an_update_of_twice_the_rank(device, init):
    """The base keeps its bits, in the model that is trained and in the one that receives."""
    paths = ["line", "plane", "fc.0", "fc.1"]
    base = base_bits(Net())
    model = adapted(paths=paths, init_lora_weights=init)
    assert base_bits(model) == base
    updates = lora.low_rank_updates(model)
    assert {path: D.r for path, D in updates.items()} == dict.fromkeys(paths, 4)
    other = Net()
    lora.inject_updates(other, updates, "exported")
    assert base_bits(other) == base
    np.testing.assert_allclose(out(other), out(model), rtol=0, atol=1e-13)
    assert np.abs(out(other) - out(Net())).max() > 0.01


def test_combined_adapters():
    """cat adds up exactly; what it gives is an adapter like any other, beside those that it came from."""
    model = adapted("one")
    lora.inject(model, Config(r=3, lora_alpha=2, target_modules=PATHS), "two", rng=2)
    scatter(model, 2)
    parts = [lora.low_rank_updates(model, name) for name in ("one", "two")]
    lora.activate(model, "one", "two", weights=[0.5, -2.0])
    expected = out(model)
    lora.inject_updates(model, lora.combine_adapters(parts, [0.5, -2.0], method=lora.cat), "both")
    assert model.fc[0].active == {"both": 1.0} and model.fc[0].adapters["both"].r == 5
    np.testing.assert_allclose(out(model), expected, rtol=0, atol=1e-12)
    smaller = {path: done.update for path, done in lora.combine_adapters(parts, [0.5, -2.0], lora.svd, r=5).items()
               if path == "fc.0"}
    lora.inject_updates(model, smaller, "compressed")
    assert [name for name, p in model.named_parameters() if p.trainable] == [
        f"fc.0.adapters.compressed.lora_{x}" for x in "AB"]


def test_updates_are_named_and_refused():
    model = adapted("one")
    lora.inject(model, Config(r=1, target_modules=["fc.0", "line"], use_dora=True), "dora")
    lora.inject(model, Config(r=1, target_modules=["fc.1"], lora_bias=True), "biased")
    with pytest.raises(ConfigError, match="say which adapter: there are 'one', 'dora', 'biased'"):
        lora.low_rank_updates(model)
    with pytest.raises(ConfigError, match=r"'on' \(is 'one' meant\?\)"):
        lora.low_rank_updates(model, "on")
    with pytest.raises(StateError, match=r"'dora' is more than s B A in line \(use_dora\), fc.0 \(use_dora\)"):
        lora.low_rank_updates(model, "dora")
    with pytest.raises(StateError, match=r"fc.1 \(lora_bias\)"):
        lora.low_rank_updates(model, "biased")
    with pytest.raises(ConfigError, match="say which adapter: there are none"):
        lora.low_rank_updates(Net())
    assert lora.low_rank_updates(lora.Linear(3, 2, r=1))[""].shape == (2, 3)


def matrices(n, m, r=2, s=1.0, dtype="float64"):
    return LowRank(RNG.standard_normal((r, m)).astype(dtype), RNG.standard_normal((n, r)).astype(dtype), s)


def test_updates_that_do_not_fit_change_nothing():
    model = adapted("one", paths=["fc.0"])
    before = picture(model)

    def refused(updates, match, name="new", error=StateDictError):
        with pytest.raises(error, match=match):
            lora.inject_updates(model, updates, name)
        assert picture(model) == before

    good = matrices(5, 4)
    with pytest.raises(StateDictError) as caught:
        lora.inject_updates(model, {"fc.0": good, "fc.9": good, "fc.1": good, "line": good, "plane": good, "": good,
                                    "embed": matrices(4, 4), "fc": good}, "new")
    assert str(caught.value).splitlines() == [
        "inject_updates: the updates do not fit this model; nothing was changed:",
        "  fc.9: the model has no such layer",
        "  fc.1: expected D (3, 5), got (5, 4)",
        "  line: expected D (4, 12), got (5, 4)",
        "  plane: expected D (2, 6), got (5, 4)",
        "  (model): adapt: expected one of nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, got Net: only those can be adapted",
        "  embed: expected D (4, 6), got (4, 4)",
        "  fc: the model has no such layer"]
    assert picture(model) == before
    refused({"fc.1": 3, "fc.0": good}, "fc.1: expected a LowRank, got int")
    refused({}, "expected at least one layer", error=ConfigError)
    refused({"fc.0": good}, "an adapter 'one' already", name="one", error=ConfigError)
    refused({"fc.0": good}, "an adapter's name consists of", name="a/b", error=ConfigError)
    model.again = model.fc[1]
    before = picture(model)
    refused({"fc.1": matrices(3, 5), "again": matrices(3, 5)}, "again: this is the layer fc.1")
    lora.merge(model)
    before = picture(model)
    refused({"fc.1": matrices(3, 5)}, r"layers are merged \(fc.0\)", error=StateError)


def test_a_bare_layer_is_no_place_for_updates():
    layer = nn.Linear(4, 3)
    with pytest.raises(StateDictError, match="the model is this layer itself: use lora.adapt"):
        lora.inject_updates(layer, {"": matrices(3, 4)})
    ours = lora.Linear(4, 3, r=1, dtype="float64")
    lora.inject_updates(ours, {"": matrices(3, 4)}, "new")
    assert ours.active == {"new": 1.0}


def test_dtype_and_device_of_the_layer(device):
    with minilora.use("cpu"):
        D = matrices(5, 4, r=3, s=0.1)  # 0.1 times 3 over 3 is not 0.1
    model = Net("float32")
    lora.inject_updates(model, {"fc.0": D})
    adapter = model.fc[0].adapter
    assert (str(adapter.lora_A.dtype), adapter.lora_A.device.name, adapter.scaling) == ("float32", device, 0.1)


# -- exchanging in place ------------------------------------------------------------------------------------------------


def test_hotswap_writes_into_the_arrays(device):
    model, other = adapted("one", dtype="float32"), adapted("other", "float32", seed=5, r=1, lora_alpha=5)
    lora.activate(model, "one")
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    arrays = {name: (p, p.data) for name, p in model.named_parameters()}
    base = base_bits(model)
    lora.hotswap(model, lora.low_rank_updates(other))
    assert all(p is arrays[name][0] and p.data is arrays[name][1] for name, p in model.named_parameters())
    np.testing.assert_allclose(out(model), out(other), rtol=2e-5, atol=2e-6)
    assert base_bits(model) == base
    for adapter in (model.embed.adapter, model.plane.adapter, model.fc[1].adapter):
        assert adapter.scaling == 5.0 and adapter.r == 2 and adapter.lora_alpha == 10.0
        A, B = fetch(adapter.lora_A), fetch(adapter.lora_B)
        assert A[0].any() and not A[1].any() and B[:, 0].any() and not B[:, 1].any()
    optimizer.zero_grad()
    (model(IDS) ** 2).sum().backward()
    optimizer.step()  # it still knows them
    assert fetch(model.fc[1].lora_B)[:, 0].any() and not np.allclose(out(model), out(other), atol=1e-3)


def test_hotswap_there_and_back():
    model = adapted("one")
    lora.inject(model, Config(r=2, target_modules=["fc.0"]), "two")
    lora.activate(model, "one")
    y = out(model)
    before = {path: LowRank(D.A.copy(), D.B.copy(), D.s) for path, D in lora.low_rank_updates(model, "one").items()}
    lora.hotswap(model, {path: -D for path, D in before.items()}, "one")
    assert not np.allclose(out(model), y)
    lora.hotswap(model, before, "one")
    assert out(model).tobytes() == y.tobytes()


def test_hotswap_that_does_not_fit_changes_nothing():
    model = adapted("one", paths=["fc.0", "fc.1", "line"])
    lora.inject(model, Config(r=1, target_modules=["fc.0"], use_dora=True), "dora")
    lora.inject(model, Config(r=1, target_modules=["fc.1"], init_lora_weights="pissa"), "pissa")
    before = picture(model)
    with pytest.raises(StateDictError) as caught:
        lora.hotswap(model, {"fc.0": matrices(5, 4, r=3), "line": matrices(4, 11), "embed": matrices(4, 6)}, "one")
    assert str(caught.value).splitlines() == [
        "hotswap: the updates do not fit adapter 'one'; nothing was changed:",
        "  misfit     fc.0: rank 3 does not fit into rank 2: lora.recompress can lower it",
        "  misfit     line: expected D (4, 12), got (4, 11)",
        "  missing    fc.1",
        "  unexpected embed"]
    for name, updates, match in (("dora", {"fc.0": matrices(5, 4, r=1)}, "this adapter is more than A and B"),
                                 ("pissa", {"fc.1": matrices(3, 5, r=1)}, "this adapter is more than A and B"),
                                 ("pissa", {"fc.1": None}, "more than A and B|expected a LowRank")):
        with pytest.raises(StateDictError, match=match):
            lora.hotswap(model, updates, name)
    with pytest.raises(StateDictError, match="misfit     line: expected a LowRank, got ndarray"):
        lora.hotswap(model, {"fc.0": matrices(5, 4), "fc.1": matrices(3, 5), "line": np.ones((4, 12))}, "one")
    with pytest.raises(ConfigError, match="say which adapter"):
        lora.hotswap(model, {})
    assert picture(model) == before
    lora.activate(model, "one")
    lora.merge(model)
    before = picture(model)
    good = {"fc.0": matrices(5, 4), "fc.1": matrices(3, 5), "line": matrices(4, 12)}
    with pytest.raises(StateError, match=r"adapter 'one' is merged \(line, fc.0, fc.1\): call lora.unmerge"):
        lora.hotswap(model, good, "one")
    assert picture(model) == before
    lora.unmerge(model)
    lora.hotswap(model, good, "one")


def test_what_is_no_low_rank_update_is_left_out_on_request_only():
    model = nn.Sequential(nn.Linear(3, 4, rng=0), nn.Linear(4, 2, rng=1))
    lora.inject(model, lora.Config(r=1, target_modules=["0"], modules_to_save=["1"], bias="lora_only"), rng=0)
    with pytest.raises(StateError, match=r"more than s B A in biases of the base, 1 \(modules_to_save\). With partial=True"):
        lora.low_rank_updates(model)
    assert list(lora.low_rank_updates(model, partial=True)) == ["0"]


@pytest.mark.parametrize("make", [
    lambda: lora.Conv2d(4, 6, 2, r=4, groups=2, rng=0),
    lambda: lora.MergedLinear(5, 12, 2, enable_lora=(True, False, True), rng=0),
    lambda: lora.Embedding(7, 4, r=2, rng=0), lambda: lora.Linear(5, 4, r=2, use_rslora=True, rng=0),
], ids=["groups", "slots", "embedding", "rslora"])
def test_an_adapter_can_be_swapped_for_its_own_updates(make):
    layer = make()
    for p in (layer.lora_A, layer.lora_B):
        p.data[...] = RNG.standard_normal(p.shape)
    A, B, s = fetch(layer.lora_A).copy(), fetch(layer.lora_B).copy(), layer.scaling
    updates = {path: lora.LowRank(D.A.copy(), D.B.copy(), D.s) for path, D in lora.low_rank_updates(layer).items()}
    layer.lora_A.data[...], layer.lora_B.data[...] = 0, 0
    lora.hotswap(layer, updates)
    assert (fetch(layer.lora_A) == A).all() and (fetch(layer.lora_B) == B).all() and layer.scaling == s
    adapter = layer.adapter
    assert lora.scaling(adapter.lora_alpha, adapter.r, adapter.use_rslora) == pytest.approx(s)


@pytest.mark.parametrize("make", [
    lambda: lora.Conv2d(4, 6, 2, r=4, groups=2, rng=0), lambda: lora.MergedLinear(4, 12, 2, enable_lora=(True, True), rng=0),
], ids=["groups", "slots"])
def test_an_update_that_mixes_groups_is_refused(make):
    layer = make()
    D = lora.low_rank_updates(layer)[""]
    mixed = lora.LowRank(D.A, np.ones_like(D.B), D.s)
    with pytest.raises(StateDictError, match="the update mixes the"):
        lora.hotswap(layer, {"": mixed})


def test_paths_do_not_tell_of_copies():
    model = nn.Sequential(nn.Linear(3, 4, rng=0), nn.Linear(4, 2, rng=1))
    lora.inject(model, lora.Config(r=1, target_modules=["0"], modules_to_save=["1"]), "whole", rng=0)
    lora.inject(model, lora.Config(r=1, target_modules=["1"]), "low", rng=0)
    assert list(lora.low_rank_updates(model, "low")) == ["1"]
    assert [row.path for row in lora.status(model).rows] == ["0", "1", "1"]
    other = nn.Sequential(nn.Linear(3, 4, rng=0), nn.Linear(4, 2, rng=1))
    lora.inject_updates(other, lora.low_rank_updates(model, "low"), "low")
    lora.inject_updates(model, lora.low_rank_updates(model, "low"), "again")
    assert list(model[1].original.adapters) == ["low", "again"]
