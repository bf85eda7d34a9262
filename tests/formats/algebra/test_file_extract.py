"""`formats.extract_files`: two checkpoints whose difference is known."""
import dataclasses
import json
import math
import shutil
import tracemalloc

import numpy as np
import pytest

import oracle
from minilora import formats
from minilora.errors import ConfigError, FormatError, StateError
from minilora.formats.adapters.saved import Update
from minilora.formats.placing.tied import IN_HEAD

SHAPES = {"model.embed_tokens": (12, 6), "model.layers.0.q_proj": (8, 6), "model.layers.1.q_proj": (8, 6), "conv": (6, 4, 2, 3),
          "deep": (5, 3, 4)}


def delta(rng, shape, r):
    """A difference of rank r, as a matrix in the shape of the weight."""
    out, into = shape[0], math.prod(shape[1:])
    return 0.1 * (rng.standard_normal((out, r)) @ rng.standard_normal((r, into))).reshape(shape)


def weights(rng, dtype="float32"):
    found = {f"{path}.weight": rng.standard_normal(shape).astype(dtype) for path, shape in SHAPES.items()}
    return {**found, "model.norm.weight": np.ones(6, dtype), "model.layers.0.q_proj.bias": np.zeros(8, dtype)}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def save(tmp_path):
    def save(name, tensors, config=None, **options):
        (tmp_path / name).mkdir()
        formats.save_state(tmp_path / name / "model.safetensors", tensors, **options)
        if config is not None:
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        return tmp_path / name
    return save


def D(update, shape):
    """What the update adds to a stored weight of this shape."""
    A, B = update.A.astype("float64").reshape(update.r, -1), update.B.astype("float64").reshape(len(update.B), -1)
    dense = update.s * B @ A
    return (dense.T if update.kind == "embedding" else dense).reshape(shape)


@pytest.mark.parametrize("shards", [None, 400])
def test_a_low_rank_change_comes_back(shards, rng, save):
    base = weights(rng, "float64")
    change = {name: delta(rng, array.shape, 2) for name, array in base.items() if array.ndim > 1}
    change["model.layers.1.q_proj.weight"] *= 0  # not trained
    tuned = {name: array + change.get(name, 0) for name, array in base.items()}
    pair = save("tuned", tuned, max_shard_bytes=shards), save("base", base, max_shard_bytes=shards)
    done = formats.extract_files(*pair, energy=1)
    updates = done.adapter.updates
    assert sorted(updates) == ["conv", "deep", "model.embed_tokens", "model.layers.0.q_proj"]
    assert {path: u.kind for path, u in updates.items()} == {
        "conv": "convolution", "deep": "convolution", "model.embed_tokens": "embedding", "model.layers.0.q_proj": "linear"}
    for path, update in updates.items():
        wanted = change[f"{path}.weight"]
        np.testing.assert_allclose(D(update, wanted.shape), wanted, atol=1e-12)
        row = next(row for row in done.rows if row.path == path)
        assert row.after == 2 and row.norm == pytest.approx(np.linalg.norm(wanted)) and row.error < 1e-12 * row.norm + 1e-12


@pytest.mark.parametrize("options", [{}, {"exact": False, "seed": 3}])
def test_cut_to_a_rank_it_is_the_nearest(options, rng, save):
    base = {"fc.weight": rng.standard_normal((30, 20)).astype("float32")}
    change = delta(rng, (30, 20), 4) * 10 + 0.01 * rng.standard_normal((30, 20))
    tuned = {"fc.weight": (base["fc.weight"] + change).astype("float32")}
    wanted = tuned["fc.weight"].astype("float64") - base["fc.weight"]
    done = formats.extract_files(save("tuned", tuned), save("base", base), rank=3, **options)
    best = math.sqrt((np.linalg.svd(wanted, compute_uv=False)[3:] ** 2).sum())
    got = np.linalg.norm(D(done.adapter.updates["fc"], wanted.shape) - wanted)
    assert got == pytest.approx(best, rel=1e-3) and got <= done.rows[0].error * (1 + 1e-9)
    assert done.rows[0].error == pytest.approx(best, rel=1e-3)
    assert done.adapter.updates["fc"].A.dtype == np.float32
    assert done.rows[0].energy == pytest.approx(1 - (best / np.linalg.norm(wanted)) ** 2, abs=1e-5)


def test_energy_and_tolerance(rng, save):
    base = {"fc.weight": np.zeros((3, 3), "float64")}
    tuned, here = save("tuned", {"fc.weight": np.diag([4.0, 2.0, 1.0])}), save("base", base)
    for wanted, target in ((1, {"energy": 0.7}), (2, {"energy": 0.95}), (3, {"energy": 1.0}), (1, {"tolerance": 0.5}),
                           (2, {"tolerance": 0.25}), (2, {"energy": 1.0, "rank": 2})):
        assert formats.extract_files(tuned, here, **target).rows[0].after == wanted


