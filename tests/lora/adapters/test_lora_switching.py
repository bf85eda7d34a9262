"""Which adapters take part: activate, disabled, mixed batches, freeze_A and status."""
import numpy as np
import pytest
from conftest import fetch, place
from tiny_transformers import build, token_ids

import minilora
from minilora import engine, lora, nn, optim, testing
from minilora.errors import ConfigError, DTypeError, ShapeError, StateError
from minilora.lora import Config
from minilora.lora.adapters import switching

RNG = np.random.default_rng(0)

# kind: (a model of one layer called "0", an input with four rows)
KINDS = {
    "Linear": (lambda **o: nn.Linear(3, 4, **o), RNG.standard_normal((4, 3))),
    "Linear, three axes": (lambda **o: nn.Linear(3, 4, bias=False, **o), RNG.standard_normal((4, 2, 3))),
    "Embedding": (lambda **o: nn.Embedding(6, 3, **o), [[1, 5], [5, 2], [0, 1], [1, 1]]),
    "Embedding, one axis": (lambda **o: nn.Embedding(6, 3, padding_idx=2, **o), [1, 5, 5, 2]),
    "Conv1d": (lambda **o: nn.Conv1d(2, 4, 2, stride=2, groups=2, **o), RNG.standard_normal((4, 2, 4))),
    "Conv2d": (lambda **o: nn.Conv2d(2, 3, 2, padding=1, **o), RNG.standard_normal((4, 2, 2, 3))),
}
SECOND = {"plain": {}, "dora": dict(use_dora=True), "lora_bias": dict(lora_bias=True), "pissa": dict(init_lora_weights="pissa")}
PAIRS = [(kind, option) for kind in KINDS for option in SECOND
         if not (option in ("lora_bias", "pissa") and "Embedding" in kind) and not (option == "pissa" and kind == "Conv1d")]
pairs = pytest.mark.parametrize("kind, option", PAIRS, ids=map(", ".join, PAIRS))


def scatter(model, seed=1, std=0.4):
    rng = np.random.default_rng(seed)
    for path, p in model.named_parameters():
        if ("adapters" in path and "start" not in path) or "copies" in path:
            p.data += place((std * rng.standard_normal(p.shape)).astype(p.dtype))
    return model


def make(kind="Linear", option="plain", dtype="float64"):
    """One layer with the adapters "one", of rank 2, and "two", of rank 4 and of another make."""
    model = nn.Sequential(KINDS[kind][0](dtype=dtype, rng=0))
    lora.inject(model, Config(r=2, lora_alpha=3, target_modules=["0"]), "one", rng=1)
    settings = dict(r=2 if option == "pissa" else 4, lora_alpha=2, **SECOND[option])
    lora.inject(model, Config(target_modules=["0"], **settings), "two", rng=2, exact=settings.get("use_dora", False))
    return scatter(model)


def stack(dtype="float64"):
    """Three layers: "one" in 0 and 2, "two" in 1 and 2, and a head that "one" trains as a whole."""
    made = dict(dtype=dtype, rng=np.random.default_rng(0))
    model = nn.Sequential(nn.Linear(3, 4, **made), nn.Linear(4, 4, **made), nn.Linear(4, 3, **made), nn.Linear(3, 2, **made))
    lora.inject(model, Config(r=2, target_modules=["0", "2"], modules_to_save=["3"]), "one", rng=1)
    lora.inject(model, Config(r=1, target_modules=["1", "2"]), "two", rng=2)
    return scatter(model)


def run(model, x):
    ids = isinstance(x, list) or x.dtype.kind == "i"
    return fetch(model(x if ids else minilora.tensor(np.asarray(x))))


def base_of(model, x):
    with lora.disabled(model):
        return run(model, x)


def trained(model):
    return [name for name, p in model.named_parameters() if p.trainable]


def state(model):
    """All that switching must put back."""
    return ([(path, dict(m.active)) for path, m in model.named_modules() if hasattr(m, "adapters")],
            [(path, m.active) for path, m in model.named_modules() if type(m).__name__ == "SavedModule"],
            trained(model), [fetch(p).tobytes() for p in model.parameters()])


# -- activate -----------------------------------------------------------------------------------------------------------


