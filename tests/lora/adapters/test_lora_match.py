"""lora.match: PEFT's rules for which layers are hit, and an error for everything that hits nothing."""
import re

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from minilora import lora, nn
from minilora.errors import ConfigError, DTypeError
from minilora.lora import Config, match
from minilora.lora.adapters.inventory import inventory

RNG = np.random.default_rng(0)


class Block(nn.Module):
    def __init__(self, d=4, experts=0):
        self.attn = nn.MultiheadAttention(d, 2, rng=RNG)
        self.norm = nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d, rng=RNG), nn.ReLU(), nn.Linear(2 * d, d, rng=RNG))
        self.experts = [nn.Linear(d, d, rng=RNG) for _ in range(experts)]


class Body(nn.Module):
    def __init__(self, n, d=4, experts=0):
        self.embed = nn.Embedding(10, d, rng=RNG)
        self.layers = [Block(d, experts) for _ in range(n)]


class Model(nn.Module):
    """embed, layers.*.attn.{q,k,v,out}_proj, layers.*.mlp.{0,2}, norm, lm_head; below `model`."""

    def __init__(self, n=3):
        self.model = Body(n)
        self.lm_head = nn.Linear(4, 10, rng=RNG)


class Image(nn.Module):
    def __init__(self, groups=1):
        self.conv_in = nn.Conv2d(4, 8, 3, groups=groups, rng=RNG)
        self.line = nn.Conv1d(4, 8, 3, rng=RNG)


def hits(model, allow_unmatched=False, **settings):
    return [target.path for target in match(model, Config(**settings), allow_unmatched=allow_unmatched).targets]


def refusal(model, **settings):
    with pytest.raises(ConfigError) as caught:
        match(model, Config(**settings))
    return str(caught.value)


# -- target_modules -----------------------------------------------------------------------------------------


def test_names_are_whole_paths_or_ends_behind_a_dot():
    assert hits(Model(2), target_modules=["q_proj"]) == [f"model.layers.{i}.attn.q_proj" for i in (0, 1)]
    assert hits(Model(2), target_modules=["model.layers.1.attn.q_proj"]) == ["model.layers.1.attn.q_proj"]
    assert hits(Model(2), target_modules=["1.attn.q_proj", "mlp.0"]) == [
        "model.layers.0.mlp.0", "model.layers.1.attn.q_proj", "model.layers.1.mlp.0"]
    assert "'proj' matches nothing" in refusal(Model(), target_modules=["proj"])  # q_proj does not end in ".proj"
    found = match(Model(2), Config(target_modules=["q_proj", "model.layers.1.attn.q_proj"]))
    assert [t.entry for t in found.targets] == ["q_proj", "model.layers.1.attn.q_proj"]


def test_a_string_is_a_regular_expression_for_the_whole_path():
    assert hits(Model(2), target_modules=r".*\.(q|v)_proj") == [
        f"model.layers.{i}.attn.{n}_proj" for i in (0, 1) for n in "qv"]
    assert hits(Model(3), target_modules=r"model\.layers\.[12]\.mlp\.0") == ["model.layers.1.mlp.0", "model.layers.2.mlp.0"]
    text = refusal(Model(), target_modules="q_proj")
    assert "a string is a regular expression for the whole path: for a name write ['q_proj']" in text


