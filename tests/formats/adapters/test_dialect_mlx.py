"""mlx-lm's dialect: transposed factors, one rank, one scale."""
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from saved_oracle import D, adapter, as_source, assert_rounded, assert_same, source, update

from minilora.errors import FormatError
from minilora.formats.adapters.mlx import Mlx

RNG = np.random.default_rng(0)
CONFIG = {"fine_tune_type": "lora", "num_layers": 8, "lora_parameters": {"rank": 2, "scale": 20, "dropout": 0.0}}
PATH = "model.layers.0.self_attn.q_proj"
PAIR = {f"{PATH}.lora_a": np.array([[1, 0], [2, 1], [3, 0]], "float32"),
        f"{PATH}.lora_b": np.array([[1, 2], [0, 1]], "float32")}


def with_parameters(**changes):
    return {**CONFIG, "lora_parameters": {**CONFIG["lora_parameters"], **changes}}


def paths(*names):
    return {f"model.layers.{i}.self_attn.{name}": update(RNG) for i, name in enumerate(names)}


def test_case_18_is_transposed():
    found = Mlx().read(source(PAIR, CONFIG)).updates[PATH]
    assert np.array_equal(D(found), [[20, 40, 60], [40, 100, 120]])


def test_case_18_is_transposed_where_all_sizes_are_the_same():
    a, b = np.array([[1, 2], [3, 4]], "float32"), np.array([[5, 6], [7, 8]], "float32")
    found = Mlx().read(source({"lm_head.lora_a": a, "lm_head.lora_b": b}, CONFIG)).updates["lm_head"]
    assert np.array_equal(D(found), 20 * (a @ b).T)


def test_what_is_recognised():
    mlx = Mlx()
    assert mlx.recognise(source(PAIR, CONFIG)) and mlx.recognise(source(PAIR))
    assert mlx.recognise(source({}, CONFIG))  # to say what is missing
    assert not mlx.recognise(source(PAIR, {"peft_type": "LORA"}))
    assert not mlx.recognise(source({"fc.lora_A": np.ones((1, 1))}))
    assert not mlx.recognise(source({}))


@given(st.integers(0, 2 ** 32), st.sampled_from(["float32", "float16"]), st.booleans(),
       st.sampled_from([20.0, 0.1, -3.7, 1e-20, 2.0]))
def test_drawn_adapters_come_back_to_the_bit(seed, dtype, dora, s):
    rng = np.random.default_rng(seed)
    made = dict(r=int(rng.integers(1, 4)), s=s, dtype=dtype, dora=dora)
    before = adapter({f"model.layers.{i}.{name}": update(rng, out=int(rng.integers(1, 5)), into=int(rng.integers(1, 5)), **made)
                      for i in range(2) for name in ("self_attn.v_proj", "mlp.down_proj")} | {"lm_head": update(rng, **made)})
    written = Mlx().write(before, num_layers=4)
    assert written.config["fine_tune_type"] == ("dora" if dora else "lora")
    assert written.config["num_layers"] == 4
    assert written.config["lora_parameters"]["keys"] == ["lm_head", "mlp.down_proj", "self_attn.v_proj"]
    assert_same(before, Mlx().read(as_source(written)))


def test_an_embedding_is_known_by_its_name():
    before = adapter({"model.embed_tokens": update(RNG, "embedding")})
    with pytest.raises(FormatError, match="tied=False"):
        Mlx().write(before)
    with pytest.raises(FormatError, match="write PEFT's dialect"):
        Mlx().write(before, tied=True)
    after = Mlx().read(as_source(Mlx().write(before, tied=False)))
    assert_same(before, after)
    assert "tied head" in after.notes[0]
    assert_same(after, Mlx().read(as_source(Mlx().write(after))))  # what mlx-lm means needs no answer
    assert Mlx().read(as_source(Mlx().write(before, tied=False)), embeddings=()).updates["model.embed_tokens"].kind == "linear"


def test_an_update_of_a_tied_head_is_one_with_that_of_the_embedding():
    table = update(RNG, "embedding", out=4, into=6)
    head = dataclasses.replace(table, kind="linear", A=table.B.T, B=table.A.T)
    both = adapter({"model.embed_tokens": table, "lm_head": head})
    assert sorted(Mlx().write(both, tied=True).tensors) == ["model.embed_tokens.lora_a", "model.embed_tokens.lora_b"]
    assert len(Mlx().write(both, tied=False).tensors) == 4
    for other in (dataclasses.replace(head, s=1.0), dataclasses.replace(head, A=head.A + 1)):
        with pytest.raises(FormatError, match="no update of the head is the same"):
            Mlx().write(adapter({"model.embed_tokens": table, "lm_head": other}), tied=True)


