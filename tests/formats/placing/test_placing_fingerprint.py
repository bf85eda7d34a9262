"""An adapter knows its base: row 32 of the faults, one file for two bases of one shape, and what a fingerprint is of."""
import dataclasses
import hashlib
import json

import numpy as np
import pytest

from minilora import lora, nn, to_host
from minilora.errors import FormatError
from minilora.formats.adapters.saved import SavedAdapter, Update
from minilora.formats.placing.fingerprint import KEY, digest
from minilora.formats.placing.loading import load_adapter
from minilora.formats.placing.saving import saved_adapter


class Net(nn.Module):
    def __init__(self, seed=0, dtype="float32"):
        rng = np.random.default_rng(seed)
        self.a, self.b = (nn.Linear(4, 3, rng=rng).to(dtype=dtype) for _ in "ab")
        self.c = nn.Linear(4, 3, rng=rng).to(dtype=dtype)

    def forward(self, x):
        return self.a(x) + self.b(x) + self.c(x)


def saved_with(model, **settings):
    config = lora.Config(**{**dict(r=2, lora_alpha=3, target_modules=["a", "b"]), **settings})
    lora.inject(model, config, "one", rng=1)
    for layer in (model.a, model.b):
        layer.lora_B.data += 1
    return saved_adapter(model, "one")


def refused(model, source, *words):
    before = [to_host(p.data).tobytes() for p in model.parameters()]
    with pytest.raises(FormatError) as caught:
        load_adapter(model, source)
    assert [to_host(p.data).tobytes() for p in model.parameters()] == before
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in:\n{caught.value}"
    return str(caught.value)


def test_the_base_it_was_saved_with():
    report = load_adapter(Net(), saved_with(Net()))
    assert report.fingerprint == "the base is the one that it was saved with" and not report.forced


def test_another_base_of_the_same_shape_tells_which_tensors():
    other = Net()
    other.b.weight.data = other.b.weight.data + np.float32(1e-6)
    text = refused(other, saved_with(Net()), "another base: b.weight", "force=True")
    assert "a.weight" not in text
    other.b.weight.data = Net().b.weight.data
    other.c.weight.data = other.c.weight.data + 1  # which the adapter does not change
    assert not load_adapter(other, saved_with(Net())).forced


def test_force_is_recorded_in_the_report_and_in_the_next_file_and_the_one_after():
    other, saved = Net(seed=5), saved_with(Net())
    report = load_adapter(other, saved, force=True)
    assert report.forced and "a.weight" in report.fingerprint and any("another base" in note for note in report.notes)
    again = saved_adapter(other)
    assert "force=True" in json.loads(again.metadata[KEY])["forced"]
    later = Net(seed=5)
    report = load_adapter(later, again)
    assert not report.forced and "force=True" in report.fingerprint  # its base now, and how it came here
    assert "force=True" in json.loads(saved_adapter(later).metadata[KEY])["forced"]


def test_without_one_it_loads_and_says_so():
    saved = dataclasses.replace(saved_with(Net()), metadata={"other": "kept"})
    report = load_adapter(model := Net(seed=3), saved)
    assert "has none" in report.fingerprint
    assert saved_adapter(model).metadata["other"] == "kept"
    assert KEY not in saved_adapter(model, with_fingerprint=False).metadata


def test_other_names_in_the_file():
    saved = saved_with(Net())
    renamed = dataclasses.replace(saved, updates={f"x_{path}": update for path, update in saved.updates.items()})
    mapping = {"x_": ""}
    assert "the one that" in load_adapter(Net(), renamed, mapping=mapping).fingerprint
    with pytest.raises(FormatError, match="the 2 weights"):
        load_adapter(Net(seed=4), renamed, mapping=mapping)
    fewer = dataclasses.replace(saved, updates={"a": saved.updates["a"]})
    assert "the one that" in load_adapter(Net(), fewer).fingerprint
    more = {**saved.updates, "c": saved.updates["a"]}
    assert "nothing is said of c" in load_adapter(Net(), dataclasses.replace(saved, updates=more)).fingerprint


def test_the_names_in_the_file_are_those_that_mapping_makes():
    model = Net()
    saved_with(model)
    named = saved_adapter(model, mapping={"": "net."})
    assert set(json.loads(named.metadata[KEY])["tensors"]) == {"net.a", "net.b"} == set(named.updates)
    assert load_adapter(Net(), named, mapping={"net.": ""}).fingerprint.startswith("the base is")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_s_is_exact_although_a_config_says_alpha(use_rslora):
    saved = saved_with(Net(), lora_alpha=0.7, r=3, use_rslora=use_rslora)
    s = saved.updates["a"].s
    rounded = {path: dataclasses.replace(update, s=float(np.nextafter(s, 1))) for path, update in saved.updates.items()}
    load_adapter(model := Net(), dataclasses.replace(saved, updates=rounded))
    assert model.a.scaling == s
    other = {path: dataclasses.replace(update, s=2 * s) for path, update in saved.updates.items()}
    changed = dataclasses.replace(saved, updates=other)
    refused(Net(), changed, "a: s =", "the config was changed")
    load_adapter(model := Net(), changed, force=True)
    assert model.a.scaling == 2 * s