@pytest.mark.parametrize("word", ["all-linear", "All-Linear"])
def test_all_linear_is_every_linear_but_the_head(word):
    found = match(Model(2), Config(target_modules=word))
    assert [t.path for t in found.targets] == [
        f"model.layers.{i}.{n}" for i in (0, 1)
        for n in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp.0", "mlp.2")]
    assert {t.kind for t in found.targets} == {"Linear"}
    assert found.excluded == (("lm_head", "'all-linear' leaves output heads out (lm_head)"),)


@pytest.mark.parametrize("head", ["classifier", "score", "lm_head"])
def test_all_linear_knows_heads_by_name(head):
    model = nn.Module()
    model.body = nn.Linear(2, 2, rng=RNG)
    inner = nn.Module()
    inner.dense = nn.Linear(2, 2, rng=RNG)
    setattr(model, head, inner)
    model.deeper = nn.Module()
    setattr(model.deeper, head, nn.Linear(2, 2, rng=RNG))
    assert hits(model, target_modules="all-linear") == ["body"]
    assert hits(model, target_modules=["dense"]) == [f"{head}.dense"]  # named, it is adapted


def test_embeddings_and_convolutions_by_name():
    found = match(Model(1), Config(target_modules=["embed", "q_proj"]))
    assert [(t.path, t.kind) for t in found.targets] == [
        ("model.embed", "Embedding"), ("model.layers.0.attn.q_proj", "Linear")]
    assert [(t.path, t.kind) for t in match(Image(), Config(target_modules=["conv_in", "line"])).targets] == [
        ("conv_in", "Conv2d"), ("line", "Conv1d")]
    assert "no layer" not in refusal(Image(), target_modules=["conv"])


def test_a_subclass_is_of_its_base_s_kind():
    class Dense(nn.Linear):
        pass

    model = nn.Module()
    model.fc = Dense(2, 2, rng=RNG)
    assert hits(model, target_modules="all-linear") == ["fc"]


def test_what_cannot_be_adapted_is_named():
    text = refusal(Model(2), target_modules=["attn", "norm"])
    assert text.count("\n") == 4
    assert "'attn' hits model.layers.0.attn, a MultiheadAttention: only Linear, Embedding, Conv1d, Conv2d" in text
    assert "'norm' hits model.layers.1.norm, a LayerNorm" in text


def test_an_adapted_layer_is_one_layer():
    model = nn.Module()
    model.fc = lora.Linear(4, 3, r=2, lora_dropout=0.1, rng=RNG)
    assert hits(model, target_modules="all-linear") == ["fc"]
    assert "'lora_dropout' matches nothing" in refusal(model, target_modules=["fc", "lora_dropout"])


def test_a_shared_module_comes_once():
    model = nn.Module()
    model.first = nn.Linear(2, 2, rng=RNG)
    model.second = model.first
    assert hits(model, target_modules="all-linear") == ["first"]


def test_a_lone_layer_has_no_name():
    assert "use lora.adapt(layer)" in refusal(nn.Linear(2, 2, rng=RNG), target_modules="all-linear")


# -- what is left out ---------------------------------------------------------------------------------------


def test_exclude_wins():
    found = match(Model(2), Config(target_modules=["q_proj", "v_proj"], exclude_modules=["0.attn.v_proj"]))
    assert [t.path for t in found.targets] == [
        "model.layers.0.attn.q_proj", "model.layers.1.attn.q_proj", "model.layers.1.attn.v_proj"]
    assert found.excluded == (("model.layers.0.attn.v_proj", "exclude_modules has '0.attn.v_proj'"),)
    assert hits(Model(2), target_modules=["q_proj"], exclude_modules=r".*\.0\..*") == ["model.layers.1.attn.q_proj"]
    assert "every layer that a target names is left out: model.layers.0.attn.q_proj: exclude" in refusal(
        Model(1), target_modules=["q_proj"], exclude_modules=["q_proj"])


def test_modules_to_save_are_not_adapted_nor_is_what_they_hold():
    found = match(Model(2), Config(target_modules="all-linear", modules_to_save=["lm_head", "1.attn"]))
    assert found.saved == ("model.layers.1.attn", "lm_head")
    assert [t.path for t in found.targets] == [
        "model.layers.0.attn.q_proj", "model.layers.0.attn.k_proj", "model.layers.0.attn.v_proj",
        "model.layers.0.attn.out_proj", "model.layers.0.mlp.0", "model.layers.0.mlp.2", "model.layers.1.mlp.0",
        "model.layers.1.mlp.2"]
    assert ("model.layers.1.attn.q_proj", "modules_to_save has '1.attn'") in found.excluded


@pytest.mark.parametrize("order", [1, -1])
def test_modules_to_save_do_not_lie_inside_one_another(order):
    text = refusal(Model(2), target_modules=["mlp.0"], modules_to_save=["attn.q_proj", "attn"][::order])
    assert text.splitlines()[1:] == ["  modules_to_save: model.layers.0.attn.q_proj ('attn.q_proj') lies inside "
                                     "model.layers.0.attn ('attn'): name one of the two"]
    assert len(match(Model(2), Config(target_modules=["mlp.0"], modules_to_save=["attn", "mlp.2", "1.attn"])).saved) == 4


# -- a model of which adapters train modules as a whole -----------------------------------------------------


def saving(*modules, n=2):
    model = Model(n)
    lora.inject(model, Config(target_modules=["q_proj"], modules_to_save=modules), "a", rng=0)
    return model


def test_names_that_begin_alike_are_not_inside_one_another():
    model = nn.Module()
    model.up, model.upper, model.fc = (nn.Sequential(nn.Linear(2, 2, rng=RNG)), nn.Sequential(nn.Linear(2, 2, rng=RNG)),
                                       nn.Linear(2, 2, rng=RNG))
    config = Config(target_modules=["fc"], modules_to_save=["up", "upper"])
    assert match(model, config).saved == ("up", "upper")
    lora.inject(model, Config(target_modules=["fc"], modules_to_save=["up"]), "a", rng=0)
    assert match(model, config).saved == ("up", "upper")
    assert hits(model, target_modules="all-linear") == ["upper.0", "fc"]


def test_what_is_inside_a_saved_module_is_left_out_aloud():
    model = saving("0.mlp")
    reason = "inside model.layers.0.mlp, which adapter 'a' trains as a whole"
    found = match(model, Config(target_modules=["mlp.0", "out_proj"]))
    assert [t.path for t in found.targets] == ["model.layers.0.attn.out_proj", "model.layers.1.attn.out_proj",
                                               "model.layers.1.mlp.0"]
    assert found.excluded == (("model.layers.0.mlp.0", reason),)
    assert match(model, Config(target_modules="all-linear")).excluded[:2] == (
        ("model.layers.0.mlp.0", reason), ("model.layers.0.mlp.2", reason))
    assert f"every layer that a target names is left out: model.layers.0.mlp.2: {reason}" in refusal(
        model, target_modules=["0.mlp.2"])
    assert len(hits(model, target_modules=["mlp.2"], exclude_modules=["0.mlp.2"])) == 1  # named, and not unknown
    lora.inject(model, Config(target_modules=["v_proj"], modules_to_save=["0.mlp"]), "b", rng=0)
    assert "inside model.layers.0.mlp, which adapters 'a', 'b' train as a whole" in refusal(model, target_modules=["0.mlp.2"])


def test_a_saved_layer_itself_can_be_adapted():
    model = saving("lm_head", "norm")
    assert hits(model, target_modules=["lm_head", "q_proj"])[-1] == "lm_head"
    assert match(model, Config(target_modules=["q_proj"], modules_to_save=["lm_head"])).saved == ("lm_head",)
    lora.inject(model, Config(target_modules=["lm_head"]), "b", rng=0)
    assert [layer.path for layer in inventory(model) if layer.kind == "Linear"][-1] == "lm_head"
    assert [layer.kind for layer in inventory(model) if layer.path.startswith("lm_head.")] == [""] * 4


def test_saved_modules_of_two_adapters_do_not_lie_inside_one_another():
    model = saving("mlp")
    for name, said in (("mlp.0", "model.layers.0.mlp.0 ('mlp.0') lies inside model.layers.0.mlp, which adapter 'a' trains"),
                       ("layers.0", "model.layers.0 ('layers.0') holds model.layers.0.mlp, which adapter 'a' trains")):
        assert f"1 problem:\n  modules_to_save: {said}" in refusal(model, target_modules=["k_proj"] if "mlp" in name else
                                                                   ["lm_head"], modules_to_save=[name])
    assert match(model, Config(target_modules=["q_proj"], modules_to_save=["mlp"])).saved == (
        "model.layers.0.mlp", "model.layers.1.mlp")


def test_an_inventory_counts_originals_and_copies():
    plain, model = inventory(Model(2)), saving("mlp")
    layers = [layer for layer in inventory(model) if "adapters" not in layer.path]
    copies = [layer for layer in layers if ".copies." in layer.path]
    assert {layer.path: layer.parameters for layer in plain} == {
        layer.path: layer.parameters for layer in layers if layer not in copies and not layer.path.endswith(".original")}
    assert sum(layer.size for layer in copies) == sum(layer.size for layer in plain if ".mlp." in layer.path)
    assert {layer.kind for layer in copies} == {""}


# -- layers -------------------------------------------------------------------------------------------------


def test_layers_to_transform():
    def numbers(**settings):
        return [int(re.search(r"\d+", path)[0]) for path in hits(Model(4), target_modules=["q_proj"], **settings)]

    assert numbers(layers_to_transform=2) == [2]
    assert numbers(layers_to_transform=[3, 0]) == [0, 3]
    assert numbers(layers_to_transform=[1], layers_pattern="layers") == [1]
    assert numbers(layers_to_transform=[1], layers_pattern=["h", "layers"], allow_unmatched=True) == [1]


def test_layer_numbers_where_the_list_is_at_the_root():
    body = Body(3, experts=2)
    assert hits(body, target_modules=["q_proj"], layers_to_transform=1) == ["layers.1.attn.q_proj"]
    assert hits(body, target_modules=["q_proj"], layers_to_transform=1, layers_pattern="layers") == ["layers.1.attn.q_proj"]
    # The first number counts: that of the layer, not that of the expert inside it.
    assert hits(body, target_modules=["experts.0"], layers_to_transform=1) == ["layers.1.experts.0"]
    towers = nn.Sequential(Block(), Block())
    assert hits(towers, target_modules=["q_proj"], layers_to_transform=1) == ["1.attn.q_proj"]


def test_the_pattern_says_which_list():
    model = nn.Module()
    model.encoder, model.decoder = Body(2), Body(3)
    both = dict(target_modules=["q_proj"], layers_to_transform=1)
    assert hits(model, **both) == ["encoder.layers.1.attn.q_proj", "decoder.layers.1.attn.q_proj"]
    assert hits(model, **both, layers_pattern=r"decoder\.layers") == ["decoder.layers.1.attn.q_proj"]
    assert hits(model, **both, layers_pattern="encoder.layers|other") == ["encoder.layers.1.attn.q_proj"]


def test_a_whole_path_passes_in_any_layer():
    assert hits(Model(3), target_modules=["model.layers.0.attn.q_proj", "v_proj"], layers_to_transform=2) == [
        "model.layers.0.attn.q_proj", "model.layers.2.attn.v_proj"]


def test_a_target_outside_the_chosen_layers_is_unmatched():
    text = refusal(Model(2), target_modules=["v_proj", "embed"], layers_to_transform=1)
    assert "target_modules: 'embed' matches nothing" in text and "1 problem:" in text
    assert "layers_to_transform: 7 matches nothing; the targets have the layer numbers 0-2" in refusal(
        Model(3), target_modules=["q_proj"], layers_to_transform=[1, 7])
    assert "1 problem:\n  layers_to_transform: 0 matches nothing; no path of a target has a layer number" in refusal(
        Image(), target_modules=["line"], layers_to_transform=0)


def test_layers_that_do_not_exist_are_one_fault():
    text = refusal(Model(3), target_modules=["q_proj"], layers_to_transform=[9])
    assert text.splitlines()[1:] == ["  layers_to_transform: 9 matches nothing; the targets have the layer numbers 0-2"]
    text = refusal(Model(3), target_modules=["q_proj", "embed"], layers_to_transform=[9])  # a name without a number is another
    assert "target_modules: 'embed' matches nothing in layers_to_transform; outside of it, model.embed" in text
    assert "'q_proj'" not in text
    text = refusal(Model(3), target_modules=["embed"], layers_to_transform=0)
    assert text.splitlines()[1:] == ["  layers_to_transform: 0 matches nothing; no path of a target has a layer number"]
    model = Model(2)
    del model.model.layers[1].attn.q_proj
    text = refusal(model, target_modules=["q_proj", "v_proj"], layers_to_transform=1)
    assert "1 problem:\n  target_modules: 'q_proj' matches nothing in layers_to_transform; outside of it, " \
        "model.layers.0.attn.q_proj" in text
    text = refusal(Model(2), target_modules=["q_proj"], layers_to_transform=1, layers_pattern="h")
    assert "layers_to_transform: 1 matches nothing; no path of a target has a layer number behind layers_pattern" in text


def test_a_layer_of_which_all_is_left_out_is_there():
    found = match(Model(2), Config(target_modules=["q_proj"], layers_to_transform=[0, 1], exclude_modules=["1.attn.q_proj"]))
    assert [path for path, _ in found.excluded] == ["model.layers.1.attn.q_proj"]


# -- patterns -----------------------------------------------------------------------------------------------


def ranks(pattern, n=2, **settings):
    found = match(Model(n), Config(r=8, target_modules=["q_proj", "v_proj"], rank_pattern=pattern, **settings))
    return {re.sub(r"model.layers.(\d).attn.(.)_proj", r"\1\2", t.path): t.r for t in found.targets}


def test_rank_pattern():
    assert ranks({"v_proj": 2}) == {"0q": 8, "0v": 2, "1q": 8, "1v": 2}
    assert ranks({r"layers\.1\..*": 4}) == {"0q": 8, "0v": 8, "1q": 4, "1v": 4}
    assert ranks({r"(q|v)_proj": 3}) == {"0q": 3, "0v": 3, "1q": 3, "1v": 3}
    assert ranks({"1.attn.v_proj": 1, "v_proj": 2}) == {"0q": 8, "0v": 2, "1q": 8, "1v": 1}


def test_anchored_keys():
    assert ranks({r"^model\.layers\.0\.attn\.q_proj": 1}) == {"0q": 1, "0v": 8, "1q": 8, "1v": 8}
    assert ranks({r"^model\.layers\.0\.attn\.q_proj$": 1}) == {"0q": 1, "0v": 8, "1q": 8, "1v": 8}
    assert ranks({r"^.*\.1\..*": 1}) == {"0q": 8, "0v": 8, "1q": 1, "1v": 1}
    text = refusal(Model(), target_modules=["q_proj"], rank_pattern={r"^layers\.0\.attn\.q_proj": 1})
    assert "rank_pattern: '^layers\\\\.0\\\\.attn\\\\.q_proj' matches no adapted layer" in text  # not at the root


def test_the_first_key_that_fits_counts_and_a_key_behind_it_is_an_error():
    text = refusal(Model(2), target_modules=["q_proj"], rank_pattern={"q_proj": 2, "0.attn.q_proj": 4})
    assert "rank_pattern: '0.attn.q_proj' has no effect: an earlier key fits the same layers" in text


def test_alpha_and_scaling():
    settings = dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 4},
                    alpha_pattern={"v_proj": 4})
    for rslora in (False, True):
        found = match(Model(1), Config(**settings, use_rslora=rslora))
        values = [(t.r, t.lora_alpha, t.scaling) for t in found.targets]
        assert values == [(4, 16, lora.scaling(16, 4, rslora)), (8, 4, lora.scaling(4, 8, rslora))]