@pairs
def test_updates_of_several_adapters_add_up(device, kind, option):
    model, x = make(kind, option), KINDS[kind][1]
    base = base_of(model, x)
    parts = {}
    for name in ("one", "two"):
        lora.activate(model, name)
        parts[name] = run(model, x) - base
        lora.activate(model, name, weights=[-0.5])
        np.testing.assert_allclose(run(model, x) - base, -0.5 * parts[name], rtol=0, atol=1e-13)
    for names, weights in ((("one", "two"), None), (("two", "one"), [0.25, -2]), (("one", "two"), (0, 1))):
        lora.activate(model, *names, weights=weights)
        total = sum(w * parts[name] for name, w in zip(names, weights or [1, 1]))
        np.testing.assert_allclose(run(model, x) - base, total, rtol=0, atol=1e-13)
    assert np.abs(parts["one"]).max() > 0.01 and np.abs(parts["two"] - parts["one"]).max() > 0.01


def test_what_is_active_is_trained():
    model = stack()
    assert trained(model) == [f"{i}.adapters.two.lora_{x}" for i in (1, 2) for x in "AB"]
    bits = state(model)[-1]
    lora.activate(model, "one", "two")
    assert len(trained(model)) == 10 and trained(model)[-2:] == ["3.copies.one.weight", "3.copies.one.bias"]
    lora.activate(model, "one", trainable=False)
    assert trained(model) == [] and model[3].active == "one"
    lora.activate(model)
    assert trained(model) == [] and model[3].active is None and all(model[i].active == {} for i in range(3))
    x = minilora.tensor(np.ones((2, 3)))
    assert model(x).node is None
    assert state(model)[-1] == bits


def test_only_the_active_adapter_moves():
    """One optimizer for both: what is switched off gets no gradient and no step, and keeps its numbers."""
    model = stack()
    lora.activate(model, "one", "two")
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    for name in ("one", "two", "one"):
        lora.activate(model, name)
        before = {path: fetch(p).tobytes() for path, p in model.named_parameters()}
        optimizer.zero_grad()
        (model(minilora.tensor(np.ones((2, 3)))) ** 2).sum().backward()
        optimizer.step()
        moved = [path for path, p in model.named_parameters() if fetch(p).tobytes() != before[path]]
        assert moved == trained(model) and all(f".{name}." in path for path in moved)


def test_activate_forgets_gradients():
    model = stack()
    model(minilora.tensor(np.ones((2, 3)))).sum().backward()
    lora.activate(model, "one")
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("call, error, match", [
    (lambda m: lora.activate(m, "on"), ConfigError, r"of the name 'on' \(is 'one' meant\?\). There are: 'one', 'two'"),
    (lambda m: lora.activate(m, "one", "twoo", "xyz"), ConfigError, r"'twoo' \(is 'two' meant\?\), 'xyz'"),
    (lambda m: lora.activate(m, "one", "one"), ConfigError, "comes twice"),
    (lambda m: lora.activate(m, "one", weights=[1, 2]), ConfigError, "1 names and 2 weights"),
    (lambda m: lora.activate(m, "one", weights=[np.nan]), ConfigError, r"weights\[0\] must be a finite number, got nan"),
    (lambda m: lora.activate(m, "one", weights=["1"]), ConfigError, r"weights\[0\]"),
    (lambda m: lora.activate(nn.Linear(2, 2), "one"), ConfigError, "Linear has no adapters: put some in with lora.inject"),
    (lambda m: lora.mixed(m, ["one", "tow"]).__enter__(), ConfigError, r"'tow' \(is 'two' meant\?\)"),
    (lambda m: lora.mixed(m, "one").__enter__(), ConfigError, "expected a list with a name for each row, got 'one'"),
    (lambda m: lora.freeze_A(m, "tree"), ConfigError, "no adapter of the name 'tree'"),
])
def test_refused(call, error, match):
    model = stack()
    before = state(model)
    with pytest.raises(error, match=match):
        call(model)
    assert state(model) == before


