"""Adapters as values, put into models and taken out again: linear layers. Written out by hand from PEFT's rules."""
import dataclasses
import pickle

import numpy as np
import pytest

import minilora
from minilora import lora, nn
from minilora.errors import ConfigError, DTypeError, FormatError, StateError
from minilora.formats.adapters.saved import SavedAdapter, Update
from minilora.formats.placing.loading import load_adapter
from minilora.formats.placing.saving import saved_adapter


def draw(*shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


class Net(nn.Module):
    def __init__(self, dtype="float64", seed=0):
        made = dict(dtype=dtype, rng=np.random.default_rng(seed))
        self.layers = [nn.Linear(4, 4, **made), nn.Linear(4, 4, bias=False, **made)]
        self.head = nn.Linear(4, 2, **made)
        self.tanh = nn.Tanh()

    def forward(self, x):
        for layer in self.layers:
            x = self.tanh(layer(x))
        return self.head(x)


def config(**settings):
    return lora.Config(**{**dict(r=2, lora_alpha=3, target_modules=["layers.0", "layers.1"]), **settings})


def given(prefix="", paths=("layers.0", "layers.1"), r=2, s=1.5, dtype="float64", **more):
    updates = {prefix + path: Update("linear", draw(r, 4, seed=i, dtype=dtype), draw(4, r, seed=i + 9, dtype=dtype), s)
               for i, path in enumerate(paths)}
    return SavedAdapter(updates, config(), **more)


def bits(model):
    return [(path, p.data.tobytes(), p.trainable, p.version, id(p)) for path, p in model.named_parameters()] + \
        [(path, type(module)) for path, module in model.named_modules()]


def refused(model, source, *words, error=FormatError, **options):
    """The load is refused with these words in the message, and nothing of the model has changed."""
    before, x = bits(model), draw(3, 4, dtype=next(model.parameters()).dtype)
    y = model(x).data.tobytes()
    with pytest.raises(error) as caught:
        load_adapter(model, source, **options)
    assert bits(model) == before and (model(x).data.tobytes() == y)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in:\n{caught.value}"
    return str(caught.value)


def reference(model, saved, x):
    """The outputs of the adapted model by W + s B A."""
    for i, update in enumerate(saved.updates.values()):
        layer = model.layers[i]
        W = layer.weight.data + update.s * update.B @ update.A
        x = x @ W.T + (0 if layer.bias is None else layer.bias.data)
        x = np.tanh(x)
    return x @ model.head.weight.data.T + model.head.bias.data


def test_an_adapter_takes_part_with_the_scaling_of_the_file():
    model, saved = Net(), given()
    expected = reference(model, saved, draw(5, 4))
    report = load_adapter(model, saved, "poems")
    np.testing.assert_allclose(model(draw(5, 4)).data, expected, rtol=1e-12)
    assert [(row.path, row.r, row.scaling) for row in report.layers] == [("layers.0", 2, 1.5), ("layers.1", 2, 1.5)]
    assert not any(p.trainable for p in model.parameters())
    adapter = model.layers[0].adapters["poems"]
    assert adapter.config == saved.config and adapter.scaling == 1.5 and "poems" in str(report) and report.names == ""


def test_what_is_saved_is_what_was_loaded_bit_for_bit():
    model, saved = Net(), given()
    load_adapter(model, saved, "a")
    back = saved_adapter(model)
    assert back.updates.keys() == saved.updates.keys() and back.config == saved.config
    for path, update in saved.updates.items():
        np.testing.assert_array_equal(back.updates[path].A, update.A)
        np.testing.assert_array_equal(back.updates[path].B, update.B)
        assert back.updates[path].s == update.s
    back.updates["layers.0"].A[...] = 0  # a copy
    assert model.layers[0].lora_A.data.any()


def test_the_scaling_wins_over_the_config_to_the_last_bit():
    model, saved = Net(), given(s=0.1 + 0.2)
    load_adapter(model, saved)
    assert model.layers[0].scaling == 0.1 + 0.2 == saved_adapter(model).updates["layers.0"].s
    assert model.layers[0].lora_alpha == (0.1 + 0.2) * 2


@pytest.mark.parametrize("name", ["lora_alpha", "alpha_pattern"])
def test_the_alpha_of_the_config_is_named_where_it_gives_s(name):
    settings = dict(lora_alpha=5.0) if name == "lora_alpha" else dict(alpha_pattern={"layers.0": 5.0})
    saved = dataclasses.replace(given(s=5.0 / 2 ** 0.5), config=config(use_rslora=True, **settings))
    model = Net()
    report = load_adapter(model, saved)
    assert report.layers[0][3:6] == (5.0, 5.0 / 2 ** 0.5, "alpha / sqrt r")


@pytest.mark.parametrize("file, base, kept", [("float16", "float32", "float32"), ("float32", "float64", "float64"),
                                              ("float64", "float32", "float32"), ("float32", "float16", "float32")])
def test_numbers_get_the_dtype_that_is_trained_beside_the_weight(file, base, kept):
    model = Net(base)
    load_adapter(model, given(dtype=file))
    adapter = model.layers[0].adapter
    assert adapter.lora_A.dtype == kept and model.layers[0].weight.dtype == base
    np.testing.assert_array_equal(adapter.lora_A.data, draw(2, 4, dtype=file).astype(kept))


def test_bfloat16_is_widened():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    model, saved = Net("float32"), given(dtype=ml_dtypes.bfloat16)
    load_adapter(model, saved)
    np.testing.assert_array_equal(model.layers[0].lora_A.data, saved.updates["layers.0"].A.astype("float32"))


def test_read_only_and_strided_arrays_are_copied():
    saved = given()
    for update in saved.updates.values():
        update.A.flags.writeable = False
    turned = {path: dataclasses.replace(u, B=np.asfortranarray(u.B)) for path, u in saved.updates.items()}
    model = Net()
    load_adapter(model, dataclasses.replace(saved, updates=turned), trainable=True)
    minilora.optim.SGD(model.parameters(), lr=0.1)
    assert model.layers[0].lora_A.trainable and model.layers[0].lora_A.data.flags.writeable


def test_trainable_trains_what_inject_would():
    model = Net()
    load_adapter(model, given(), trainable=True)
    assert sorted(path for path, p in model.named_parameters() if p.trainable) == [
        f"layers.{i}.adapters.default.lora_{x}" for i in (0, 1) for x in "AB"]


def test_a_second_one_beside_the_first_and_again_after_removal():
    model = Net()
    base = model(draw(3, 4)).data
    load_adapter(model, given(), "one")
    first = model(draw(3, 4)).data
    load_adapter(model, given(paths=("layers.1",), s=0.5), "two")
    assert list(model.layers[0].active) == [] and list(model.layers[1].active) == ["two"]
    lora.activate(model, "one")
    np.testing.assert_array_equal(model(draw(3, 4)).data, first)
    refused(model, given(), "already", error=ConfigError, name="one")
    for name in ("one", "two"):
        lora.remove(model, name)
    np.testing.assert_array_equal(model(draw(3, 4)).data, base)
    load_adapter(model, given(), "one")
    np.testing.assert_array_equal(model(draw(3, 4)).data, first)


def test_a_model_with_an_adapter_can_be_pickled_and_saved_again():
    model = Net()
    load_adapter(model, given(metadata={"k": "v"}), "one")
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again(draw(3, 4)).data, model(draw(3, 4)).data)
    assert saved_adapter(again).updates["layers.0"].s == 1.5