def test_r_fits_the_groups_of_a_convolution():
    assert hits(Image(groups=2), r=4, target_modules=["conv_in"]) == ["conv_in"]
    assert "r=3 at conv_in: it has 2 groups" in refusal(Image(groups=2), r=3, target_modules=["conv_in"])


# -- what matches nothing -----------------------------------------------------------------------------------


def test_everything_that_matches_nothing_comes_in_one_error():
    text = refusal(Model(2), target_modules=["q_proj", "v_porj"], exclude_modules=["k_prjo"], modules_to_save=["lm_heat"],
                   layers_to_transform=[0, 5], layers_pattern=["layers", "h"], rank_pattern={"out_proj": 2},
                   alpha_pattern={"q_prj": 4})
    lines = text.splitlines()
    assert lines[0] == "lora.Config and model do not fit, 7 problems:"
    assert lines[1] == "  target_modules: 'v_porj' matches nothing; nearest: v_proj, q_proj, k_proj"
    for start in ("exclude_modules: 'k_prjo' matches nothing; nearest: k_proj", "modules_to_save: 'lm_heat' matches nothing; "
                  "nearest: lm_head", "layers_to_transform: 5 matches nothing; the targets have the layer numbers 0-1",
                  "layers_pattern: 'h' matches nothing; numbers stand behind layers",
                  "rank_pattern: 'out_proj' matches no adapted layer",
                  "alpha_pattern: 'q_prj' matches no adapted layer; nearest: q_proj"):
        assert sum(line.startswith("  " + start) for line in lines) == 1, start
    assert lines[-2] == "  The layers of the model are called embed, q_proj, k_proj, v_proj, out_proj, 0, 2, lm_head"
    assert lines[-1] == "  To let it pass, give allow_unmatched=True"
    assert len(lines) == 10


