"""kohya's dialect: alpha a module, names without dots, LyCORIS's DoRA."""
import dataclasses
import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from saved_oracle import D, adapter, as_source, assert_same, source, update

from minilora import nn
from minilora.errors import FormatError
from minilora.formats.adapters.kohya.file import Kohya, model_hash

RNG = np.random.default_rng(0)
DOWN, UP = np.array([[1, 2, 3], [0, 1, 0]], "float32"), np.array([[1, 0], [2, 1]], "float32")


def pair(name="x", **more):
    return {f"{name}.lora_down.weight": DOWN, f"{name}.lora_up.weight": UP,
            **{f"{name}.{part}": array for part, array in more.items()}}


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int64"])
def test_case_1(shape, dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    found = Kohya().read(source(pair(alpha=np.ones(shape, dtype)))).updates["x"]
    assert np.array_equal(D(found), [[0.5, 1, 1.5], [1, 2.5, 3]])


def test_case_2():
    found = Kohya().read(source(pair(), metadata={"ss_network_alpha": "16"}))
    assert np.array_equal(D(found.updates["x"]), [[1, 2, 3], [2, 5, 6]])
    assert "ss_network_alpha '16'" in found.notes[0]
    assert found.metadata == {"ss_network_alpha": "16"}


def test_case_4():
    wide = {"x.lora_down.weight": np.ones((128, 3), "float32"), "x.lora_up.weight": np.ones((2, 128), "float32")}
    assert Kohya().read(source(wide, metadata={"alpha": "8"})).updates["x"].s == 0.0625
    both = {**wide, "x.alpha": np.float32(64)}
    assert Kohya().read(source(both, metadata={"alpha": "8"})).updates["x"].s == 0.5
    for text in ("eight", "", "nan", "inf", "-8", "0", "1_0", "1e999", "8 ", "0x8"):
        with pytest.raises(FormatError, match="__metadata__: alpha"):
            Kohya().read(source(wide, metadata={"alpha": text}))


def test_what_is_recognised():
    kohya = Kohya()
    assert kohya.recognise(source(pair())) and kohya.recognise(source({"x.lora_up.weight": UP}))
    assert not kohya.recognise(source(pair(), {"peft_type": "LORA"}))
    assert not kohya.recognise(source({"to_q_lora.down.weight": DOWN, "a.lora.down.weight": DOWN, "x.alpha": UP}))


class Net(nn.Module):
    def __init__(self):
        self.to_q = [nn.Linear(3, 2)]
        self.proj_in = nn.Conv2d(3, 2, 1)
        self.mid_block = nn.Linear(3, 2)


@pytest.mark.parametrize("modules", [Net(), ["to_q.0", "proj_in", "mid_block"], {"unet": ["to_q.0", "mid_block"]}])
def test_underscores_are_resolved_by_the_modules(modules):
    found = Kohya().read(source({**pair("lora_unet_to_q_0"), **pair("lora_unet_mid_block")}), modules=modules)
    start = "unet." if isinstance(modules, dict) else ""
    assert sorted(found.updates) == [f"{start}mid_block", f"{start}to_q.0"]


def test_several_parts_of_a_pipeline():
    tensors = {**pair("lora_unet_a_b"), **pair("lora_te1_a_b"), **pair("lora_te2_a_b")}
    want = ["text_encoder.a_b", "text_encoder_2.a_b", "unet.a.b"]
    by_part = {"unet": ["a.b"], "text_encoder": ["a_b"], "text_encoder_2": ["a_b"]}
    assert sorted(Kohya().read(source(tensors), modules=by_part).updates) == want
    assert sorted(Kohya().read(source(tensors), modules=want).updates) == want
    with pytest.raises(FormatError, match="no module of this name in modules for 'text_encoder'"):
        Kohya().read(source(tensors), modules={"unet": ["a.b"]})
    with pytest.raises(FormatError, match="no module of this name"):
        Kohya().read(source(tensors), modules=["a.b"])


def test_without_modules_the_names_stay():
    found = Kohya().read(source(pair("lora_te_text_model_q_proj")))
    assert [*found.updates] == ["lora_te_text_model_q_proj"] and "modules=" in found.notes[0]
    assert "lora_te_text_model_q_proj.alpha" in Kohya().write(found).tensors


def test_ambiguous_and_unknown_names():
    with pytest.raises(FormatError, match="may be a.b_c or a_b.c"):
        Kohya().read(source(pair("lora_unet_a_b_c")), modules=["a.b_c", "a_b.c", "d"])
    assert [*Kohya().read(source(pair("lora_unet_d")), modules=["a.b_c", "a_b.c", "d"]).updates] == ["d"]
    with pytest.raises(FormatError, match="the nearest: down.to_q"):
        Kohya().read(source(pair("lora_unet_down_to_qq")), modules=["down.to_q", "up"])
    with pytest.raises(FormatError, match="this is 'text_encoder.a', and so is lora_te1_a"):
        Kohya().read(source({**pair("lora_te_a"), **pair("lora_te1_a")}), modules=["text_encoder.a"])


def test_a_linear_layer_and_a_1x1_convolution_are_interchangeable():
    flat = Kohya().read(source(pair("lora_unet_proj_in")), modules=Net()).updates["proj_in"]
    assert flat.kind == "convolution" and flat.A.shape == (2, 3, 1, 1) and flat.B.shape == (2, 2, 1, 1)
    tensors = {name: array[..., None, None] for name, array in pair("lora_unet_mid_block").items()}
    four = Kohya().read(source(tensors), modules=Net()).updates["mid_block"]
    assert four.kind == "linear" and np.array_equal(D(four), [[1, 2, 3], [2, 5, 6]])
    assert Kohya().read(source(tensors)).updates["lora_unet_mid_block"].kind == "convolution"


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_lycoris_dora(kind):
    before = adapter({"unet.x": update(RNG, kind, dora=True)})
    written = Kohya().write(before)
    assert written.tensors["lora_unet_x.dora_scale"].shape == ((5, 1) if kind == "linear" else (5, 1, 1, 1))
    assert_same(before, Kohya().read(as_source(written), modules=["unet.x"]))


def test_case_14_lengths_of_the_outputs():
    tensors = {"x.lora_down.weight": np.zeros((1, 2), "float32"), "x.lora_up.weight": np.zeros((2, 1), "float32"),
               "x.dora_scale": np.array([[10], [2]], "float32")}
    assert np.array_equal(Kohya().read(source(tensors)).updates["x"].magnitude, [10, 2])


@pytest.mark.parametrize("shape, message", [((1, 3), "length for each input"), ((2,), r"expected \(2, 1\)"), ((), "expected"),
                                            ((2, 1, 1, 1), "expected"), ((3, 1), "expected")])
def test_other_lengths_are_refused(shape, message):
    with pytest.raises(FormatError, match=message):
        Kohya().read(source(pair(dora_scale=np.ones(shape, "float32"))))


@given(st.integers(0, 2 ** 32), st.sampled_from(["float32", "float16"]), st.booleans(),
       st.sampled_from(["linear", "convolution"]))
def test_drawn_adapters_come_back_to_the_bit(seed, dtype, dora, kind):
    rng = np.random.default_rng(seed)
    paths = [f"{part}.block_{i}.to_q" for part in ("unet", "text_encoder", "text_encoder_2") for i in range(2)]
    before = adapter({path: update(rng, kind, r=int(rng.integers(1, 5)), s=float(2.0 ** rng.integers(-9, 9) * 3),
                                   dtype=dtype, dora=dora, out=int(rng.integers(1, 4)), into=int(rng.integers(1, 4)))
                      for path in paths})
    written = Kohya().write(before)
    assert "lora_te1_block_0_to_q.alpha" in written.tensors and written.notes == ()
    assert_same(before, Kohya().read(as_source(written), modules=paths))


@pytest.mark.parametrize("s", [0.1, 1e-30, 0.7, 7.7e30])
def test_an_alpha_that_is_no_float32_is_rounded_and_said(s):
    before = adapter({"unet.x": update(RNG, s=s, r=3)})
    written = Kohya().write(before)
    assert "alpha: that of 1 modules" in written.notes[0]
    assert Kohya().read(as_source(written)).updates["lora_unet_x"].s == pytest.approx(s, rel=6e-8)


def test_a_scaling_outside_float32_is_folded_on_request():
    before = adapter({"unet.x": update(RNG, s=2.0 ** 200)})
    with pytest.raises(FormatError, match="outside float32"):
        Kohya().write(before)
    small = dataclasses.replace(before.updates["unet.x"], s=2.0 ** -140, B=before.updates["unet.x"].B * 2.0 ** 100)
    after = Kohya().read(as_source(Kohya().write(adapter({"unet.x": small}), fold=True))).updates["lora_unet_x"]
    assert after.s == 1 and np.array_equal(D(after), D(small))


def test_a_negative_scaling_turns_B_round():
    before = adapter({"unet.x": update(RNG, s=-0.5)})
    after = Kohya().read(as_source(Kohya().write(before))).updates["lora_unet_x"]
    assert after.s == 0.5 and np.array_equal(D(after), D(before.updates["unet.x"]))


def test_names_that_are_written():
    before = adapter({path: update(RNG) for path in ("unet.a.b", "text_encoder.c", "d.e", "lora_unet_f_g")})
    names = {name.split(".")[0] for name in Kohya().write(before, prefix="lora_transformer").tensors}
    assert names == {"lora_unet_a_b", "lora_te_c", "lora_transformer_d_e", "lora_unet_f_g"}
    with pytest.raises(FormatError, match="kohya's name for it is lora_unet_a_b_c"):
        Kohya().write(adapter({"unet.a.b_c": update(RNG), "unet.a_b.c": update(RNG)}))


def test_metadata():
    metadata = {"ss_v2": "False", "ss_network_dim": "4", "alpha": "8", "sshs_legacy_hash": "ab", "sshs_model_hash": "cd"}
    written = Kohya().write(adapter({"unet.x": update(RNG, s=0.5)}, metadata=metadata))
    told = dict(written.metadata)
    assert told.pop("sshs_model_hash") == model_hash(written.tensors)
    assert told == {"ss_v2": "False", "ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "1"}
    two = Kohya().write(adapter({"unet.x": update(RNG), "unet.y": update(RNG, r=1)}))
    assert two.metadata["ss_network_dim"] == two.metadata["ss_network_alpha"] == "Dynamic"


def test_the_hash_is_that_of_the_file_behind_its_header():
    numpy_files = pytest.importorskip("safetensors.numpy")
    one, two = update(RNG, dtype="float16"), update(RNG, "convolution")
    written = Kohya().write(adapter({"unet.z": one, "unet.a": two}))
    data = numpy_files.save(written.tensors, {"ss_x": "1"})
    assert written.metadata["sshs_model_hash"] == hashlib.sha256(data[8 + int.from_bytes(data[:8], "little"):]).hexdigest()


@pytest.mark.parametrize("made, message", [
    (dict(kind="embedding"), "update of an embedding"),
    (dict(bias=True), "lora_bias"),
])
def test_what_kohya_cannot_say(made, message):
    with pytest.raises(FormatError, match=message):
        Kohya().write(adapter({"x": update(RNG, **made)}))


def test_groups_are_refused():
    one = update(RNG, "convolution", r=2, out=4)
    with pytest.raises(FormatError, match="grouped convolution"):
        Kohya().write(adapter({"x": dataclasses.replace(one, B=one.B[:, :1])}))
    tensors = {"x.lora_down.weight": one.A, "x.lora_up.weight": one.B[:, :1]}
    with pytest.raises(FormatError, match="has rank 2, .* has rank 1"):
        Kohya().read(source(tensors))


@pytest.mark.parametrize("tensors, message", [
    ({"x.lora_down.weight": DOWN}, "x: lora_up.weight is missing"),
    ({"x.lora_up.weight": DOWN, "x.alpha": UP}, "x: lora_down.weight is missing"),
    ({**pair(), "y.alpha": np.float32(1)}, "y: lora_down.weight is missing"),
    ({**pair(), "x.diff_b": UP}, "x.diff_b: this key is not understood"),
    ({**pair(), ".lora_up.weight": UP}, "not understood"),
    (pair(alpha=np.float32("nan")), "expected one number above 0, got nan"),
    (pair(alpha=np.float32("inf")), "got inf"),
    (pair(alpha=np.float32(0)), "got 0.0. 0 stands for the rank"),
    (pair(alpha=np.float32(-4)), "got -4"),
    (pair(alpha=np.ones(2, "float32")), r"got float32 \(2,\)"),
    (pair(alpha=np.ones((1, 1), "float32")), "expected one number"),
    (pair(alpha=np.ones(0, "float32")), r"got float32 \(0,\)"),
    (pair(alpha=np.array(True)), "expected one number"),
    ({"x.lora_down.weight": np.float32(1), "x.lora_up.weight": UP}, "expected A"),
    ({"x.lora_down.weight": DOWN, "x.lora_up.weight": UP[:, :1]}, "rank 2, .* rank 1"),
    ({"x.lora_down.weight": DOWN, "x.lora_up.weight": np.ones((0, 2), "float32")}, "none of them empty"),
    ({"x.lora_down.weight": DOWN[..., None, None], "x.lora_up.weight": UP}, "expected A"),
    ({"x.lora_down.weight": DOWN.astype("int8"), "x.lora_up.weight": UP}, "A is int8"),
    ({"x.lora_down.weight": DOWN[..., None, None], "x.lora_up.weight": np.ones((2, 2, 3, 3), "float32")}, "1 x 1"),
    ({}, "no lora_down"),
])
def test_what_is_refused(tensors, message):
    with pytest.raises(FormatError, match=message):
        Kohya().read(source(tensors))