def test_merged_layers_are_refused():
    model = stack()
    lora.merge(model)
    before = state(model)
    for call in (lambda: lora.activate(model, "one"), lambda: lora.disabled(model).__enter__(),
                 lambda: lora.mixed(model, ["one"]).__enter__()):
        with pytest.raises(StateError, match=r"layers are merged \(1, 2\).*Call lora.unmerge.model. first"):
            call()
        assert state(model) == before


# -- disabled -----------------------------------------------------------------------------------------------------------


@pairs
def test_disabled_is_the_base_bit_for_bit(device, kind, option):
    model, x = make(kind, option), KINDS[kind][1]
    base = KINDS[kind][0](dtype="float64", rng=0)
    expected = run(base, x).tobytes()
    for names in (["one"], ["two"], ["one", "two"], []):
        lora.activate(model, *names)
        before = state(model)
        with lora.disabled(model):
            assert base_of(model, x).tobytes() == run(model, x).tobytes() == expected  # also one within the other
        assert state(model) == before


def test_disabled_ends_with_an_error_too():
    model = stack()
    lora.activate(model, "one", weights=[0.5])
    before = state(model)
    with pytest.raises(ZeroDivisionError):
        with lora.disabled(model):
            with lora.disabled(model):
                1 / 0
    assert state(model) == before
    with pytest.raises(ZeroDivisionError):
        with lora.mixed(model, ["one"]), lora.disabled(model), lora.mixed(model, ["two"]):
            1 / 0
    assert state(model) == before


def test_the_innermost_of_disabled_and_mixed_counts():
    model, x = stack(), np.ones((2, 3))
    base = base_of(model, x)
    with lora.mixed(model, ["one", "two"]):
        y = run(model, x)
        with lora.disabled(model):
            assert run(model, x).tobytes() == base.tobytes()
            with lora.mixed(model, ["one", "two"]):
                assert run(model, x).tobytes() == y.tobytes()
                with lora.mixed(model, ["two", "one"]):
                    assert np.array_equal(run(model, x[::-1]), run(model, x)) and not np.array_equal(run(model, x), y)
                assert run(model, x).tobytes() == y.tobytes()
            assert run(model, x).tobytes() == base.tobytes()
        assert run(model, x).tobytes() == y.tobytes()
    assert not np.array_equal(y, base)


# -- mixed batches ------------------------------------------------------------------------------------------------------

NAMES = ["two", "__base__", "one", "two"]


@pairs
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_mixed_batch_is_its_rows_one_by_one(device, kind, option, training):
    model, x = make(kind, option).train(training), KINDS[kind][1]
    base = base_of(model, x)
    with lora.mixed(model, adapter_names=NAMES):
        y = run(model, x)
        assert run(model, x).tobytes() == y.tobytes()
    with lora.mixed(model, adapter_names=["__base__"] * 4):
        assert run(model, x).tobytes() == base.tobytes()
    assert y[1].tobytes() == base[1].tobytes()
    for i, name in enumerate(NAMES):
        lora.activate(model, *[name] if name != "__base__" else [])
        np.testing.assert_allclose(y[i], run(model, x[i:i + 1])[0], rtol=0, atol=1e-13, err_msg=f"{i}: {name}")
    assert np.abs(y - base)[[0, 2, 3]].max(axis=tuple(range(1, y.ndim))).min() > 0.01


@pytest.mark.parametrize("option", ["plain", "dora", "lora_bias"])
@pytest.mark.parametrize("kind", ["Linear, three axes", "Embedding", "Conv2d"])
def test_gradients_of_a_mixed_batch(kind, option):
    """By the complex step; and each adapter's are the sum of those of its rows."""
    if "Embedding" in kind and option == "lora_bias":
        return
    model, x = make(kind, option), KINDS[kind][1]
    lora.activate(model, "one", "two")
    with lora.mixed(model, NAMES):
        if isinstance(x, list):
            report = testing.gradcheck(lambda: model(x), parameters=model.named_parameters())
        else:
            report = testing.gradcheck(model, x, parameters=model.named_parameters())
        assert max(row.error for row in report.check().rows) < 1e-9
        y = model(x if isinstance(x, list) else minilora.tensor(x))
        dy = np.random.default_rng(9).standard_normal(y.shape)
        y.backward(dy)
    found = {path: p.grad for path, p in model.named_parameters() if p.trainable}
    for name in ("one", "two"):
        lora.activate(model, name)
        for i in (i for i, other in enumerate(NAMES) if other == name):
            row = x[i:i + 1] if isinstance(x, list) else minilora.tensor(x[i:i + 1])
            model(row).backward(dy[i:i + 1])
        for path in trained(model):
            expected = dict(model.named_parameters())[path].grad
            np.testing.assert_allclose(found[path], expected, rtol=0, atol=1e-12 * max(1, np.abs(expected).max()), err_msg=path)


