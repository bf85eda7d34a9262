"""What a file replaces as a whole: heads of another size, biases of the base, running means. Rows 11 and 22 of the cases."""
import dataclasses

import numpy as np
import pytest

import minilora
from minilora import lora, nn
from minilora.errors import FormatError, StateError
from minilora.formats.adapters.saved import SavedAdapter, Update
from minilora.formats.placing.loading import load_adapter
from minilora.formats.placing.saving import saved_adapter


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


class Net(nn.Module):
    """A trunk, two heads of which one name ends like the other, a norm, and a head of two layers."""

    def __init__(self, seed=0):
        made = dict(dtype="float64", rng=np.random.default_rng(seed))
        self.lin = nn.Linear(4, 4, **made)
        self.norm = nn.LayerNorm(4, dtype="float64")
        self.pre_classifier = nn.Linear(4, 4, **made)
        self.classifier = nn.Linear(4, 2, **made)

    def forward(self, x):
        return self.classifier(self.pre_classifier(self.norm(self.lin(x))))


def given(saved=None, biases=None, **settings):
    updates = {"lin": Update("linear", draw(1, 4), draw(4, 1, seed=1), 0.5)}
    config = lora.Config(**{"r": 1, "lora_alpha": 0.5, "target_modules": ["lin"], **settings})
    return SavedAdapter(updates, config, saved=saved or {}, biases=biases or {})


def bits(model):
    return [(path, p.data.tobytes(), p.trainable, id(p)) for path, p in model.named_parameters()] + \
        [(path, type(module)) for path, module in model.named_modules()]


def refused(model, source, *words, error=FormatError):
    before = bits(model)
    with pytest.raises(error) as caught:
        load_adapter(model, source, "new")
    assert bits(model) == before
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in:\n{caught.value}"


def expected(model, saved, x, weight=None, bias=None):
    W = model.lin.weight.data + 0.5 * saved.updates["lin"].B @ saved.updates["lin"].A
    h = x @ W.T + model.lin.bias.data
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    h = h @ model.pre_classifier.weight.data.T + model.pre_classifier.bias.data
    return h @ weight.T + bias


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_head_with_the_shape_of_the_file(rows):
    model, x = Net(), draw(5, 4)
    saved = given({"classifier.weight": draw(rows, 4, seed=2), "classifier.bias": draw(rows, seed=3)},
                  modules_to_save=["classifier"])
    base, y = model(x).data, expected(model, saved, x, *saved.saved.values())
    report = load_adapter(model, saved, "three")
    np.testing.assert_allclose(model(x).data, y, rtol=1e-10)
    assert report.saved == ("classifier",) and model.classifier.out_features == rows
    assert "pre_classifier" not in str(report.saved)
    with lora.disabled(model):
        np.testing.assert_array_equal(model(x).data, base)
    back = saved_adapter(model).saved
    assert back.keys() == saved.saved.keys()
    assert all(back[path].tobytes() == array.tobytes() for path, array in saved.saved.items())
    lora.remove(model, "three")
    np.testing.assert_array_equal(model(x).data, base)
    assert type(model.classifier) is nn.Linear and model.classifier.out_features == 2


def test_what_the_file_holds_decides_and_not_what_the_config_names():
    model = Net()
    report = load_adapter(model, given({"classifier.weight": draw(2, 4), "classifier.bias": draw(2)}))
    assert report.saved == ("classifier",) and any("does not name it" in note for note in report.notes)
    assert saved_adapter(model).config.modules_to_save == ("classifier",)


def test_the_end_of_a_name_counts_without_a_dot():
    model, saved = Net(), {f"{name}.{p}": draw(*shape) for name, n in (("classifier", 2), ("pre_classifier", 4))
                           for p, shape in (("weight", (n, 4)), ("bias", (n,)))}
    report = load_adapter(model, given(saved, modules_to_save=["classifier", "score"]))
    assert set(report.saved) == {"classifier", "pre_classifier"} and not report.notes


