"""lora.inject and lora.remove: what they replace, what is trained then, and that a failure changes nothing."""
import typing

import numpy as np
import pytest
from conftest import fetch, place
from tiny_transformers import build, token_ids

import minilora
from minilora import lora, nn, no_grad, ops, optim
from minilora.errors import ConfigError, DTypeError, StateError
from minilora.lora import Config
from minilora.lora.layers.saved import SavedModule


class Net(nn.Module):
    """Layers as attributes, in a list, a tuple, a dict, and one of them at a second place."""

    def __init__(self, dtype="float32"):
        made = dict(dtype=dtype, rng=np.random.default_rng(0))
        self.embed = nn.Embedding(7, 4, **made)
        self.conv = nn.Conv1d(4, 4, 3, padding=1, **made)
        self.norm = nn.LayerNorm(4, dtype=dtype)
        self.blocks = [nn.Linear(4, 4, **made), nn.Linear(4, 4, **made)]
        self.pair = (nn.Linear(4, 4, **made), nn.Tanh())
        self.named = {"up": nn.Linear(4, 6, **made), "down": nn.Linear(6, 4, bias=False, **made)}
        self.again = self.blocks[0]
        self.head = nn.Linear(4, 3, **made)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.conv(x.transpose(0, 2, 1)).transpose(0, 2, 1)
        for block in self.blocks:
            x = ops.tanh(block(self.norm(x)))
        x = self.pair[1](self.pair[0](x))
        x = self.named["down"](self.named["up"](x)) + self.again(x)
        return self.head(x)


IDS = [[1, 2, 3, 0], [6, 5, 4, 4]]
PLACES = ["embed", "conv", "blocks.0", "blocks.1", "pair.0", "named.up", "named.down", "head"]


def config(*names, **settings):
    return Config(**{"r": 2, "lora_alpha": 4, "target_modules": list(names), **settings})


def picture(model):
    """All that must not change: every module by identity, every number, and what is trained."""
    return ([(path, id(m)) for path, m in model.named_modules()], [vars(m).keys() for _, m in model.named_modules()],
            [(path, id(p), fetch(p).tobytes(), p.trainable) for path, p in model.named_parameters()])


def trained(model):
    return [name for name, p in model.named_parameters() if p.trainable]


def scatter(model, name, seed=1, std=0.3):
    rng = np.random.default_rng(seed)
    for path, p in model.named_parameters():
        if f"adapters.{name}." in path or f"copies.{name}." in path:
            p.data += place((std * rng.standard_normal(p.shape)).astype(p.dtype))


def bits(model, *args):
    return fetch(model(*args)).tobytes()


# -- putting adapters in ------------------------------------------------------------------------------------------------


def test_layers_are_replaced_wherever_they_stand(device):
    model = Net()
    old, parameters, y = dict(model.named_modules()), dict(model.named_parameters()), bits(model, IDS)
    report = lora.inject(model, config(*PLACES), rng=0)
    new = dict(model.named_modules())
    assert [target.path for target in report.matched.targets] == PLACES
    for path in PLACES:
        assert type(new[path]) is getattr(lora, type(old[path]).__name__)
        assert new[path].weight is parameters[f"{path}.weight"]  # the same Parameter, not only the same numbers
    assert new["again"] is new["blocks.0"] and model.blocks[0] is model.again
    assert new["norm"] is old["norm"] and type(model.pair) is tuple and model.pair[1] is old["pair.1"]
    assert bits(model, IDS) == y
    assert {name.split(".")[-1] for name in trained(model)} == {"lora_A", "lora_B"} and len(trained(model)) == 2 * len(PLACES)
    assert {p.device.name for p in model.parameters()} == {device}