def test_a_mixed_batch_through_several_layers(device):
    """Layers that lack an adapter do nothing for its rows; a copy of a module serves its own."""
    model, x = stack().eval(), RNG.standard_normal((5, 2, 3))
    names = ["one", "two", "__base__", "two", "one"]
    with lora.mixed(model, names):
        y = run(model, x)
    base = base_of(model, x)
    assert y[2].tobytes() == base[2].tobytes()
    for i, name in enumerate(names):
        lora.activate(model, *[name] if name != "__base__" else [])
        np.testing.assert_allclose(y[i], run(model, x[i:i + 1])[0], rtol=0, atol=1e-13)
    for active in ([], ["one"], ["two"]):  # what is active does not matter
        lora.activate(model, *active)
        with lora.mixed(model, names):
            assert run(model, x).tobytes() == y.tobytes()
        with lora.mixed(model, ["__base__"] * 5):
            assert run(model, x).tobytes() == base.tobytes()


def test_a_mixed_batch_through_layers_of_other_axes():
    class Image(nn.Module):
        def __init__(self):
            made = dict(dtype="float64", rng=np.random.default_rng(0))
            self.conv, self.fc = nn.Conv2d(1, 2, 2, **made), nn.Linear(8, 3, **made)

        def forward(self, x):
            return self.fc(self.conv(x).reshape(len(x), 8))

    model, x, names = Image(), RNG.standard_normal((3, 1, 3, 3)), ["two", "one", "one"]
    for name in ("one", "two"):
        lora.inject(model, Config(r=1, target_modules=["conv", "fc"]), name, rng=0)
    scatter(model)
    with lora.mixed(model, names):
        y = run(model, x)
    for i, name in enumerate(names):
        lora.activate(model, name)
        np.testing.assert_allclose(y[i], run(model, x[i:i + 1])[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("settings", [dict(target_modules=["wte", "c_attn"]), dict(target_modules=["wte"], use_dora=True),
                                      dict(target_modules=["c_fc"], modules_to_save=["wte"])], ids=["lora", "dora", "saved"])
def test_a_mixed_batch_through_a_tied_head(settings):
    model, ids = build("gpt2").eval(), token_ids(3, 4)
    for name, r in (("one", 2), ("two", 3)):
        lora.inject(model, Config(r=r, **settings), name, rng=0)
    scatter(model)
    names = ["two", "__base__", "one"]
    with lora.mixed(model, names):
        y = fetch(model(ids))
    for i, name in enumerate(names):
        lora.activate(model, *[name] if name != "__base__" else [])
        np.testing.assert_allclose(y[i], fetch(model(ids[i:i + 1]))[0], rtol=0, atol=1e-12, err_msg=name)


def test_wrong_number_of_names():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3, rng=0)), nn.Linear(3, 2, rng=0))
    lora.inject(model, Config(r=1, target_modules=["0.0"]), "one")
    x = minilora.tensor(np.ones((3, 3), "float32"))
    with lora.mixed(model, ["one", "one"]):
        with pytest.raises(ShapeError, match="^0.0: adapter_names has 2 names, but this layer's input .3, 3. has 3 rows"):
            model(x)
    lora.remove(model, "one")
    lora.inject(model, Config(r=1, target_modules=["0.0"], modules_to_save=["1"]), "one")
    model[0] = nn.Linear(3, 3)
    with lora.mixed(model, ["one", "one"]):
        with pytest.raises(ShapeError, match="^1: adapter_names has 2 names"):
            model(x)
    layer = lora.Embedding(4, 2, r=1)
    with lora.mixed(layer, ["default"]):
        with pytest.raises(ShapeError, match="has no rows on its first axis"):
            layer(3)


