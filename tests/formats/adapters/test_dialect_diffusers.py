"""diffusers' dialect: keys of three ages, parts of a pipeline, alpha in the metadata."""
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from saved_oracle import D, adapter, as_source, assert_rounded, assert_same, source, update

from minilora.errors import FormatError
from minilora.formats.adapters.diffusers import Diffusers

RNG = np.random.default_rng(0)
A, B = np.array([[1, 2, 3], [0, 1, 0]], "float32"), np.array([[1, 0], [2, 1]], "float32")


def told(**fields):
    return {"lora_adapter_metadata": json.dumps({name.replace("__", "."): value for name, value in fields.items()})}


def new(path="unet.a.to_q", **more):
    return {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B, **{f"{path}.{key}": array for key, array in more.items()}}


@pytest.mark.parametrize("down, up, path", [
    ("unet.a.to_q.lora_A.weight", "unet.a.to_q.lora_B.weight", "unet.a.to_q"),
    ("unet.a.to_q.lora.down.weight", "unet.a.to_q.lora.up.weight", "unet.a.to_q"),
    ("unet.a.proj_in.lora.down.weight", "unet.a.proj_in.lora.up.weight", "unet.a.proj_in"),
    ("unet.a.processor.to_q_lora.down.weight", "unet.a.processor.to_q_lora.up.weight", "unet.a.to_q"),
    ("a.attn1.processor.to_k_lora.down.weight", "a.attn1.processor.to_k_lora.up.weight", "a.attn1.to_k"),
    ("unet.a.processor.to_out_lora.down.weight", "unet.a.processor.to_out_lora.up.weight", "unet.a.to_out.0"),
    ("text_encoder.x.to_out_lora.down.weight", "text_encoder.x.to_out_lora.up.weight", "text_encoder.x.out_proj"),
    ("text_encoder_2.x.to_v_lora.down.weight", "text_encoder_2.x.to_v_lora.up.weight", "text_encoder_2.x.v_proj"),
    ("text_encoder.x.q_proj.lora_linear_layer.down.weight", "text_encoder.x.q_proj.lora_linear_layer.up.weight",
     "text_encoder.x.q_proj"),
])
def test_keys_of_every_age(down, up, path):
    given = source({down: A, up: B})
    assert Diffusers().recognise(given)
    found = Diffusers().read(given)
    assert [*found.updates] == [path] and np.array_equal(D(found.updates[path]), [[1, 2, 3], [2, 5, 6]])
    assert "s is 1" in found.notes[0]


@pytest.mark.parametrize("keys, metadata, config, yes", [
    (["unet.a.lora_A.weight"], {}, None, True),
    (["unet.a.lora_A.weight"], {}, {"peft_type": "LORA"}, False),
    (["a.lora_A.weight"], {}, None, False),
    (["a.lora_A.weight"], told(r=2), None, True),
    (["a.lora_A.weight", "unet.a.lora_B.weight"], {}, None, False),
    (["transformer.h.0.attn.c_attn.lora_A.weight"], {}, None, False),
    (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], {}, None, True),
    (["base_model.model.unet.a.lora_A.weight"], told(r=2), None, False),
    (["x.lora_down.weight", "x.lora_up.weight", "x.alpha"], {}, None, False),
    (["x.lora_A", "x.lora_a"], {}, None, False),
    ([], {}, None, False),
])
def test_what_is_recognised(keys, metadata, config, yes):
    assert Diffusers().recognise(source(dict.fromkeys(keys, A), config, metadata)) is yes


def test_alpha_of_each_part_is_in_the_metadata():
    tensors = {**new("unet.a"), **new("unet.b"), **new("text_encoder.a")}
    metadata = told(unet__r=2, unet__lora_alpha=4, unet__alpha_pattern={"b": 1}, text_encoder__r=2, text_encoder__lora_alpha=8,
                    text_encoder__use_rslora=True, unet__peft_type="LORA", unet__target_modules=["a", "b"])
    found = Diffusers().read(source(tensors, metadata=metadata)).updates
    assert {path: u.s for path, u in found.items()} == {"unet.a": 2, "unet.b": 0.5, "text_encoder.a": 8 / 2 ** 0.5}