def test_training_moves_the_adapters_alone(device):
    model = Net("float64")
    lora.inject(model, config(*PLACES, lora_dropout=0.1), rng=0)
    before = {name: value.tobytes() for name, value in model.state_dict().items()}
    optimizer = optim.Adam(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (model(IDS) ** 2).mean().backward()
        optimizer.step()
    moved = [name for name, value in model.state_dict().items() if value.tobytes() != before[name]]
    assert [name for name in moved if not name.endswith("lora_dropout.step")] == trained(model)


def test_draws_follow_the_seed_and_the_order_of_the_model():
    models = [Net() for _ in range(3)]
    for model, rng in zip(models, (5, np.random.default_rng(5), 6)):
        lora.inject(model, config("head", "embed", "up"), rng=rng)
    one, two, three = ({name: value.tobytes() for name, value in m.state_dict().items()} for m in models)
    assert one == two and one != three
    rng = np.random.default_rng(5)
    assert one["embed.adapters.default.lora_B"] == rng.standard_normal((4, 2)).astype("float32").tobytes()


def test_settings_reach_the_layers():
    model = Net()
    settings = config("conv", "up", "blocks.1", lora_dropout=0.25, use_rslora=True, rank_pattern={"up": 4},
                      alpha_pattern={"conv": 6}, use_dora=True)
    lora.inject(model, settings, "x", exact=True, rng=0)
    adapters = {path: layer.adapters["x"] for path, layer in
                (("conv", model.conv), ("up", model.named["up"]), ("1", model.blocks[1]))}
    assert {path: (a.r, a.lora_alpha, a.scaling, a.lora_dropout.p) for path, a in adapters.items()} == {
        "conv": (2, 6, 6 / 2 ** 0.5, 0.25), "up": (4, 4, 2.0, 0.25), "1": (2, 4, 4 / 2 ** 0.5, 0.25)}
    assert all(a.exact and a.magnitude is not None and a.config is settings for a in adapters.values())
    assert len({a.lora_dropout.seed for a in adapters.values()}) == 3
    other = Net()
    lora.inject(other, settings)
    assert not other.conv.adapter.exact


def test_evaluation_mode_is_kept():
    model = Net().eval()
    lora.inject(model, config("up", lora_dropout=0.5, modules_to_save=["head"]))
    assert not any(m.training for path, m in model.named_modules() if "adapters" not in path and "copies" not in path)
    lora.inject(model, config("up", lora_dropout=0.5), "second")
    scatter(model, "default"), scatter(model, "second")
    lora.activate(model, "default", "second")
    y = bits(model, IDS)
    assert bits(model, IDS) == y  # no dropout: neither in the sum,
    x = minilora.tensor(np.ones((2, 4), "float32"))
    update = bits(model.named["up"].update, x)
    assert bits(model.named["up"].update, x) == update  # nor in the update alone
    model.train()
    assert bits(model.named["up"].update, x) != update


def test_report():
    report = lora.inject(Net(), config("up", "conv", modules_to_save=["head"], exclude_modules=["conv"], bias="lora_only"),
                         "first", rng=0)
    assert report.name == "first" and report.trained == 2 * (4 + 6) + 6 + 15 and report.total == 217 + 20 + 15
    assert str(report) == """\
adapter 'first': 1 layers are adapted
layer     type    r  lora_alpha  s  named by
--------------------------------------------
named.up  Linear  2           4  2  up
left out: conv: exclude_modules has 'conv'
trained as a whole: head
note: bias='lora_only': biases of the base are trained; without the adapter it is not the base of before
trained: 41 of 252 numbers (16.2698%)"""


def test_notes():
    notes = lora.inject(Net(), config("head", "embed", r=3, fan_in_fan_out=True)).notes
    assert notes == ("large: embed has 33 numbers in A and B and 28 in its weight: r=3 saves nothing there",
                     "large: head has 21 numbers in A and B and 12 in its weight: r=3 saves nothing there",
                     "fan_in_fan_out: the linear layers of this model are (out, in): the setting has no effect")


# -- biases -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias, expected", [
    ("none", []), ("lora_only", ["blocks.0.bias", "named.up.bias"]),
    ("all", ["conv.bias", "norm.bias", "blocks.0.bias", "blocks.1.bias", "pair.0.bias", "named.up.bias"]),
])
def test_bias_modes(bias, expected):
    """As in PEFT; of a module that is trained as a whole the original stays frozen."""
    model = Net()
    lora.inject(model, config("blocks.0", "up", "down", bias=bias, modules_to_save=["head"]), "a", rng=0)
    assert [name for name in trained(model) if name.endswith(".bias") and not name.startswith("head")] == expected
    assert [name for name in trained(model) if name.startswith("head")] == ["head.copies.a.weight", "head.copies.a.bias"]
    lora.activate(model)
    assert trained(model) == []
    lora.activate(model, "a", trainable=False)
    assert trained(model) == []
    lora.activate(model, "a")
    assert set(expected) < set(trained(model))