# -- what is refused ------------------------------------------------------------------------------------------------------

def test_shapes_that_do_not_fit_are_all_named():
    saved = given()
    wrong = dict(saved.updates)
    wrong["layers.0"] = dataclasses.replace(wrong["layers.0"], A=draw(2, 5))
    wrong["layers.1"] = dataclasses.replace(wrong["layers.1"], B=draw(3, 2))
    refused(Net(), dataclasses.replace(saved, updates=wrong), "layers.0: expected A (2, 4)", "(2, 5)", "layers.1: expected",
            "(3, 2)")


@pytest.mark.parametrize("A, B", [((4, 2), (2, 3)), ((2, 3), (4, 2))], ids=["mlx", "weight stored (in, out)"])
def test_a_transposed_file_is_told(A, B):
    class Wide(nn.Module):
        def __init__(self):
            self.fc = nn.Linear(4, 3, dtype="float64", rng=0)

        def forward(self, x):
            return self.fc(x)

    saved = SavedAdapter({"fc": Update("linear", draw(*A), draw(*B), 1.0)}, config(target_modules=["fc"]))
    refused(Wide(), saved, "looks transposed")


def test_another_kind_is_refused():
    saved = given()
    wrong = {path: dataclasses.replace(u, kind="embedding") for path, u in saved.updates.items()}
    refused(Net(), dataclasses.replace(saved, updates=wrong), "an update of an embedding", "a linear")