def test_what_is_no_matrix_is_refused_saved_or_left_out(rng, save, tmp_path):
    base = weights(rng)
    tuned = dict(base, **{"score.weight": rng.standard_normal((2, 6)).astype("float32")})
    for name in ("model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight"):
        tuned[name] = (base[name] + delta(rng, base[name].shape, 1)).astype("float32")
    tuned["model.norm.weight"] = base["model.norm.weight"] + 1
    tuned["model.layers.0.q_proj.bias"] = base["model.layers.0.q_proj.bias"] + 2
    config = {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}
    pair = save("tuned", tuned, config), save("base", base, {"model_type": "llama"})
    with pytest.raises(FormatError, match="(?s)3 problems.*q_proj.bias.*norm.weight.*new.*--rest save.*--rest drop") as told:
        formats.extract_files(*pair, rank=1)
    assert "score.weight" in str(told.value)
    done = formats.extract_files(*pair, rank=1, rest="save")
    formats.write_adapter(done.adapter, tmp_path / "adapter")
    again = formats.read_adapter(tmp_path / "adapter")
    assert sorted(again.saved) == ["model.norm.weight", "score.weight"] and list(again.biases) == ["model.layers.0.q_proj.bias"]
    assert (again.saved["score.weight"] == tuned["score.weight"]).all() and again.config.task_type == "SEQ_CLS"
    assert (again.biases["model.layers.0.q_proj.bias"] == 2).all() and again.config.bias == "lora_only"
    dropped = formats.extract_files(*pair, rank=1, rest="drop")
    assert not dropped.adapter.saved and sum("left out" in note for note in dropped.notes) == 3


def test_only_some_modules(rng, save):
    base = weights(rng)
    tuned = {name: array + np.float32(0.5 if array.ndim > 1 else 0) for name, array in base.items()}
    pair = save("tuned", tuned), save("base", base)
    done = formats.extract_files(*pair, rank=1, only=["q_proj"])
    assert sorted(done.adapter.updates) == ["model.layers.0.q_proj", "model.layers.1.q_proj"]
    assert done.notes == ("left out, as asked, though it changed: conv.weight, deep.weight, model.embed_tokens.weight",)
    with pytest.raises(ConfigError, match="q_projj.*is 'q_proj' meant"):
        formats.extract_files(*pair, rank=1, only=["q_projj"])


def test_gpt2_matrices_are_stored_the_other_way_round(rng, save):
    base = {"h.0.attn.c_attn.weight": rng.standard_normal((6, 18)), "h.0.attn.c_proj.weight": rng.standard_normal((6, 6)),
            "wte.weight": rng.standard_normal((10, 6)), "h.0.attn.bias": np.tril(np.ones((1, 1, 4, 4)))}
    change = {name: delta(rng, array.shape, 2) for name, array in base.items() if name.endswith("weight")}
    tuned = {f"transformer.{name}": base[name] + change[name] for name in change}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    done = formats.extract_files(save("tuned", tuned, config), save("base", base, config), energy=1)
    updates = done.adapter.updates
    assert updates["transformer.h.0.attn.c_attn"].A.shape == (2, 6) and done.adapter.config.fan_in_fan_out
    for name in ("h.0.attn.c_attn", "h.0.attn.c_proj"):
        u = updates[f"transformer.{name}"]
        np.testing.assert_allclose((u.s * u.B @ u.A).T, change[f"{name}.weight"], atol=1e-12)
    # the table is the head too: the update goes into both, as PEFT says it
    assert np.array_equal(updates["lm_head"].A, updates["transformer.wte"].B.T) and updates["lm_head"].kind == "linear"


def test_a_tied_head(rng, save, tmp_path):
    base = weights(rng)
    tuned = dict(base, **{"model.embed_tokens.weight": (base["model.embed_tokens.weight"] + delta(rng, (12, 6), 1))
                          .astype("float32")})
    causal = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
    pair = save("tuned", tuned, causal), save("base", base, causal)
    done = formats.extract_files(*pair, rank=1)
    assert sorted(done.adapter.updates) == ["lm_head", "model.embed_tokens"]
    both = dict(tuned, **{"lm_head.weight": tuned["model.embed_tokens.weight"]})
    assert sorted(formats.extract_files(save("both", both, causal), pair[1], rank=1).adapter.updates) == sorted(
        done.adapter.updates)
    masked = formats.extract_files(save("masked", tuned, {**causal, "architectures": ["BertForMaskedLM"]}), pair[1], rank=1)
    assert json.loads(masked.adapter.metadata[IN_HEAD]) == ["model.embed_tokens"]
    alone = formats.extract_files(pair[0] / "model.safetensors", pair[1] / "model.safetensors", rank=1)
    (tmp_path / "bare").mkdir()
    for name in ("tuned", "base"):
        shutil.copy(tmp_path / name / "model.safetensors", tmp_path / "bare" / f"{name}.safetensors")
    bare = formats.extract_files(tmp_path / "bare" / "tuned.safetensors", tmp_path / "bare" / "base.safetensors", rank=1)
    assert sorted(alone.adapter.updates) == sorted(done.adapter.updates)  # config.json lies beside it
    assert list(bare.adapter.updates) == ["model.embed_tokens"] and any("no config.json" in note for note in bare.notes)
    # a head of its own since: its change is that from the base's table
    own = dict(tuned, **{"lm_head.weight": base["model.embed_tokens.weight"] + np.float32(1)})
    untied = formats.extract_files(save("own", own, {**causal, "tie_word_embeddings": False}), pair[1], rank=1)
    np.testing.assert_allclose(D(untied.adapter.updates["lm_head"], (12, 6)), 1, atol=1e-5)