def test_only_one_adapter_may_train_biases():
    model = Net()
    lora.inject(model, config("up", bias="all"), "a")
    before = picture(model)
    with pytest.raises(StateError, match="adapter 'a' trains the biases of the base"):
        lora.inject(model, config("down", bias="lora_only"), "b")
    assert picture(model) == before
    lora.inject(model, config("up", "down", modules_to_save=["head"]), "b")
    assert not any(name.endswith(".bias") and "copies" not in name for name in trained(model))
    lora.activate(model, "a")  # trains no bias of b's copy of the head, which is not in use
    assert not any("copies" in name for name in trained(model)) and "head.original.bias" in trained(model)


def test_remove_leaves_no_bias_trained():
    model = Net()
    lora.inject(model, config("up", bias="all"))
    lora.remove(model, "default")
    assert trained(model) == []


# -- modules that are trained as a whole --------------------------------------------------------------------------------


def test_modules_to_save(device):
    model = Net("float64")
    y = bits(model, IDS)
    original = model.head
    lora.inject(model, config("up", modules_to_save=["head", "norm"]), "a", rng=0)
    assert isinstance(model.head, SavedModule) and model.head.original is original
    assert bits(model, IDS) == y and model.head.weight is model.head.copies["a"].weight
    assert not np.shares_memory(fetch(original.weight), fetch(model.head.weight))
    assert {name for name in trained(model) if "adapters" not in name} == {
        "norm.copies.a.weight", "norm.copies.a.bias", "head.copies.a.weight", "head.copies.a.bias"}
    lora.inject(model, config("up", modules_to_save=["head"]), "b", rng=0)
    assert set(model.head.copies) == {"a", "b"} and set(model.norm.copies) == {"a"}
    scatter(model, "a"), scatter(model, "b", 2)
    seen = {}
    for name in ("a", "b"):
        lora.activate(model, name)
        seen[name] = bits(model, IDS)
        W, b = (fetch(p) for p in model.head.copies[name].parameters())
        x = np.ones((1, 4))
        np.testing.assert_allclose(fetch(model.head(minilora.tensor(x))), x @ W.T + b, rtol=1e-13)
        (model(IDS) ** 2).sum().backward()
        assert all((p.grad is not None) == p.trainable for p in model.parameters())
    assert len({y, *seen.values()}) == 3
    with lora.disabled(model):
        assert bits(model, IDS) == y
    lora.activate(model)
    assert bits(model, IDS) == y and model.head.weight is original.weight
    with pytest.raises(StateError, match="'a' and 'b' have each a copy of head: only one can be used"):
        lora.activate(model, "a", "b")
    lora.activate(model, "a")
    lora.remove(model, "b")
    assert set(model.head.copies) == {"a"} and model.head.active == "a"
    assert bits(model, IDS) == seen["a"]
    lora.remove(model, "a")
    assert model.head is original and type(model.norm) is nn.LayerNorm and bits(model, IDS) == y