def test_alpha_of_a_single_model():
    found = Diffusers().read(source(new("a.b"), metadata=told(r=2, lora_alpha=1)))
    assert found.updates["a.b"].s == 0.5 and found.notes == ()


def test_case_4_and_tensors_that_say_alpha():
    wide = {"unet.x.lora_A.weight": np.ones((128, 3), "float32"), "unet.x.lora_B.weight": np.ones((2, 128), "float32")}
    assert Diffusers().read(source(wide, metadata={"alpha": "8"})).updates["unet.x"].s == 0.0625
    both = {**wide, "unet.x.alpha": np.float32(64)}
    assert Diffusers().read(source(both, metadata={"alpha": "8"})).updates["unet.x"].s == 0.5
    assert Diffusers().read(source(both, metadata=told(unet__r=128, unet__lora_alpha=1))).updates["unet.x"].s == 0.5
    with pytest.raises(FormatError, match="__metadata__: alpha 'eight'"):
        Diffusers().read(source(wide, metadata={"alpha": "eight"}))


@pytest.mark.parametrize("shape", [(1, 5, 1, 1), (5,)])
def test_case_14_lengths_of_a_convolution(shape):
    one = update(RNG, "convolution")
    tensors = {"unet.c.lora_A.weight": one.A, "unet.c.lora_B.weight": one.B,
               "unet.c.lora_magnitude_vector": np.arange(1, 6, dtype="float32").reshape(shape)}
    found = Diffusers().read(source(tensors, metadata=told(unet__r=2, unet__use_dora=True))).updates["unet.c"]
    assert np.array_equal(found.magnitude, [1, 2, 3, 4, 5])


@given(st.integers(0, 2 ** 32), st.sampled_from(["float32", "float16"]), st.sampled_from(["", "dora", "bias"]),
       st.sampled_from(["linear", "convolution"]), st.booleans())
def test_drawn_adapters_come_back_to_the_bit(seed, dtype, extra, kind, parts):
    rng = np.random.default_rng(seed)
    starts = ("unet.", "transformer.", "text_encoder.") if parts else ("",)
    made = dict(dtype=dtype, dora=extra == "dora", bias=extra == "bias")
    before = adapter({f"{start}blocks.{i}.q+v": update(rng, kind, r=int(rng.integers(1, 4)), s=float(rng.normal()),
                                                       out=int(rng.integers(1, 4)), **made)
                      for start in starts for i in (1, 10)})
    written = Diffusers().write(before, component="")
    assert Diffusers().recognise(as_source(written)) and written.metadata["format"] == "pt"
    after = Diffusers().read(as_source(written))
    assert_same(before, dataclasses.replace(after, updates={path: dataclasses.replace(u, s=before.updates[path].s)
                                                            for path, u in after.updates.items()}))
    for path, u in after.updates.items():
        assert u.s == pytest.approx(before.updates[path].s, rel=2e-16)


def test_without_metadata_every_s_has_to_be_1():
    before = adapter({"unet.a": update(RNG, s=4.0), "unet.b": update(RNG, s=1.0)})
    written = Diffusers().write(before, metadata=False)
    assert "lora_adapter_metadata" not in written.metadata
    after = Diffusers().read(as_source(written))
    assert all(u.s == 1 and np.array_equal(D(u), D(before.updates[path])) for path, u in after.updates.items())
    thirds = adapter({"unet.a": update(RNG, s=1 / 3)})
    with pytest.raises(FormatError, match="metadata=True says it, fold=True rounds"):
        Diffusers().write(thirds, metadata=False)
    written = Diffusers().write(thirds, metadata=False, fold=True)
    assert "folded" in written.notes[0]
    assert_rounded(thirds.updates["unet.a"], Diffusers().read(as_source(written)).updates["unet.a"])