def test_a_convolution_with_groups(rng, save, tmp_path):
    base = {"conv.weight": rng.standard_normal((4, 2, 3))}
    tuned = {"conv.weight": base["conv.weight"] + rng.standard_normal((4, 2, 3))}
    done = formats.extract_files(save("tuned", tuned), save("base", base), energy=1, groups={"conv": 2})
    update = done.adapter.updates["conv"]
    assert update.A.shape[1:] == (4, 3) and update.B.shape[1] * 2 == update.r
    formats.write_adapter(done.adapter, tmp_path / "adapter")
    from minilora import nn
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2, bias=False, rng=0))
    model[0].weight.data = base["conv.weight"].copy()
    formats.load_adapter(model, tmp_path / "adapter", mapping={"conv": "0"})
    from minilora import lora
    lora.bake(model)
    np.testing.assert_allclose(model[0].weight.data, tuned["conv.weight"], atol=1e-9)
    with pytest.raises(ConfigError, match="conv.*groups"):
        formats.extract_files(tmp_path / "tuned", tmp_path / "base", energy=1, groups={"conv": 3})


def test_tokens_that_were_not_seen_have_no_update(rng, save):
    base = {"wte.weight": rng.standard_normal((50, 6)).astype("float32")}
    tuned = {"wte.weight": base["wte.weight"].copy()}
    tuned["wte.weight"][[3, 17, 40]] += rng.standard_normal((3, 6)).astype("float32")
    update = formats.extract_files(save("tuned", tuned), save("base", base), rank=2).adapter.updates["wte"]
    assert sorted(np.flatnonzero(update.A.any(axis=0))) == [3, 17, 40]


@pytest.mark.parametrize(("before", "after"), [("float32", "float16"), ("float16", "float32"), ("float64", "float32"),
                                               ("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float64")])
def test_two_dtypes(before, after, rng, save):
    if "bfloat16" in (before, after):
        pytest.importorskip("ml_dtypes")
    from minilora.formats.adapters.scalings import float_dtype
    before, after = map(float_dtype, (before, after))
    base = {"a.weight": rng.standard_normal((40, 30)).astype(before), "b.weight": rng.standard_normal((4, 3)).astype(before)}
    change = delta(rng, (40, 30), 1)
    tuned = {"a.weight": (base["a.weight"].astype("float64") + change).astype(after),
             "b.weight": base["b.weight"].astype(after)}
    done = formats.extract_files(save("tuned", tuned), save("base", base), rank=1)
    assert list(done.adapter.updates) == ["a"]  # b is the same, to what the coarser dtype can say
    got = D(done.adapter.updates["a"], (40, 30))
    wanted = tuned["a.weight"].astype("float64") - base["a.weight"].astype("float64")
    assert np.linalg.norm(got - wanted) <= done.error * (1 + 1e-6)
    assert np.linalg.norm(got - change) < 0.03 * np.linalg.norm(change)
    noise = [note for note in done.notes if "rounding" in note]
    assert bool(noise) == (after.name == "bfloat16")
    if noise:  # what it says of the noise is what the rank-1 change is off by
        said = float(noise[0].split("about ")[1].split("%")[0]) / 100
        assert said == pytest.approx(np.linalg.norm(wanted - change) / np.linalg.norm(wanted), rel=0.2)


def test_old_names_of_bert(rng, save):
    base = {"bert.encoder.layer.0.output.LayerNorm.gamma": np.ones(4), "bert.encoder.layer.0.output.dense.weight": np.eye(4)}
    tuned = {"bert.encoder.layer.0.output.LayerNorm.weight": np.ones(4),
             "bert.encoder.layer.0.output.dense.weight": np.eye(4) + 1}
    done = formats.extract_files(save("tuned", tuned), save("base", base), rank=1)
    assert list(done.adapter.updates) == ["bert.encoder.layer.0.output.dense"]