def test_an_entry_like_no_name_gets_the_names():
    lines = refusal(Model(1), target_modules=["q_proj", "zzzzzz"]).splitlines()
    assert lines[1:3] == ["  target_modules: 'zzzzzz' matches nothing", "  The layers of the model are called embed, q_proj, "
                          "k_proj, v_proj, out_proj, 0, 2, lm_head"]
    many = [(f"layer{'abcdefghij'[i]}", (4, 4)) for i in range(10)]
    assert refusal(many, target_modules=["zzzzzz"]).endswith("called layera, layerb, layerc, layerd, layere, layerf, layerg, "
                                                             "layerh and 2 more")


def test_the_way_round_is_named_only_where_it_helps():
    both = dict(target_modules=["q_proj", "norm", "nope"])
    assert "allow_unmatched" not in refusal(Model(1), **both)
    with pytest.raises(ConfigError) as caught:
        match(Model(1), Config(**both), allow_unmatched=True)
    assert "nope" not in str(caught.value) and "'norm' hits" in str(caught.value)


def test_a_key_that_fits_a_layer_which_is_not_adapted():
    text = refusal(Model(1), target_modules=["q_proj"], rank_pattern={"out_proj": 2})
    assert "'out_proj' matches no adapted layer; it fits model.layers.0.attn.out_proj, which is not adapted" in text


