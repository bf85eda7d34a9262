"""loralib's state dicts: layers whose kind and scaling live in the code that made them."""
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from saved_oracle import D, adapter, as_source, assert_rounded, assert_same, source, update, whole_numbers

import minilora
from minilora import lora, nn
from minilora.errors import ConfigError, FormatError
from minilora.formats.adapters.loralib import Loralib

RNG = np.random.default_rng(0)
A, B = np.array([[1, 2, 3], [0, 1, 0]], "float32"), np.array([[1, 0], [2, 1]], "float32")


def pair(path="fc", a=A, b=B):
    return {f"{path}.lora_A": a, f"{path}.lora_B": b}


def test_what_is_recognised():
    one = Loralib()
    assert one.recognise(source(pair())) and one.recognise(source({"lora_A": A})) and one.recognise(source({"x.lora_B": B}))
    for key in ("x.lora_A.weight", "x.lora_a", "x.lora_embedding_A", "x.my_lora_A", "x.lora_E"):
        assert not one.recognise(source({key: A})), key
    assert not one.recognise(source(pair(), {"peft_type": "ADALORA"}))


def test_a_linear_layer():
    found = Loralib().read(source(pair()), lora_alpha=1)
    assert np.array_equal(D(found.updates["fc"]), [[0.5, 1, 1.5], [1, 2.5, 3]])
    assert "read as linear layers" in found.notes[0]
    assert Loralib().read(source(pair()), lora_alpha=1, embeddings=["fc"]).updates["fc"].kind == "embedding"
    assert Loralib().read(source({"lora_A": A, "lora_B": B}), lora_alpha=np.float64(4), r=2).updates[""].s == 2


@pytest.mark.parametrize("alpha", [None, 0, "16", float("nan"), True])
def test_lora_alpha_has_to_be_said(alpha):
    with pytest.raises(FormatError, match=r"read_adapter\('file.safetensors', lora_alpha=16\)"):
        Loralib().read(source(pair()), lora_alpha=alpha)


@given(st.integers(0, 2 ** 32), st.lists(st.booleans(), min_size=1, max_size=4).filter(any), st.integers(1, 3))
def test_merged_linear_is_block_diagonal(seed, on, r):
    rng = np.random.default_rng(seed)
    m, o = sum(on), 2
    a, b = whole_numbers(rng, (m * r, 3)), whole_numbers(rng, (m * o, r))
    want, e = np.zeros((len(on) * o, 3)), 0
    for i, enabled in enumerate(on):
        if enabled:
            want[i * o:(i + 1) * o] = 0.5 * b[e * o:(e + 1) * o].astype("float64") @ a[e * r:(e + 1) * r]
            e += 1
    found = Loralib().read(source(pair("h.0.qkv", a, b)), lora_alpha=0.5 * r, enable_lora={"qkv": on})
    assert found.updates["h.0.qkv"].r == m * r and np.array_equal(D(found.updates["h.0.qkv"]), want)
    written = Loralib().write(found, enable_lora={"h.0.qkv": on})
    assert np.array_equal(written.tensors["h.0.qkv.lora_A"], a) and np.array_equal(written.tensors["h.0.qkv.lora_B"], b)
    assert f"r={r}, lora_alpha={0.5 * r:g}" in written.notes[0]


def test_which_slots_are_enabled_has_to_be_said():
    a, b = np.ones((4, 3), "float32"), np.ones((6, 2), "float32")
    with pytest.raises(FormatError, match=r"2 of its layers enabled.*enable_lora=\[True, False, True\]\)"):
        Loralib().read(source(pair("qkv", a, b)), lora_alpha=1)
    found = Loralib().read(source(pair("qkv", a, b)), lora_alpha=1, enable_lora=[True, False, True])
    assert found.updates["qkv"].B.shape == (9, 4)
    for wrong in ([], [1, 1], "yes", 3, {"qkv": True}):
        with pytest.raises(ConfigError, match="enable_lora: expected a list"):
            Loralib().read(source(pair("qkv", a, b)), lora_alpha=1, enable_lora=wrong)
    with pytest.raises(FormatError, match="enable_lora=.True, True, True.: block_diagonal"):
        Loralib().read(source(pair("qkv", a, b)), lora_alpha=1, enable_lora=[True, True, True])
    with pytest.raises(FormatError, match="block_diagonal"):
        Loralib().read(source(pair("qkv", a, b)), lora_alpha=1, enable_lora=[False, False])
    with pytest.raises(FormatError, match="enable_lora: 'kqv' names no layer"):
        Loralib().read(source(pair("qkv", a, b)), lora_alpha=1, enable_lora={"kqv": [True, True]})