def test_a_part_that_the_file_lacks_stays_the_bases_and_is_noted():
    model, bias = Net(), Net().classifier.bias.data
    report = load_adapter(model, given({"classifier.weight": draw(2, 4)}))
    assert any("lacks bias" in note for note in report.notes)
    np.testing.assert_array_equal(model.classifier.bias.data, bias)
    model = Net()
    load_adapter(model, given({"classifier.weight": draw(3, 4)}))  # a bias of two numbers is none of three outputs
    assert model.classifier.bias is None and model(draw(2, 4)).shape == (2, 3)


def test_a_bias_that_the_base_lacks():
    model = Net()
    model.classifier = nn.Linear(4, 2, bias=False, dtype="float64", rng=0)
    load_adapter(model, given({"classifier.weight": draw(2, 4), "classifier.bias": draw(2, seed=5)}))
    np.testing.assert_array_equal(model.classifier.bias.data, draw(2, seed=5))
    lora.remove(model, "default")
    assert model.classifier.bias is None


@pytest.mark.parametrize("arrays, words", [
    ({"classifier.weight": (2, 5)}, ("classifier.weight: expected (2, 4), got (2, 5)",)),
    ({"classifier.weight": (3, 4), "classifier.bias": (2,)}, ("classifier.bias: expected (3,)", "got (2,)")),
    ({"classifier.weight": (2, 4), "classifier.scale": (2,)}, ("Linear has no scale",)),
    ({"norm.weight": (5,), "norm.bias": (4,)}, ("norm.weight: expected (4,), got (5,)",)),
    ({"score.weight": (2, 4)}, ("score", "nearest in the model", "weight (2, 4)")),
])
def test_what_no_such_module_can_hold(arrays, words):
    refused(Net(), given({path: draw(*shape) for path, shape in arrays.items()}), *words)


def test_a_module_of_several_layers_is_copied_whole():
    class Head(nn.Module):
        def __init__(self, rng):
            self.dense, self.out_proj = (nn.Linear(4, n, dtype="float64", rng=rng) for n in (4, 2))

        def forward(self, x):
            return self.out_proj(self.dense(x))

    class Whole(nn.Module):
        def __init__(self):
            rng = np.random.default_rng(0)
            self.lin, self.classifier = nn.Linear(4, 4, dtype="float64", rng=rng), Head(rng)

        def forward(self, x):
            return self.classifier(self.lin(x))

    saved = {"classifier.dense.weight": draw(4, 4), "classifier.dense.bias": draw(4),
             "classifier.out_proj.weight": draw(3, 4), "classifier.out_proj.bias": draw(3)}
    model = Whole()
    report = load_adapter(model, given(saved, modules_to_save=["classifier"]))
    assert report.saved == ("classifier",) and model(draw(2, 4)).shape == (2, 3)
    assert saved_adapter(model).saved.keys() == saved.keys()
    # a layer inside it that the same adapter adapts: then only the other one is a copy
    both = given({path: array for path, array in saved.items() if "out_proj" in path}, modules_to_save=["classifier"])
    both = dataclasses.replace(both, updates={**both.updates, "classifier.dense": both.updates["lin"]})
    model = Whole()
    assert load_adapter(model, both).saved == ("classifier.out_proj",) and model.classifier.dense.scaling == 0.5


def test_running_means_come_along():
    class Norm(nn.Module):
        state_names = ("running_mean", "batches")

        def __init__(self):
            self.weight = minilora.Parameter(np.ones(4))
            self.running_mean, self.batches = np.zeros(4), 0

        def forward(self, x):
            return (x - self.running_mean) * self.weight

    class Normed(nn.Module):
        def __init__(self):
            self.lin, self.bn = nn.Linear(4, 4, dtype="float64", rng=0), Norm()

        def forward(self, x):
            return self.bn(self.lin(x))

    saved = {"bn.weight": draw(4), "bn.running_mean": draw(4, seed=2), "bn.batches": np.array(7)}
    model = Normed()
    load_adapter(model, given(saved, modules_to_save=["bn"]))
    assert model.bn.batches == 7 and type(model.bn.batches) is int and (model.bn.running_mean == draw(4, seed=2)).all()
    back = saved_adapter(model).saved
    assert back.keys() == saved.keys() and all((back[path] == array).all() for path, array in saved.items())
    refused(Normed(), given({**saved, "bn.running_mean": draw(3)}), "bn.running_mean: expected (4,), got (3,)")