def test_a_part_of_a_name_finds_it():
    text = refusal([("h.*.self_attention_query", (4, 4), 2), ("h.*.up", (4, 4), 2)], target_modules=["up"],
                   rank_pattern={"^query$": 4})
    assert "nearest: h.*.self_attention_query" in text


@pytest.mark.parametrize("key", ["^q_proj", "^q_prj$", r"^layers\.0\.attn\.q_prj"])
def test_anchored_keys_get_whole_paths(key):
    text = refusal(Model(2), target_modules=["q_proj"], rank_pattern={key: 4})
    assert "matches no adapted layer; ^ is the start of the whole path; nearest: model.layers.*.attn.q_proj" in text


def test_allow_unmatched_turns_them_into_notes():
    config = Config(target_modules=["q_proj", "nope"], rank_pattern={"nope": 2})
    found = match(Model(1), config, allow_unmatched=True)
    assert len(found.targets) == 1 and len(found.notes) == 2
    with pytest.raises(ConfigError, match="matches nothing"):  # but something must be adapted
        match(Model(1), Config(target_modules=["nope"]), allow_unmatched=True)
    with pytest.raises(ConfigError, match="can be adapted"):
        match(Model(1), Config(target_modules=["attn"]), allow_unmatched=True)


def test_a_path_gets_near_paths():
    text = refusal(Model(2), target_modules=["model.layer.0.attn.q_proj", "q_proj"])
    assert "nearest: model.layers.*.attn.q_proj" in text