def test_the_last_layers_are_counted_from_the_last():
    before = adapter({f"model.layers.{i}.mlp.up_proj": update(RNG) for i in (5, 6)})
    assert Mlx().write(before, num_layers=32).config["num_layers"] == 27
    assert Mlx().write(before).config["num_layers"] == -1 and "num_layers" in Mlx().write(before).notes[0]
    for wrong in (6, True, 7.0, "32"):
        with pytest.raises(FormatError, match="at least 7"):
            Mlx().write(before, num_layers=wrong)
    assert Mlx().write(adapter({"lm_head": update(RNG)}), num_layers=2).config["num_layers"] == 1


def test_scalings_are_folded_where_that_is_exact_and_on_request_elsewhere():
    updates = paths("q_proj", "k_proj", "v_proj")
    one, two, three = updates
    exact = adapter({**updates, three: dataclasses.replace(updates[three], s=-4.0)})
    after = Mlx().read(as_source(Mlx().write(exact)))
    assert all(np.array_equal(D(exact.updates[path]), D(after.updates[path])) for path in updates)
    thirds = adapter({**updates, three: dataclasses.replace(updates[three], s=0.5 / 3)})
    with pytest.raises(FormatError, match=f"{three}: s = 0.166667 in place of 0.5.*fold=True"):
        Mlx().write(thirds)
    written = Mlx().write(thirds, fold=True)
    assert any("folded: the scalings of 1 modules" in note for note in written.notes)
    after = Mlx().read(as_source(written))
    assert_rounded(thirds.updates[three], after.updates[three])
    assert np.array_equal(D(after.updates[one]), D(thirds.updates[one]))


@pytest.mark.parametrize("s, value", [(2.0 ** 20, 2.0), (0.5 * 2.0 ** -14, 2.0 ** -14 * 1.0009765625)])
def test_a_power_of_two_that_leaves_the_range_is_not_exact(s, value):
    updates = paths("q_proj", "k_proj", "v_proj")
    updates = {path: dataclasses.replace(u, A=u.A.astype("float16"), B=u.B.astype("float16")) for path, u in updates.items()}
    last = [*updates][-1]
    updates[last] = dataclasses.replace(updates[last], s=s, B=np.full_like(updates[last].B, value))
    with pytest.raises(FormatError, match="overflows|rounded"):
        Mlx().write(adapter(updates))


def test_an_overflow_is_refused_even_with_fold():
    updates = paths("q_proj", "k_proj", "v_proj")
    last = [*updates][-1]
    updates[last] = dataclasses.replace(updates[last], s=1e300)
    with pytest.raises(FormatError, match="overflows"):
        Mlx().write(adapter(updates), fold=True)


def test_lower_ranks_are_filled_with_zeros_on_request():
    updates = paths("q_proj", "k_proj")
    one, two = updates
    before = adapter({one: updates[one], two: update(RNG, r=1)})
    with pytest.raises(FormatError, match=f"{two}: rank 1, and 2 elsewhere.*pad=True.*recompress"):
        Mlx().write(before)
    written = Mlx().write(before, pad=True)
    after = Mlx().read(as_source(written))
    assert all(u.r == 2 and np.array_equal(D(u), D(before.updates[path])) for path, u in after.updates.items())


def test_other_beginnings_of_paths():
    before = adapter({"transformer.h.0.attn.c_attn": update(RNG)})
    note, = [note for note in Mlx().write(before).notes if "transformer" in note]
    assert "names={'transformer.': 'model.'}" in note
    written = Mlx().write(before, names={"transformer.": "model."})
    assert "model.h.0.attn.c_attn.lora_a" in written.tensors
    assert written.config["lora_parameters"]["keys"] == ["attn.c_attn"]
    with pytest.raises(FormatError, match="begins no path"):
        Mlx().write(before, names={"base.": "model."})
    both = adapter({"a.fc": update(RNG), "b.fc": update(RNG)})
    with pytest.raises(FormatError, match="to two modules: model.fc"):
        Mlx().write(both, names={"a.": "model.", "b.": "model."})


@pytest.mark.parametrize("made, message", [
    (dict(kind="convolution"), "no place for an update of a convolution"),
    (dict(bias=True), "lora_bias"),
    (dict(kind="embedding", dora=True), "lengths of an embedding"),
    (dict(dtype="float64"), "dtype='float32'"),
])
def test_what_mlx_cannot_say(made, message):
    with pytest.raises(FormatError, match=message):
        Mlx().write(adapter({PATH: update(RNG, **made)}), tied=False)


def test_experts_are_stacked_there():
    with pytest.raises(FormatError, match="model.layers.0.mlp.experts.3.up_proj: an expert by itself"):
        Mlx().write(adapter({"model.layers.0.mlp.experts.3.up_proj": update(RNG)}))