def test_nan_and_inf_are_counted_and_named_and_taken_if_asked():
    saved = given()
    saved.updates["layers.0"].B[1, 1] = np.nan
    saved.updates["layers.1"].B[0, :] = np.inf
    refused(Net(), saved, "layers.0.lora_B: 1 of 8", "layers.1.lora_B: 2 of 8", "allow_nonfinite=True")
    model = Net()
    load_adapter(model, saved, allow_nonfinite=True)
    assert np.isnan(model.layers[0].lora_B.data).sum() == 1


def test_what_overflows_the_dtype_is_not_finite():
    saved = given()
    saved.updates["layers.0"].A[0, 0] = 1e300
    with pytest.raises(FormatError, match="layers.0.lora_A: 1 of 8"):
        load_adapter(Net("float32"), saved)


def test_an_adapter_of_zeros_is_noted():
    saved = given()
    for update in saved.updates.values():
        update.B[...] = 0
    assert any("untrained" in note for note in load_adapter(Net(), saved).notes)


def test_nothing_at_all_is_refused():
    refused(Net(), SavedAdapter({}, config()), "no update")


def test_states_and_arguments():
    model = Net()
    load_adapter(model, given(), "one")
    lora.merge(model, allow_lossy=True)
    refused(model, given(), "lora.unmerge(model)", error=StateError, name="two")
    with pytest.raises(StateError, match="lora.unmerge"):
        saved_adapter(model)
    lora.unmerge(model)
    with lora.disabled(model), pytest.raises(StateError, match="leave the with block"):
        load_adapter(model, given(), "two")
    with pytest.raises(DTypeError, match="expected a model"):
        load_adapter("model", given())
    with pytest.raises(ConfigError, match="read already"):
        load_adapter(Net(), given(), dialect="peft")
    with pytest.raises(ConfigError, match="name consists"):
        load_adapter(Net(), given(), "a/b")
    with pytest.raises(ConfigError, match="say which"):
        saved_adapter(Net())
    with pytest.raises(ConfigError, match="no adapter of the name"):
        saved_adapter(model, "three")


def test_one_layer_at_two_places_is_one_layer():
    model = Net()
    model.layers[1] = model.layers[0]
    refused(model, given(), "at another place")


@pytest.mark.parametrize("line", range(0, 200, 7))
def test_an_interrupt_leaves_the_model_as_it_was(line):
    from interrupts import Interrupt

    model = Net()
    load_adapter(model, given(), "one")
    before = bits(model)
    run = Interrupt(line)
    run.during(load_adapter, model, given(paths=("layers.1",)), "two")
    if "two" not in model.layers[1].adapters:
        assert bits(model) == before
