"""Which module a path in a file means: rows 8, 12 and 26 of the cases, and what no row draws."""
import numpy as np
import pytest

from minilora import lora, nn
from minilora.errors import ConfigError, FormatError
from minilora.formats.adapters.saved import SavedAdapter, Update
from minilora.formats.placing.loading import load_adapter
from minilora.formats.placing.names import rename, resolve


class Holder(nn.Module):
    """Linear layers (3, 2) at these paths."""

    def __init__(self, *paths, size=2):
        for path in paths:
            *outer, last = path.split(".")
            here = self
            for part in outer:
                if part not in vars(here):
                    setattr(here, part, Holder())
                here = getattr(here, part)
            setattr(here, last, nn.Linear(3, size, dtype="float64", rng=0))


def found(paths, model, mapping=None):
    return resolve(dict.fromkeys(paths, "A (1, 3) B (2, 1)"), model, mapping)


def refused(paths, model, *words, mapping=None, error=FormatError):
    with pytest.raises(error) as caught:
        found(paths, model, mapping)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in:\n{caught.value}"
    return str(caught.value)


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "_orig_mod.", "_orig_mod.base_model.model.",
                                    "base_model.model._orig_mod.", "module.", "model.", "transformer.",
                                    "base_model.model.model.", "module._orig_mod.", "model.model."])
def test_every_known_spelling_of_one_layer(prefix):
    assert found([f"{prefix}lin"], Holder("lin", "other")).paths == {f"{prefix}lin": "lin"}


def test_a_prefix_that_the_model_has_and_the_file_lacks():
    model = Holder("bert.encoder.a", "bert.encoder.b", "classifier")
    mapped = found(["encoder.a", "encoder.b", "classifier"], model)
    assert mapped.paths == {"encoder.a": "bert.encoder.a", "encoder.b": "bert.encoder.b", "classifier": "classifier"}
    assert mapped.how == "'bert.' put in front of the names"


def test_a_head_beside_a_trunk_stays_where_it_is():
    model = Holder("encoder.a", "classifier")
    assert found(["bert.encoder.a", "classifier"], model).paths == {"bert.encoder.a": "encoder.a", "classifier": "classifier"}


def test_one_prefix_for_another():
    model = Holder("model.h.a", "lm_head")
    assert found(["transformer.h.a", "lm_head"], model).paths == {"transformer.h.a": "model.h.a", "lm_head": "lm_head"}


def test_what_fits_as_it_is_stays_although_a_prefix_would_fit_too():
    model = Holder("model.lin", "lin")
    assert found(["lin"], model).paths == {"lin": "lin"} and found(["model.lin"], model).paths == {"model.lin": "model.lin"}


def test_compiled_parts_inside():
    assert found(["h.a._orig_mod.lin"], Holder("h.a.lin")).paths == {"h.a._orig_mod.lin": "h.a.lin"}


def test_an_unknown_prefix_of_the_model_if_there_is_one_only():
    one = found(["h.a", "h.b"], Holder("net.trunk.h.a", "net.trunk.h.b"))
    assert one.paths == {"h.a": "net.trunk.h.a", "h.b": "net.trunk.h.b"}
    two = refused(["h.a"], Holder("net.one.h.a", "net.two.h.a"), "h.a may be net.one.h.a", "net.two.h.a", "mapping=")
    assert "nothing was changed" in two
    # one prefix that fits all of them wins over others that fit some
    assert found(["h.a", "h.b"], Holder("one.h.a", "two.h.a", "two.h.b")).paths == {"h.a": "two.h.a", "h.b": "two.h.b"}


def test_each_by_itself_if_no_rule_fits_all():
    mapped = found(["a.q", "b.q"], Holder("left.a.q", "right.b.q"))
    assert mapped.paths == {"a.q": "left.a.q", "b.q": "right.b.q"} and "by itself" in mapped.how


def test_two_paths_for_one_layer_are_an_error():
    refused(["lin", "model.lin"], Holder("lin"), "both mean lin")