def test_merged_linear_is_written_only_where_that_is_exact():
    before = adapter({"qkv": update(RNG, out=6, r=2)})
    with pytest.raises(FormatError, match="share ranks"):
        Loralib().write(before, enable_lora=[True, True])
    with pytest.raises(FormatError, match="rank 2 has no equal parts"):
        Loralib().write(before, enable_lora=[True, True, True])
    with pytest.raises(FormatError, match="do not divide the 6 outputs"):
        Loralib().write(before, enable_lora=[True, True, False, False])
    assert Loralib().write(before).tensors["qkv.lora_B"].shape == (6, 2)


@given(st.integers(0, 2 ** 32), st.integers(1, 3), st.integers(1, 3))
def test_a_convolution_has_rank_r_k_squared(seed, r, k):
    rng = np.random.default_rng(seed)
    a, b = whole_numbers(rng, (r * k, 2 * k)), whole_numbers(rng, (3 * k, r * k))
    found = Loralib().read(source(pair("conv", a, b)), lora_alpha=0.5 * r, convolutions={"conv": k}).updates["conv"]
    assert found.kind == "convolution" and found.A.shape in ((r * k * k, 2, k, k), (r, 2, k, k))
    assert np.array_equal(D(found), 0.5 * (b.astype("float64") @ a).reshape(3, 2, k, k))


@given(st.integers(0, 2 ** 32), st.integers(1, 3), st.integers(1, 3))
def test_an_update_of_a_convolution_is_written_with_its_own_rank(seed, r, k):
    before = adapter({"conv": update(np.random.default_rng(seed), "convolution", r=r, out=3, into=2, kernel=(k, k))})
    written = Loralib().write(before)
    assert written.tensors["conv.lora_A"].shape == (r * k, 2 * k) and written.tensors["conv.lora_B"].shape == (3 * k, r * k)
    D_there = (written.tensors["conv.lora_B"].astype("float64") @ written.tensors["conv.lora_A"]).reshape(3, 2, k, k)
    assert np.array_equal(0.5 * D_there, D(before.updates["conv"]))
    assert_same(before, Loralib().read(as_source(written), lora_alpha=0.5 * r, r=r, convolutions={"conv": k}))


@pytest.mark.parametrize("change", [dict(kernel=(3,)), dict(kernel=(1, 3)), dict(groups=True)])
def test_other_convolutions_cannot_be_written(change):
    one = update(RNG, "convolution", **{name: value for name, value in change.items() if name == "kernel"})
    one = dataclasses.replace(one, B=one.B[:, :1]) if "groups" in change else one
    with pytest.raises(FormatError, match="square kernel and one group"):
        Loralib().write(adapter({"conv": one}))


@pytest.mark.parametrize("k", [2, 0, -1, True, 3.0, "3"])
def test_a_kernel_that_does_not_fit(k):
    with pytest.raises(FormatError, match="no convolution with kernel"):
        Loralib().read(source(pair("conv", np.ones((3, 6), "float32"), np.ones((9, 3), "float32"))), lora_alpha=1,
                       convolutions={"conv": k})


def test_a_rank_that_the_tensors_contradict():
    with pytest.raises(FormatError, match="r=1, and the tensors have 2.*enable_lora={...} or convolutions"):
        Loralib().read(source(pair()), lora_alpha=1, r=1)


def test_biases_by_mode():
    tensors = {**pair(), "fc.bias": np.ones(2, "float32")}
    found = Loralib().read(source(tensors), lora_alpha=1)
    assert [*found.biases] == ["fc.bias"] and found.config.bias == "lora_only"
    found = Loralib().read(source({**tensors, "norm.bias": np.ones(3, "float32")}), lora_alpha=1)
    assert sorted(found.biases) == ["fc.bias", "norm.bias"] and found.config.bias == "all"
    assert {"fc.bias", "norm.bias"} < Loralib().write(found).tensors.keys()