def test_a_digest_is_of_values_and_not_of_how_they_lie():
    W = np.random.default_rng(0).standard_normal((6, 5)).astype("float16")
    layer = nn.Linear(5, 6, rng=0)

    def of(array):
        layer.weight.data = array
        return digest(layer)

    wide = of(W.astype("float32"))
    expected = hashlib.sha256(b"[6, 5] float32 " + W.astype("<f4").tobytes()).hexdigest()
    assert wide == expected == of(W) == of(np.asfortranarray(W.astype("float32"))) == of(W.astype(">f4").astype("float32"))
    assert of(W.astype("float64")) != wide
    turned = lora.Linear(5, 6, fan_in_fan_out=True, rng=0)
    turned.weight.data = W.astype("float32").T.copy()
    assert digest(turned) == wide


def test_bfloat16_and_what_it_is_in_float32():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    W = np.random.default_rng(0).standard_normal((6, 5)).astype(ml_dtypes.bfloat16)
    layer = nn.Linear(5, 6, rng=0)
    layer.weight.data = W.astype("float32")
    wide = digest(layer)
    layer.weight.data = W
    assert digest(layer) == wide


@pytest.mark.parametrize("shape", [(1, 1), (700, 1000), (3, 400_000)])
def test_blocks_do_not_show(shape):
    W = np.random.default_rng(0).standard_normal(shape).astype("float32")
    layer = nn.Linear(1, 1, rng=0)
    layer.weight.data = W
    assert digest(layer) == hashlib.sha256(f"{list(shape)} float32 ".encode() + W.tobytes()).hexdigest()


def test_another_dtype_is_told():
    saved = saved_with(Net())
    refused(Net().to(dtype="float16"), saved, "float32 [3, 4] there, float16 [3, 4] here")
    half = Net().to(dtype="float16")
    kept = saved_with(half)
    load_adapter(Net().to(dtype="float16").to(dtype="float32"), kept)


@pytest.mark.parametrize("text", ["", "1", "[]", "{}", '{"version": 2}', "[" * 5000,
                                  '{"version": 1, "tensors": 3, "s": {}, "base": ""}',
                                  '{"version": 1, "tensors": {"a": 1}, "s": {}, "base": ""}',
                                  '{"version": 1, "tensors": {}, "s": {"a": NaN}, "base": ""}',
                                  '{"version": 1, "tensors": {}, "s": [], "base": ""}',
                                  '{"version": 1, "tensors": {}, "s": {"a": "1"}, "base": ""}'])
def test_what_is_no_fingerprint_is_refused_and_not_believed(text):
    saved = dataclasses.replace(saved_with(Net()), metadata={KEY: text})
    refused(Net(), saved, "is no fingerprint")


def test_convolutions_and_tables_have_one_too():
    class Mixed(nn.Module):
        def __init__(self, seed):
            rng = np.random.default_rng(seed)
            self.conv, self.emb = nn.Conv2d(2, 3, 2, rng=rng), nn.Embedding(5, 4, rng=rng)

    def given(model):
        lora.inject(model, lora.Config(r=1, target_modules=["conv", "emb"]), rng=0)
        return saved_adapter(model)

    saved = given(Mixed(0))
    assert load_adapter(Mixed(0), saved).fingerprint.startswith("the base is")
    with pytest.raises(FormatError, match="conv.weight(.|\n)*emb.weight"):
        load_adapter(Mixed(1), saved)


def test_the_metadata_of_an_unknown_writer_is_carried():
    update = Update("linear", np.ones((1, 4), "float32"), np.ones((3, 1), "float32"), 1.0)
    saved = SavedAdapter({"a": update}, lora.Config(r=1, lora_alpha=1, target_modules=["a"]),
                         metadata={"format": "pt", "ss_tag": "x"})
    load_adapter(model := Net(), saved)
    assert saved_adapter(model).metadata.keys() == {"ss_tag", KEY}


def four_bits(model, kind="nf4", **settings):
    from minilora import quant
    quant.quantize(model.requires_grad(False), kind, **settings)
    return model


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_base_in_low_precision_is_a_base_of_its_own(kind, device):
    source = saved_with(four_bits(Net(), kind))
    tensors = json.loads(source.metadata[KEY])["tensors"]
    assert {name: each["dtype"] for name, each in tensors.items()} == {"a": kind, "b": kind}
    load_adapter(four_bits(Net(), kind), source)
    text = refused(Net(), source, f"({kind} [3, 4] there, float32 [3, 4] here)", f"a base in {kind} is another one",
                   "minilora quantize", "--base-dtype")
    assert text.count("is another one than that from which it was made") == 1
    refused(four_bits(Net(), kind), saved_with(Net()), f"(float32 [3, 4] there, {kind} [3, 4] here)", f"a base in {kind}")
    refused(four_bits(Net(seed=1), kind), source, "not the one that the adapter was saved with")
    report = load_adapter(Net(), source, force=True)
    assert "although" in str(report) or "force" in str(report)


def test_decoded_to_float32_it_is_the_same_base(device):
    from minilora import quant
    source, model = saved_with(four_bits(Net())), four_bits(Net())
    quant.dequantize(model)
    load_adapter(model, source)