def test_parts_that_mlx_cannot_say():
    extra = dict(saved={"head.weight": np.ones((2, 2))}, biases={"fc.bias": np.ones(2)})
    with pytest.raises(FormatError, match="(?s)head.weight.*saved={}.*fc.bias.*biases={}"):
        Mlx().write(adapter(paths("q_proj"), **extra))
    with pytest.raises(FormatError, match="no update"):
        Mlx().write(dataclasses.replace(adapter(paths("q_proj")), updates={}))
    with pytest.raises(FormatError, match="model.a: without DoRA.s lengths"):
        Mlx().write(adapter({"model.a": update(RNG), "model.b": update(RNG, dora=True)}))


def test_another_type():
    before = adapter({PATH: update(RNG, dtype="float64", dora=True)})
    written = Mlx().write(before, dtype="float32")
    assert {array.dtype.name for array in written.tensors.values()} == {"float32"}


@pytest.mark.parametrize("tensors, config, message", [
    ({f"{PATH}.lora_a": PAIR[f"{PATH}.lora_a"]}, CONFIG, "lora_b is missing"),
    ({**PAIR, f"{PATH}.lora_c": np.ones(1)}, CONFIG, "lora_c: this key is not understood"),
    ({**PAIR, "lora_a": np.ones(1)}, CONFIG, "lora_a: this key is not understood"),
    ({**PAIR, f"{PATH}.m": np.ones(2, "float32")}, CONFIG, "fine_tune_type is not 'dora'"),
    (PAIR, {**CONFIG, "fine_tune_type": "dora"}, "m is missing"),
    (PAIR, {**CONFIG, "fine_tune_type": "full"}, "a whole model was trained"),
    (PAIR, {**CONFIG, "fine_tune_type": ["lora"]}, "expected 'lora' or 'dora'"),
    (PAIR, {"fine_tune_type": "lora"}, "expected an object"),
    (PAIR, with_parameters(rank=3), "rank 3 in the config, 2 in the tensors"),
    (PAIR, with_parameters(rank="2"), "whole number"),
    (PAIR, with_parameters(rank=True), "whole number"),
    (PAIR, with_parameters(scale="20"), "finite number"),
    (PAIR, with_parameters(scale=0), "finite number"),
    (PAIR, with_parameters(scale=float("nan")), "finite number"),
    (PAIR, with_parameters(scale=10 ** 400), "finite number"),
    (PAIR, with_parameters(alpha=16), "alpha / rank"),
    (PAIR, with_parameters(dropout=1.5), "dropout"),
    (PAIR, None, "scale=20.0"),
    ({}, CONFIG, "no lora_a"),
    ({"x.lora_a": np.ones((4, 2, 3), "float32"), "x.lora_b": np.ones((4, 3, 2), "float32")}, CONFIG, "MoE"),
    ({"x.lora_a": np.ones((), "float32"), "x.lora_b": np.ones((2, 3), "float32")}, CONFIG, "two axes"),
    ({"x.lora_a": np.ones((3, 2), "float32"), "x.lora_b": np.ones((3, 2), "float32")}, CONFIG, "rank"),
    ({"x.lora_a": np.ones((0, 2), "float32"), "x.lora_b": np.ones((2, 3), "float32")}, CONFIG, "none of them empty"),
    ({"x.lora_a": np.ones((3, 2), "int32"), "x.lora_b": np.ones((2, 3), "float32")}, CONFIG, "int32"),
    ({"wte.lora_a": np.ones((3, 2), "float32"), "wte.lora_b": np.ones((2, 3), "float32"), "wte.m": np.ones(3, "float32")},
     {**CONFIG, "fine_tune_type": "dora"}, "length for each token"),
])
def test_what_is_refused(tensors, config, message):
    with pytest.raises(FormatError, match=message):
        Mlx().read(source(tensors, config))


def test_two_problems_are_one_message():
    with pytest.raises(FormatError, match="(?s)2 problems.*not understood.*lora_b is missing"):
        Mlx().read(source({"x.lora_a": PAIR[f"{PATH}.lora_a"], "y.weight": np.ones(1)}, CONFIG))


def test_without_a_config_the_scale_is_an_option():
    assert Mlx().read(source(PAIR), scale=20).updates[PATH].s == 20
    with pytest.raises(FormatError, match="says it already"):
        Mlx().read(source(PAIR, CONFIG), scale=20)
    with pytest.raises(FormatError, match="got nan"):
        Mlx().read(source(PAIR), scale=float("nan"))


def test_two_types_of_float_are_widened():
    tensors = {name: array.astype("float16") if name.endswith("b") else array for name, array in PAIR.items()}
    found = Mlx().read(source(tensors, CONFIG)).updates[PATH]
    assert found.A.dtype == found.B.dtype == "float32"
    assert np.array_equal(D(found), [[20, 40, 60], [40, 100, 120]])


@pytest.mark.parametrize("scale", [1.7e308, -1.7e308])
def test_a_scale_whose_alpha_is_not_finite(scale):
    with pytest.raises(FormatError, match="scaling must be a finite number"):
        Mlx().read(source(PAIR, with_parameters(scale=scale)))