def test_targets_must_be_named():
    assert "name the layers to adapt, or give 'all-linear'. The layers of the model are called embed" in refusal(Model())
    assert "The model has no layer of the kinds Linear" in refusal(nn.Sequential(nn.ReLU()))


def test_two_entries_for_one_layer_are_both_used():
    assert len(hits(Model(2), target_modules=["q_proj", "attn.q_proj"])) == 2


def test_uneven_coverage_is_noted():
    model = Model(4)
    for i in (1, 2):
        del model.model.layers[i].attn.q_proj
    found = match(model, Config(target_modules=["q_proj", "v_proj"]))
    assert found.notes == ("uneven: model.layers.*.attn.q_proj is adapted in 2 of 4 layers, not in 1-2",)
    assert found.notes[0] in str(found)
    assert match(model, Config(target_modules=["v_proj"], layers_to_transform=[0, 2])).notes == ()
    assert match(model, Config(target_modules=["3.attn.v_proj"])).notes == ()  # one layer, by its name: meant so


def test_wrong_arguments():
    with pytest.raises(DTypeError, match="expected a lora.Config, got dict"):
        match(Model(), {"r": 8})
    with pytest.raises(DTypeError, match="expected a model or a list"):
        match("gpt2", Config(target_modules=["q"]))


def test_the_table():
    found = match(Model(1), Config(r=4, target_modules=["q_proj", "embed"], exclude_modules=["k_prjo"],
                                   modules_to_save=["lm_head"]), allow_unmatched=True)
    assert str(found).splitlines() == [
        "2 layers are adapted",
        "layer                       type       r  lora_alpha  s  named by",
        "-----------------------------------------------------------------",
        "model.embed                 Embedding  4           8  2  embed",
        "model.layers.0.attn.q_proj  Linear     4           8  2  q_proj",
        "trained as a whole: lm_head",
        "note: exclude_modules: 'k_prjo' matches nothing; nearest: k_proj, v_proj, q_proj. The layers of the model are called "
        "embed, q_proj, k_proj, v_proj, out_proj, 0, 2, lm_head",
    ]