def test_an_input_of_one_row_is_that_of_every_name():
    """A table of positions: with an adapter on it, each request gets its own positions."""
    model, ids = build("gpt2").eval(), token_ids(3, 5)
    for name, settings in (("one", dict(target_modules=["wpe", "c_attn"])),
                           ("two", dict(target_modules=["wpe"], use_dora=True)),
                           ("whole", dict(target_modules=["c_fc"], modules_to_save=["wpe"]))):
        if name == "whole":  # a module is adapted or trained as a whole, not both
            lora.remove(model, "one"), lora.remove(model, "two")
        lora.inject(model, Config(r=2, **settings), name, rng=0)
        scatter(model)
        for names in (["one", "two", "__base__"], ["two", "two", "one"], ["whole", "__base__", "whole"], ["__base__"] * 3):
            if set(names) - {"__base__", *switching.adapter_names(model)}:
                continue
            with lora.mixed(model, names):
                y = fetch(model(ids))
            for i, row in enumerate(names):
                lora.activate(model, *[row] if row != "__base__" else [])
                np.testing.assert_allclose(y[i], fetch(model(ids[i:i + 1]))[0], rtol=0, atol=1e-12, err_msg=str((names, i)))


def test_gradients_of_an_input_of_one_row():
    for option in ("plain", "dora"):
        model = make("Embedding", option)
        lora.activate(model, "one", "two")
        with lora.mixed(model, ["two", "__base__", "one", "two"]):
            assert model([[1, 5, 0]]).shape == (4, 3, 3)
            report = testing.gradcheck(lambda: model([[1, 5, 0]]), parameters=model.named_parameters())
        assert max(row.error for row in report.check().rows) < 1e-9


def test_the_advice_for_a_table_of_positions_works():
    class Text(nn.Module):
        def __init__(self, one_row):
            made = dict(dtype="float64", rng=np.random.default_rng(0))
            self.words, self.places, self.one_row = nn.Embedding(7, 3, **made), nn.Embedding(5, 3, **made), one_row

        def forward(self, ids):
            positions = np.arange(len(ids[0]))
            return self.words(ids) + self.places(positions[None] if self.one_row else positions)

    ids = token_ids(2, 4) % 7
    for one_row in (False, True):
        model = Text(one_row)
        lora.inject(model, Config(r=1, target_modules=["words", "places"]), "one", rng=0)
        scatter(model)
        with lora.mixed(model, ["one", "__base__"]):
            if one_row:
                y = fetch(model(ids))
            else:
                with pytest.raises(ShapeError, match=r"^places: .*same for the whole batch, such as pos.*one row: x\[None\]"):
                    model(ids)
    np.testing.assert_allclose(y[0], fetch(model(ids))[0], rtol=0, atol=1e-14)
    assert y[1].tobytes() == base_of(model, ids)[1].tobytes()


def test_update_alone_in_a_mixed_batch():
    model, x = stack(), minilora.tensor(RNG.standard_normal((2, 3)))
    with lora.mixed(model, ["__base__", "one"]), pytest.raises(StateError, match="rows of a mixed batch have different"):
        model[0].update(x)
    with lora.disabled(model), pytest.raises(StateError, match="switched off within lora.disabled"):
        model[0].update(x)


def test_what_is_wrong_with_one_adapter_stays_in_its_rows(device):
    model, x = stack(), minilora.tensor(RNG.standard_normal((3, 3)))
    for name, p in model.named_parameters():
        if ".two.lora_A" in name:
            p.data[...] = np.inf
    with lora.mixed(model, ["one", "two", "__base__"]), np.errstate(all="ignore"):
        y = fetch(model(x))
    assert np.isfinite(y[[0, 2]]).all() and not np.isfinite(y[1]).all()


def test_activate_within_disabled_holds_afterwards():
    model, x = stack(), minilora.tensor(RNG.standard_normal((2, 3)))
    lora.activate(model, "two")
    expected = fetch(model(x))
    lora.activate(model, "one")
    with lora.disabled(model):
        base = fetch(model(x))
        lora.activate(model, "two")
        assert fetch(model(x)).tobytes() == base.tobytes()
    assert fetch(model(x)).tobytes() == expected.tobytes()
    assert all(p.trainable == (".two." in name) for name, p in model.named_parameters())