def test_what_was_merged_as_a_stream_comes_back(rng, save, tmp_path):
    """extract(merge(base, a)) has D of a, up to the rounding of the merged weights, which is that of float64 here."""
    base = weights(rng, "float64")
    one = oracle.of({"model.layers.0.q_proj": Update("linear", rng.standard_normal((2, 6)), rng.standard_normal((8, 2)), 0.5),
                     "model.embed_tokens": Update("embedding", rng.standard_normal((3, 12)), rng.standard_normal((6, 3)), 2.0),
                     "conv": Update("convolution", rng.standard_normal((2, 4, 2, 3)), rng.standard_normal((6, 2, 1, 1)), 1.0)})
    formats.write_adapter(one, tmp_path / "one")
    config = {"model_type": "other", "tie_word_embeddings": False}
    formats.merge_files(save("base", base, config), [(tmp_path / "one", -0.5)], tmp_path / "merged")
    done = formats.extract_files(tmp_path / "merged", tmp_path / "base", energy=1, dtype="float64")
    scaled = {path: dataclasses.replace(u, s=-0.5 * u.s) for path, u in one.updates.items()}
    found = formats.difference(oracle.of(scaled), done.adapter, tolerance=1e-12)
    assert found.same and [row.after for row in done.rows] == [2, 3, 2], str(found)


def test_memory_is_that_of_one_matrix(save):
    """Sixteen matrices: as much as one, but for the factors."""
    rng = np.random.default_rng(0)
    base = {f"{i}.weight": rng.standard_normal((200, 200)).astype("float32") for i in range(16)}
    tuned = {name: array + np.float32(0.1) * rng.standard_normal(array.shape).astype("float32") for name, array in base.items()}
    pair, peaks = (save("tuned", tuned), save("base", base)), []
    for only in (["0"], None):
        tracemalloc.start()
        formats.extract_files(*pair, rank=1, only=only)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 16 * 4 * 400 * 4 + 100_000, peaks


def test_the_same_files_give_the_same_bytes(rng, save, tmp_path):
    base = weights(rng)
    tuned = {name: array + (0.1 * rng.standard_normal(array.shape)).astype("float32") if array.ndim > 1 else array
             for name, array in base.items()}
    pair = save("tuned", tuned), save("base", base)
    for name in ("one", "two"):
        formats.write_adapter(formats.extract_files(*pair, rank=2, exact=False).adapter, tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_what_cannot_be_extracted(rng, save, tmp_path):
    base = {"fc.weight": rng.standard_normal((4, 3)), "other.weight": np.ones((2, 2))}
    here = save("base", base)
    with pytest.raises(FormatError, match="same weights"):
        formats.extract_files(save("same", base), here, rank=1)
    with pytest.raises(FormatError, match="no tensor of one name"):
        formats.extract_files(save("alien", {"x.weight": np.ones((2, 2))}), here, rank=1)
    with pytest.raises(StateError, match="fc.*NaN"):
        formats.extract_files(save("nan", dict(base, **{"fc.weight": np.full((4, 3), np.inf)})), here, rank=1)
    with pytest.raises(FormatError, match=r"(?s)fc.weight.*\(5, 3\), and \(4, 3\) in the base"):
        formats.extract_files(save("longer", dict(base, **{"fc.weight": np.ones((5, 3))})), here, rank=1)
    with pytest.raises(FormatError, match="(?s)fc.weight.*int8"):
        formats.extract_files(save("whole", dict(base, **{"fc.weight": np.ones((4, 3), "int8")})), here, rank=1)
    quantised = save("nf4", base, {"quantization_config": {"quant_method": "bitsandbytes"}})
    with pytest.raises(FormatError, match="bitsandbytes"):
        formats.extract_files(quantised, here, rank=1)
    head = save("head", dict(base, **{"score.weight": np.ones((2, 3))}))
    with pytest.raises(FormatError, match="no matrix has changed"):
        formats.extract_files(head, here, rank=1, rest="save")
    for options in ({}, {"rank": 0}, {"energy": 2.0}, {"rank": 1, "rest": "keep"}, {"energy": 0.5, "exact": False}):
        with pytest.raises(ConfigError):
            formats.extract_files(head, here, **options)


def test_a_parameter_of_its_own_has_no_place(rng, save):
    base = {"fc.weight": np.eye(3), "scale": np.ones(2), "fc.scale": np.ones(2)}
    tuned = {"fc.weight": np.eye(3) + 1, "scale": np.zeros(2), "fc.scale": np.zeros(2)}
    with pytest.raises(FormatError, match="(?s)2 problems.*fc.scale.*scale.*--rest drop"):
        formats.extract_files(save("tuned", tuned), save("base", base), rank=1, rest="save")