# -- laws ---------------------------------------------------------------------------------------------------

LEAVES = ["q_proj", "k_proj", "v_proj", "out_proj", "0", "2"]
MODEL = Model(3)


@settings(max_examples=60)
@given(st.lists(st.sampled_from(LEAVES), min_size=1, unique=True), st.lists(st.sampled_from(LEAVES), unique=True),
       st.none() | st.lists(st.integers(0, 2), min_size=1, unique=True))
def test_the_hits_are_a_set_expression(targets, excludes, layers):
    expected = [
        f"model.layers.{i}.{parent}.{leaf}" for i in range(3)
        for parent, leaf in [("attn", n) for n in LEAVES[:4]] + [("mlp", n) for n in LEAVES[4:]]
        if leaf in targets and leaf not in excludes and (layers is None or i in layers)]
    # The blocks of the list are called 0 and 2 too: only as containers, which are no layers. Say mlp.0 to avoid them.
    names = [f"mlp.{name}" if name.isdigit() else name for name in targets]
    config = Config(target_modules=names, exclude_modules=[f"mlp.{n}" if n.isdigit() else n for n in excludes] or None,
                    layers_to_transform=layers)
    if not expected:
        with pytest.raises(ConfigError):
            match(MODEL, config)
        return
    found = match(MODEL, config)
    assert [t.path for t in found.targets] == expected
    assert len({path for path, _ in found.excluded} & set(expected)) == 0
    for target in found.targets:
        assert target.module is dict(MODEL.named_modules())[target.path]


@given(st.dictionaries(st.sampled_from([*LEAVES[:4], r"layers\.1\..*", r"^model\..*_proj", r"\d\.attn\.\w+"]),
                       st.integers(1, 9), min_size=1))
def test_ranks_follow_the_first_key(pattern):
    config = Config(r=10, target_modules=LEAVES[:4], rank_pattern=pattern)
    for target in match(MODEL, config, allow_unmatched=True).targets:
        fits = [value for key, value in pattern.items()
                if re.fullmatch(key, target.path)
                or any(re.fullmatch(key, target.path[i + 1:]) and not key.startswith("^")
                       for i, c in enumerate(target.path) if c == ".")]
        assert target.r == (fits[0] if fits else 10)


def test_a_list_of_shapes_is_matched_like_a_model():
    shapes = [("h.*.q", (4, 4), 3), ("h.*.k", (4, 4), 3), ("wte", (9, 4), 1, "Embedding"), ("h.*.ln.weight", (4,), 3)]
    assert hits(shapes, target_modules=["q"], layers_to_transform=[0, 2]) == ["h.0.q", "h.2.q"]
    assert hits(shapes, target_modules=["wte"]) == ["wte"]
    assert "'ln' hits" not in refusal(shapes, target_modules=["k", "zz"])