def test_a_saved_module_in_a_mixed_batch_gives_rows():
    class Pair(nn.Module):
        def __init__(self):
            self.linear = nn.Linear(2, 2, rng=0)

        def forward(self, x):
            return x, x

    model = nn.Sequential(nn.Linear(2, 2, rng=0), Pair())
    lora.inject(model, Config(r=1, target_modules=["0"], modules_to_save=["1"]), "one")
    x = minilora.tensor(np.ones((1, 2), "float32"))
    with lora.mixed(model, ["__base__"]):
        model(x)  # no copy is concerned
    with lora.mixed(model, ["one"]):
        with pytest.raises(StateError, match="^1: .*must give one tensor with a first axis of rows, got tuple"):
            model(x)


# -- LoRA-FA ------------------------------------------------------------------------------------------------------------


def test_frozen_A_keeps_z_alone():
    """N r numbers in place of N (in + r); and no gradient of A is computed."""
    model, x = make(dtype="float32"), minilora.tensor(np.ones((10, 3), "float32"))
    lora.activate(model, "one")
    assert engine.ledger(model(x)).nbytes == 4 * (10 * 3 + 10 * 2)
    assert lora.freeze_A(model) == ["0"]
    y = model(x)
    assert engine.ledger(y).nbytes == 4 * 10 * 2
    y.sum().backward()
    adapter = model[0].adapter
    assert adapter.lora_A.grad is None and adapter.lora_B.grad.any()
    assert trained(model) == ["0.adapters.one.lora_B"]


def test_frozen_A_stays_frozen():
    model = stack()
    lora.activate(model, "one", "two")
    assert lora.freeze_A(model, "one") == ["0", "2"]
    ends = [name[-10:] for name in trained(model) if "adapters" in name]
    assert ends == ["one.lora_B", "two.lora_A", "two.lora_B", "one.lora_B", "two.lora_A", "two.lora_B"]
    lora.activate(model, "two")
    lora.activate(model, "one")
    assert [name for name in trained(model) if "adapters" in name] == ["0.adapters.one.lora_B", "2.adapters.one.lora_B"]


def test_an_embedding_is_left_out_of_freeze_A():
    """There A starts at 0: with A frozen the update would be 0 for ever."""
    model = nn.Sequential(nn.Embedding(5, 3, rng=0), nn.Linear(3, 2, rng=0))
    lora.inject(model, Config(r=2, target_modules=["0", "1"]), rng=0)
    assert lora.freeze_A(model) == ["1"]
    assert trained(model) == ["0.adapters.default.lora_A", "0.adapters.default.lora_B", "1.adapters.default.lora_B"]


# -- status -------------------------------------------------------------------------------------------------------------


def test_status():
    model = stack()
    lora.activate(model, "one", "two", weights=[1, 0.5])
    status = lora.status(model)
    assert status.rows[2] == ("2", "Linear", {"one": 2, "two": 1}, {"one": 1.0, "two": 0.5}, False)
    assert str(status) == """\
layer  type    adapters              active          merged
-----------------------------------------------------------
0      Linear  one (r=2)             one             no
1      Linear  two (r=1)             0.5 x two       no
2      Linear  one (r=2), two (r=1)  one, 0.5 x two  no
3      Linear  one                   one             no
trained: 51 of 110 numbers"""
    lora.activate(model, "two")
    lora.merge(model, allow_lossy=True)
    assert [row.merged for row in lora.status(model).rows] == [False, True, True, False]
    row = str(lora.status(lora.Linear(2, 2, r=1))).splitlines()[2]
    assert row.split() == ["(model)", "Linear", "default", "(r=1)", "default", "no"]
    assert lora.status(nn.Linear(2, 2)) == ((), 6, 6)