def test_two_adapters_with_a_head_each():
    model = Net()
    for i, name in enumerate(("one", "two")):
        load_adapter(model, given({"classifier.weight": draw(2 + i, 4), "classifier.bias": draw(2 + i)}), name)
    assert model(draw(2, 4)).shape == (2, 3)
    lora.activate(model, "one")
    assert model(draw(2, 4)).shape == (2, 2)


def test_a_module_that_another_adapter_adapts():
    model = Net()
    lora.inject(model, lora.Config(r=1, target_modules=["classifier"]), "other", rng=0)
    refused(model, given({"classifier.weight": draw(2, 4), "classifier.bias": draw(2)}), "other adapters of this model")


def test_a_weight_beside_its_own_update_is_the_bases_or_refused():
    model = Net()
    note = load_adapter(model, given({"lin.weight": Net().lin.weight.data})).notes
    assert any("equals that of this base" in text for text in note)
    refused(Net(), given({"lin.weight": draw(4, 4)}), "lin.weight (4, 4)", "another one than this model's")


# -- biases -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode, paths", [("lora_only", ["lin"]), ("all", ["lin", "norm", "pre_classifier", "classifier"])])
def test_biases_of_the_base(mode, paths):
    model, biases = Net(), {f"{path}.bias": draw(2 if path == "classifier" else 4, seed=8) for path in paths}
    report = load_adapter(model, given(biases=biases, bias=mode), "b", trainable=True)
    assert report.biases == tuple(biases)
    for path, array in biases.items():
        p = getattr(model, path.split(".")[0]).bias
        assert p.data.tobytes() == array.tobytes() and p.trainable
    back = saved_adapter(model)
    assert back.biases.keys() == biases.keys() and back.config.bias == mode
    refused(model, given(biases=biases, bias=mode), "adapter 'b'", error=StateError)


def test_biases_that_the_config_does_not_tell():
    report = load_adapter(model := Net(), given(biases={"norm.bias": draw(4), **{
        f"{name}.bias": draw(n) for name, n in (("lin", 4), ("pre_classifier", 4), ("classifier", 2))}}))
    assert any("bias='all'" in note for note in report.notes) and saved_adapter(model).config.bias == "all"


def test_biases_that_do_not_fit_or_are_missing():
    refused(Net(), given(biases={"lin.bias": draw(3)}, bias="lora_only"), "lin.bias (3,): expected (4,)")
    refused(Net(), given(bias="lora_only"), "lin.bias: missing in the file")
    refused(Net(), given(biases={"lin.bias": draw(4)}, bias="all"), "classifier.bias: missing", "norm.bias: missing")
    model = Net()
    model.lin = nn.Linear(4, 4, bias=False, dtype="float64", rng=0)
    refused(model, given(biases={"lin.bias": draw(4)}, bias="lora_only"), "the model has no such bias")
    load_adapter(model, given(bias="lora_only"))  # there is none to be missing


def test_biases_of_a_whole_module_are_not_missing():
    model, head = Net(), {"classifier.weight": draw(2, 4), "classifier.bias": draw(2)}
    biases = {f"{name}.bias": draw(4) for name in ("lin", "norm", "pre_classifier")}
    load_adapter(model, given(head, biases, bias="all", modules_to_save=["classifier"]))
    back = saved_adapter(model)
    assert back.biases.keys() == biases.keys() and back.saved.keys() == head.keys()


def test_a_bias_in_an_optimizers_array_is_written_in_place():
    from minilora import optim

    model = Net()
    optimizer = optim.SGD([model.lin.bias], lr=0.1)
    load_adapter(model, given(biases={"lin.bias": draw(4, seed=4)}, bias="lora_only"), trainable=True)
    np.testing.assert_array_equal(model.lin.bias.data, draw(4, seed=4))
    model(draw(3, 4)).sum().backward()
    optimizer.step()
    assert model.lin.bias.data.tobytes() != draw(4, seed=4).tobytes()