def test_a_copy_has_no_gradients_and_no_place_in_an_optimizer():
    model = Net()
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    model(IDS).sum().backward()
    lora.inject(model, config("up", modules_to_save=["head"]), rng=0)
    assert all(p.grad is None and p.room is None for p in model.head.copies["default"].parameters())
    optimizer.zero_grad()
    model(IDS).sum().backward()
    with pytest.raises(StateError, match="no parameter has a gradient"):
        optimizer.step()  # it knows the parameters of before: make it afterwards


def test_an_adapter_and_a_copy_of_one_layer():
    """Two adapters may treat a layer differently: one trains a copy, the other adapts the original."""
    model = Net()
    y = bits(model, IDS)
    lora.inject(model, config("up", modules_to_save=["head"]), "whole", rng=0)
    lora.inject(model, config("head"), "low", rng=1)
    assert type(model.head.original) is lora.Linear
    scatter(model, "whole"), scatter(model, "low", 2)
    lora.activate(model, "low")
    assert trained(model) == ["head.original.adapters.low.lora_A", "head.original.adapters.low.lora_B"]
    low = bits(model, IDS)
    lora.activate(model, "whole")
    assert bits(model, IDS) not in (y, low)
    before = picture(model)
    with pytest.raises(StateError, match="'whole' has a copy of head.*'low'"):
        lora.activate(model, "whole", "low")  # the copy in use would leave no place for the other's update
    assert picture(model) == before
    with pytest.raises(ConfigError, match="modules_to_save: head holds adapters already"):
        lora.inject(model, config("up", modules_to_save=["head"]), "third")
    assert picture(model) == before
    lora.remove(model, "whole")
    assert type(model.head) is lora.Linear
    lora.activate(model, "low")
    assert bits(model, IDS) == low
    lora.remove(model, "low")
    assert type(model.head) is nn.Linear and bits(model, IDS) == y


def test_a_module_with_adapters_inside_cannot_be_saved():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Linear(3, 3))
    lora.inject(model, config("0.1"), "a")
    before = picture(model)
    with pytest.raises(ConfigError, match="0 holds adapters already .1."):
        lora.inject(model, config("1", modules_to_save=["0"]), "b")
    assert picture(model) == before


# -- several adapters ---------------------------------------------------------------------------------------------------


def test_a_second_adapter_on_other_layers():
    model = Net()
    lora.inject(model, config("up", "down"), "a", rng=0)
    up = model.named["up"]
    report = lora.inject(model, config("down", "head", r=1), "b", rng=1)
    assert model.named["up"] is up and list(up.adapters) == ["a"] and up.active == {}
    assert list(model.named["down"].adapters) == ["a", "b"] and model.named["down"].active == {"b": 1.0}
    assert list(model.head.adapters) == ["b"] and len(report.matched.targets) == 2
    assert trained(model) == [f"{path}.adapters.b.lora_{x}" for path in ("named.down", "head") for x in "AB"]
    lora.activate(model, "a", "b")
    assert len(trained(model)) == 8
    lora.remove(model, "a")
    assert type(model.named["up"]) is nn.Linear and list(model.named["down"].adapters) == ["b"]
    assert model.named["down"].active == {"b": 1.0} and len(trained(model)) == 4


def test_all_linear_passes_by_wrappers_and_adapters():
    model = Net()
    linear = ["blocks.0", "blocks.1", "pair.0", "named.up", "named.down", "head"]
    first = lora.inject(model, Config(r=1, target_modules="all-linear", modules_to_save=["conv"]), "a")
    second = lora.inject(model, Config(r=1, target_modules="all-linear"), "b")
    for report in (first, second):
        assert [target.path for target in report.matched.targets] == linear
        assert {target.kind for target in report.matched.targets} == {"Linear"}
    assert [path for path, m in model.named_modules() if isinstance(m, SavedModule)] == ["conv"]
    assert not any("adapters" in path.split(".adapters.", 1)[1] for path, _ in model.named_modules() if ".adapters." in path)
    text = str(lora.status(model))
    assert "a (r=1), b (r=1)" in text and "conv" in text