@pytest.mark.parametrize("change", [
    lambda model: lora.merge(model), lambda model: lora.remove(model, "one"),
    lambda model: lora.inject(model, lora.Config(r=1, target_modules=["0"]), "three"),
    lambda model: lora.inject_updates(model, {"0": lora.LowRank(np.ones((1, 3)), np.ones((3, 1)))}, "three"),
], ids=["merge", "remove", "inject", "inject_updates"])
def test_a_model_is_not_changed_within_a_context(change):
    model = stack()
    before = {name: a.tobytes() for name, a in model.state_dict().items()}
    for context in (lora.disabled(model), lora.mixed(model, ["one"])):
        with context, pytest.raises(StateError, match="not within lora.disabled or lora.mixed"):
            change(model)
    assert {name: a.tobytes() for name, a in model.state_dict().items()} == before


@pytest.mark.parametrize("call, error, match", [
    (lambda: lora.activate(nn.Linear(2, 2), "a"), ConfigError, "Linear has no adapters: put some in with lora.inject"),
    (lambda: lora.activate(nn.Linear(2, 2)), ConfigError, "has no adapters"),
    (lambda: lora.activate(None, "a"), DTypeError, "expected a model, got NoneType"),
    (lambda: lora.activate(stack(), ["one"]), ConfigError, "expected names of adapters"),
    (lambda: lora.activate(stack(), "one", weights=1.0), ConfigError, "weights is a list with one number for each name"),
    (lambda: lora.mixed(stack(), None).__enter__(), ConfigError, "expected a list with a name for each row, got None"),
    (lambda: lora.mixed(stack(), [["one"]]).__enter__(), ConfigError, "expected names of adapters"),
    (lambda: lora.inject(stack(), 8), DTypeError, "expected a lora.Config, got int"),
    (lambda: lora.inject(stack(), lora.Config(target_modules=["0"]), "new", exact=True), ConfigError, "exact: says how"),
    (lambda: lora.Linear(3, 3, 2, exact=True), ConfigError, "exact: says how"),
    (lambda: lora.Linear(3, 3, 2, use_dorra=True), ConfigError, r"no option 'use_dorra' \(is 'use_dora' meant\?\)"),
], ids=range(11))
def test_what_is_no_model_and_no_name(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_freeze_A_holds_against_loralibs_call_and_names_each_layer_once():
    model = nn.Sequential(nn.Linear(3, 3, rng=0))
    lora.inject(model, lora.Config(r=1, target_modules=["0"]), rng=0)
    assert lora.freeze_A(model) == ["0"]
    assert lora.mark_only_lora_as_trainable(model) == ["0.lora_B"]
    lora.inject(model, lora.Config(r=1, target_modules=["0"]), "other", rng=0)
    assert lora.freeze_A(model) == ["0"]


def test_one_adapter_stays_as_it_is_beside_one_that_trains():
    model = nn.Sequential(nn.Linear(4, 4, rng=0), nn.Linear(4, 2, rng=1))
    for name in ("old", "new"):
        lora.inject(model, Config(r=2, target_modules=["0"], modules_to_save=["1"] if name == "new" else None), name, rng=0)
    lora.activate(model, "old", "new", trainable=["new"])
    assert set(model[0].active) == {"old", "new"}
    assert {path for path, p in model.named_parameters() if p.trainable} == {
        "0.adapters.new.lora_A", "0.adapters.new.lora_B", "1.copies.new.weight", "1.copies.new.bias"}
    lora.activate(model, "old", "new", trainable=["old"])
    assert {path for path, p in model.named_parameters() if p.trainable} == {"0.adapters.old.lora_A", "0.adapters.old.lora_B"}
    for wrong in (["other"], "new", 1):
        with pytest.raises(ConfigError, match="trainable is True, False or a list of some of the names"):
            lora.activate(model, "old", "new", trainable=wrong)


def test_bias_of_the_base_is_trained_only_with_its_adapter():
    model = nn.Sequential(nn.Linear(4, 4, rng=0), nn.Linear(4, 2, rng=1))
    lora.inject(model, Config(r=1, target_modules=["0"], bias="all"), "biased", rng=0)
    lora.inject(model, Config(r=1, target_modules=["0"]), "plain", rng=0)
    lora.activate(model, "biased", "plain", trainable=["plain"])
    assert not any(p.trainable for path, p in model.named_parameters() if path.endswith("bias"))
    lora.activate(model, "biased", "plain", trainable=["biased"])
    assert model[0].bias.trainable and model[1].bias.trainable