def test_whole_modules():
    tensors = {**pair(), "head.weight": A, "head.bias": B[0], "norm.bias": B[0]}
    found = Loralib().read(source(tensors), lora_alpha=1)
    assert sorted(found.saved) == ["head.bias", "head.weight"] and [*found.biases] == ["norm.bias"]
    assert found.config.modules_to_save == ("head",)
    with pytest.raises(FormatError, match="saved={}"):
        Loralib().write(found)
    with pytest.raises(FormatError, match="checkpoint of the whole model"):
        Loralib().read(source({**tensors, "fc.weight": A}), lora_alpha=1)


def test_what_minilora_itself_saves_under_these_names():
    model = nn.Sequential(lora.Linear(3, 4, r=2, lora_alpha=6, rng=0),
                          lora.MergedLinear(4, 6, r=1, enable_lora=(True, False, True)))
    for layer in model:
        layer.lora_B.data[...] = whole_numbers(RNG, layer.lora_B.shape)
    state = lora.lora_state_dict(model)
    found = Loralib().read(source(state), lora_alpha=6, enable_lora=[True, False, True])
    x = minilora.Tensor(whole_numbers(RNG, (2, 3)))
    base = model[0](x).numpy() - (x.numpy() @ model[0].weight.numpy().T + model[0].bias.numpy())
    np.testing.assert_allclose(x.numpy() @ D(found.updates["0"]).T, base, atol=1e-5)
    assert found.updates["1"].B.shape == (6, 2)


@given(st.integers(0, 2 ** 32), st.sampled_from(["float32", "float16"]), st.sampled_from(["linear", "embedding"]))
def test_drawn_adapters_come_back_to_the_bit(seed, dtype, kind):
    rng = np.random.default_rng(seed)
    ranks = {f"h.{i}.x": int(rng.integers(1, 4)) for i in range(3)}
    before = adapter({path: update(rng, kind, r=r, s=12 / r, dtype=dtype) for path, r in ranks.items()})
    after = Loralib().read(as_source(Loralib().write(before)), lora_alpha=12, embeddings=["x"] if kind == "embedding" else [])
    assert_same(before, after)


def test_scalings_of_which_one_alpha_is_not_the_cause():
    before = adapter({"a": update(RNG, s=1.0), "b": update(RNG, s=1.0), "c": update(RNG, s=0.25)})
    after = Loralib().read(as_source(Loralib().write(before)), lora_alpha=2)
    assert all(np.array_equal(D(u), D(before.updates[path])) for path, u in after.updates.items())
    thirds = adapter({"a": update(RNG, s=1.0), "b": update(RNG, s=1.0), "c": update(RNG, s=1 / 3)})
    with pytest.raises(FormatError, match="c: s = 0.333333 in place of 1.*lora_alpha is 2 for all. fold=True"):
        Loralib().write(thirds)
    after = Loralib().read(as_source(Loralib().write(thirds, fold=True)), lora_alpha=2)
    assert_rounded(thirds.updates["c"], after.updates["c"])
    assert "lora_alpha=4" in Loralib().write(before, lora_alpha=4).notes[0]
    with pytest.raises(FormatError, match="finite number"):
        Loralib().write(before, lora_alpha=0)


@pytest.mark.parametrize("made, message", [(dict(dora=True), "DoRA"), (dict(bias=True), "lora_bias")])
def test_what_loralib_cannot_say(made, message):
    with pytest.raises(FormatError, match=message):
        Loralib().write(adapter({"fc": update(RNG, **made)}))


@pytest.mark.parametrize("tensors, message", [
    ({"fc.lora_A": A}, "fc: lora_B is missing"),
    ({**pair(), "fc.start_A": A}, "fc.start_A: this key is not understood"),
    ({**pair(), "bias": A}, "bias: this key is not understood"),
    (pair(a=np.ones((3, 2), "float32")), "rank 3, .* rank 2"),
    (pair(a=np.ones((0, 3), "float32")), "none of them empty"),
    (pair(b=np.ones((2, 0), "float32")), "none of them empty"),
    (pair(a=np.float32(1)), "none of them empty, got A"),
    (pair(a=A.astype("int64")), "A is int64"),
    ({**pair(), "fc.magnitude": np.ones(3, "float32")}, "magnitude: expected shape"),
    ({**pair(), "fc.magnitude": np.ones(2, "float32"), "fc.lora_bias": np.ones(2, "float32")}, "no update with both"),
    ({}, "no lora_A"),
    ({"head.weight": A}, "no lora_A"),
])
def test_what_is_refused(tensors, message):
    with pytest.raises(FormatError, match=message):
        Loralib().read(source(tensors), lora_alpha=1)