def test_an_adapter_can_hit_what_another_one_saved_as_part_of_a_container():
    """What lies inside a wrapper is told of as left out: a name that means only that is an error, not a silent choice."""
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 3))
    lora.inject(model, config("1", modules_to_save=["0"]), "a")
    before = picture(model)
    with pytest.raises(ConfigError, match="left out: 0.0: inside 0, which adapter 'a' trains as a whole"):
        lora.inject(model, config("0.0"), "b")
    assert picture(model) == before


# -- failures change nothing --------------------------------------------------------------------------------------------


class Odd(nn.Linear):
    def forward(self, x):
        return x


class NoRank(nn.Conv1d):
    pass


def fail(model, call, error, match):
    before = picture(model)
    with pytest.raises(error, match=match):
        call()
    assert picture(model) == before


@pytest.mark.parametrize("second", [False, True], ids=["plain", "with an adapter"])
def test_a_layer_that_fails_leaves_the_model_as_it_was(second):
    model = Net()
    model.named["odd"] = Odd(4, 4)
    model.grouped = NoRank(4, 4, 2, groups=2, rng=0)
    if second:
        lora.inject(model, config("up", "head"), "there", rng=0)

    def inject(*names, **settings):
        return lambda: lora.inject(model, config(*names, **settings), "new", rng=0)

    fail(model, inject("up", "odd"), DTypeError, "^named.odd: adapt: Odd has a forward of its own")
    fail(model, inject("up", "grouped", r=3), ConfigError, "r=3 at grouped: it has 2 groups")
    fail(model, inject("head", "grouped", init_lora_weights="olora"), ConfigError, "^grouped: .*not for a convolution with 2")
    fail(model, inject("up", "head", r=5, init_lora_weights="pissa"), ConfigError, r"^named.up: .*r is at most 4, got 5")
    fail(model, inject("up", "embed", lora_bias=True), ConfigError, "^embed: lora_bias is not for embeddings")
    fail(model, inject("up", "hat"), ConfigError, "'hat' matches nothing; nearest: head")
    fail(model, inject("norm"), ConfigError, "hits norm, a LayerNorm")
    for name in ("", "a/b", "__base__", "..", 3, "x" * 65, "a b"):
        fail(model, lambda: lora.inject(model, config("up"), name), ConfigError, "an adapter's name consists of")
    fail(model, lambda: lora.inject(model, None), DTypeError, "expected a lora.Config")
    with pytest.raises(DTypeError, match="inject: expected a model, got list"):
        lora.inject([("up", (3, 3))], config("up"))


def test_names_are_taken_once():
    model = Net()
    lora.inject(model, config("up", modules_to_save=["head"]), "a")
    fail(model, lambda: lora.inject(model, config("down"), "a"), ConfigError,
         r"an adapter 'a' already: choose another name, or lora.remove\(model, 'a'\) first")
    fail(model, lambda: lora.remove(model, "b"), ConfigError, "no adapter of the name 'b'.*There are: 'a'")
    lora.inject(model, config("down"), "adapter-2.1_b")
    assert list(model.named["down"].adapters) == ["adapter-2.1_b"]


def test_merged_layers_are_left_alone():
    model = Net()
    lora.inject(model, config("up"), "a", rng=0)
    scatter(model, "a")
    lora.inject(model, config("down"), "b", rng=0)
    lora.activate(model, "a")
    lora.merge(model)
    fail(model, lambda: lora.inject(model, config("head"), "c"), StateError, r"layers are merged \(named.up\)")
    fail(model, lambda: lora.remove(model, "a"), StateError, r"'a' is merged into named.up: call lora.unmerge")
    lora.remove(model, "b")
    assert type(model.named["down"]) is nn.Linear and model.named["up"].merged
    lora.unmerge(model)
    lora.remove(model, "a")