def test_which_part_of_a_pipeline():
    before = adapter({"a.b": update(RNG), "unet.c": update(RNG)})
    with pytest.raises(FormatError, match="a.b: which part .* component='unet'"):
        Diffusers().write(before)
    with pytest.raises(FormatError, match="for all or for none"):
        Diffusers().write(before, component="")
    assert "unet.a.b.lora_A.weight" in Diffusers().write(before, component="unet").tensors
    with pytest.raises(FormatError, match="expected one of unet"):
        Diffusers().write(before, component="vae")
    with pytest.raises(FormatError, match="unet.b is there twice"):
        Diffusers().write(adapter({"b": update(RNG), "unet.b": update(RNG)}), component="unet")
    with pytest.raises(FormatError, match="kohya's name"):
        Diffusers().write(adapter({"lora_unet_a_b": update(RNG)}), component="unet")


@pytest.mark.parametrize("updates, message", [
    ({"unet.e": update(RNG, "embedding")}, "update of an embedding"),
    ({"unet.a": update(RNG, dora=True), "unet.b": update(RNG)}, "b: without DoRA's lengths"),
    ({"unet.a": update(RNG, bias=True), "unet.b": update(RNG)}, "b: without a bias"),
])
def test_what_diffusers_cannot_say(updates, message):
    with pytest.raises(FormatError, match=message):
        Diffusers().write(adapter(updates))


@pytest.mark.parametrize("tensors, metadata, message", [
    ({"unet.x.lora_A.weight": A}, {}, "unet.x: lora_B.weight is missing"),
    ({"unet.x.lora.up.weight": A}, {}, "unet.x: lora_A.weight is missing"),
    ({**new(), "unet.a.processor.to_q_lora.down.weight": A}, {}, "says again what unet.a.to_q.lora_A.weight says"),
    ({**new(), "unet.a.processor.to_r_lora.down.weight": A}, {}, "to_r_lora.down.weight: this key is not understood"),
    ({**new(), "unet.a.to_q.weight": A}, {}, "not understood"),
    ({**new(), "unet.e.lora_embedding_A": A}, {}, "not understood"),
    ({**new(), **new("b")}, {}, "b: no part of a pipeline"),
    (new(alpha=np.float32(0)), {}, "unet.a.to_q.alpha: expected one number above 0, got 0.0"),
    (new(alpha=np.float32("nan")), {}, "got nan"),
    (new(), told(unet__r=3), "rank 3 in lora_adapter_metadata, 2 in the tensors"),
    (new(), told(unet__r=2, unet__rank_pattern={"a.to_q": 4}), "rank 4 in"),
    (new(), told(text_encoder__r=2), "says nothing of unet"),
    (new(), told(unet__r=2, unet__use_dora=True), "lora_magnitude_vector is missing"),
    (new(lora_magnitude_vector=np.ones(2, "float32")), told(unet__r=2), "use_dora is off"),
    (new(), told(unet__r="2"), "r must be an int"),
    (new(), told(unet__lora_alpha=0), "must not be 0"),
    (new(), told(unet__peft_type="LOHA"), "peft_type is .LOHA., which minilora does not read"),
    (new(), told(unet__r=2, unet__alpha_pattern={"(": 2}), "no regular expression|not a regular expression"),
    (new(), told(unet__r=2, unet__init_lora_weights="pissa"), "the base was changed too"),
    (new(), {"lora_adapter_metadata": "[]"}, "no JSON object"),
    (new(), {"lora_adapter_metadata": "{"}, "no JSON object"),
    (new(), {"lora_adapter_metadata": '{"unet.r": 2, "unet.r": 2}'}, "no JSON object"),
    (new(), {"lora_adapter_metadata": "[" * 100000}, "no JSON object"),
    ({"unet.x.lora_A.weight": A, "unet.x.lora_B.weight": B[:, :1]}, {}, "rank 2, .* rank 1"),
    (new(lora_magnitude_vector=np.ones((2, 1), "float32")), {}, "magnitude: expected shape"),
    (new(**{"lora_B.bias": np.ones(2, "float32"), "lora_magnitude_vector": np.ones(2, "float32")}), {}, "no update with both"),
    ({"unet.x.lora_A.weight": np.float32(1), "unet.x.lora_B.weight": np.float32(1)}, {}, "expected A"),
    ({}, {}, "no lora_A"),
])
def test_what_is_refused(tensors, metadata, message):
    with pytest.raises(FormatError, match=message):
        Diffusers().read(source(tensors, metadata=metadata))