def test_thinker_is_asked_about_and_the_advice_works():
    model, path = Holder("lin", "deep.lin2"), "thinker.base_model.model.lin"
    text = refused([path], model, path, "A (1, 3) B (2, 1)", "lin", "(2, 3)")
    advice = text.split("say so: mapping=")[1].strip()
    assert advice == "{'thinker.base_model.model.': ''}"
    for mapping in (eval(advice), {"thinker.": ""}, lambda name: name.removeprefix("thinker.")):
        assert found([path], model, mapping).paths == {path: "lin"}


@pytest.mark.parametrize("file, model", [
    ("model.language_model.layers.", "language_model.model.layers."), ("text_model.encoder.layers.", "encoder.layers."),
    ("language_model.layers.", "layers.")])
def test_a_part_in_another_place_is_never_guessed(file, model):
    paths = [f"{file}{name}.q_proj" for name in ("one", "two")]
    here = Holder(*(f"{model}{name}.q_proj" for name in ("one", "two")))
    text = refused(paths, here, paths[0], paths[1], f"{model}one.q_proj", "2 of 2 paths")
    mapping = eval(text.split("say so: mapping=")[1])
    assert found(paths, here, mapping).paths == {path: path.replace(file, model) for path in paths}


def test_all_that_fit_nothing_are_listed_and_none_of_the_others():
    paths = [f"layers.{name}" for name in "abcdefg"]
    text = refused([*paths, "layers.x", "vision.y"], Holder(*paths), "layers.x", "vision.y", "2 of 9 paths")
    assert "layers.c " not in text.split("nearest")[0]


def test_a_long_list_is_cut():
    paths = [f"v.{i}.q" for i in range(40)]
    text = refused(paths, Holder("lin"), "... and 28 more", "40 of 40")
    assert len(text.splitlines()) < 20


def test_mappings():
    model = Holder("lin", "net.lin3")
    assert found(["x.lin"], model, {"x.": ""}).paths == {"x.lin": "lin"}
    assert found(["lin3"], model, {"": "net."}).paths == {"lin3": "net.lin3"}
    refused(["x.lin"], model, "start of no path", "x.lin", mapping={"x.": "", "y.": ""}, error=ConfigError)
    refused(["x.lin"], model, "dict from prefix to prefix", mapping={"x.": 1}, error=ConfigError)
    refused(["x.lin"], model, "dict from prefix to prefix", mapping="x.", error=ConfigError)
    refused(["x.lin"], model, "function from path to path", mapping=lambda path: None, error=ConfigError)
    refused(["x.lin"], model, "x.lin", "none", mapping={"x.lin": "nowhere"})
    assert rename(["a.b.c", "a.d"], {"a.": "x.", "a.b.": "y."}) == {"a.b.c": "y.c", "a.d": "x.d"}


def test_the_mapped_name_may_have_a_known_prefix_still():
    mapped = found(["thinker.model.lin"], Holder("lin"), {"thinker.": ""})
    assert mapped.paths == {"thinker.model.lin": "lin"} and mapped.how.startswith("names by the mapping given; 'model.'")


def test_what_is_inside_a_lora_layer_is_no_place():
    model = Holder("lin", "other")
    lora.inject(model, lora.Config(r=1, target_modules=["lin"]), "lin2", rng=0)
    refused(["adapters.lin2"], model, "adapters.lin2")
    assert found(["model.lin"], model).paths == {"model.lin": "lin"}


def test_a_tied_head_is_told_with_the_line_to_type():
    model = nn.GPT2(nn.GPT2Config(vocab_size=7, n_positions=4, n_embd=4, n_layer=1, n_head=2), rng=0)
    saved = SavedAdapter({"lm_head": Update("linear", np.ones((1, 4), "float32"), np.ones((7, 1), "float32"), 2.0)},
                         lora.Config(r=1, lora_alpha=2, target_modules=["lm_head"]))
    before = model.wte.weight.data.copy()
    with pytest.raises(FormatError, match="the head of this model is tied") as caught:
        load_adapter(model, saved)
    line = str(caught.value).split("give the model one first: ")[1].splitlines()[0]
    import minilora

    exec(line, {"model": model, "minilora": minilora})
    h = model.hidden([[1, 2]]).data
    load_adapter(model, saved)
    logits = model([[1, 2]]).data
    np.testing.assert_allclose(logits, h @ before.T + 2 * (h.sum(-1, keepdims=True)), rtol=1e-5)
    np.testing.assert_array_equal(model.wte.weight.data, before)