def test_a_bare_layer_is_for_adapt():
    with pytest.raises(ConfigError, match="The model is one layer, without a name: use lora.adapt"):
        lora.inject(nn.Linear(3, 3), config("x"))
    layer = lora.Linear(3, 3, r=2, rng=0)
    lora.remove(layer, "default")
    assert layer.adapters == {} and layer.active == {}
    x = minilora.tensor(np.ones((2, 3), "float32"))
    assert bits(layer, x) == bits(layer.plain(), x)


# -- tied weights -------------------------------------------------------------------------------------------------------


def test_note_where_two_layers_share_a_weight():
    model = Net()
    model.blocks[1].weight = model.blocks[0].weight
    report = lora.inject(model, config("blocks.1", r=1), rng=0)
    assert report.notes == ("tied: blocks.1 shares its weight with blocks.0, again, which the adapter does not reach; "
                            "merging would change both and is refused",)
    scatter(model, "default")
    with pytest.raises(StateError, match="'blocks.1' and 'blocks.0' share one weight"):
        lora.merge(model)
    assert lora.inject(Net(), config("blocks.0", r=1), rng=0).notes == ()  # one layer at two places shares nothing with others


def test_note_where_the_logits_come_from_the_table():
    model = build("gpt2", "float32")
    y = bits(model, token_ids(2, 3))
    report = lora.inject(model, config("wte", "c_fc"), rng=0)
    assert report.notes == ("tied: wte makes the logits too; its adapter takes part in both",)
    assert bits(model, token_ids(2, 3)) == y
    assert lora.inject(build("gpt2"), config("c_fc")).notes == ()
    assert lora.inject(build("llama"), config("embed_tokens")).notes == ()  # it has a head of its own
    tied = lora.inject(build("llama", tie_word_embeddings=True), config("embed_tokens"))
    assert tied.notes == ("tied: model.embed_tokens makes the logits too; its adapter takes part in both",)


def test_note_where_a_copy_of_a_tied_weight_comes_loose():
    model = Net()
    model.head = nn.Linear(4, 7, bias=False)
    model.head.weight = model.embed.weight
    report = lora.inject(model, config("up", modules_to_save=["head"]), rng=0)
    expected = ("tied: the copy of head has a weight of its own; embed, which shares it now, keeps the old one",)
    assert report.notes == expected
    assert lora.inject(model, config("up", modules_to_save=["head"]), "second", rng=0).notes == expected


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_every_layer_of_a_transformer(family):
    """In and out again: the model computes what it did, and its objects are those of before."""
    model, ids = build(family, "float32").eval(), token_ids(2, 3)

    def output():
        with no_grad():  # frozen attention of few queries sums in another order than attention that is trained through
            return fetch(model(ids))

    before, y = {path: type(m) for path, m in model.named_modules()}, output()
    report = lora.inject(model, Config(r=1, target_modules="all-linear"), rng=0)
    assert len(report.matched.targets) == {"gpt2": 8, "bert": 13, "llama": 14}[family]
    assert np.array_equal(output(), y)
    scatter(model, "default")
    assert not np.array_equal(output(), y)
    lora.remove(model, "default")
    assert np.array_equal(output(), y)
    assert {path: type(m) for path, m in model.named_modules()} == before and trained(model) == []


def test_layers_in_a_named_tuple():
    class Pair(typing.NamedTuple):
        first: nn.Module
        second: nn.Module

    class Model(nn.Module):
        def __init__(self):
            self.pair = Pair(nn.Linear(2, 3, rng=0), nn.Linear(3, 2, rng=1))

        def forward(self, x):
            return self.pair.second(self.pair.first(x))

    model = Model()
    lora.inject(model, lora.Config(r=1, target_modules=["0", "1"]), rng=0)
    assert isinstance(model.pair, Pair) and isinstance(model.pair.first, lora.Linear)
    model(minilora.tensor(np.ones((1, 2), "float32")))
    lora.remove(model, "default")
    assert isinstance(model.pair, Pair) and type(model.pair.second) is nn.Linear
