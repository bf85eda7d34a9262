"""`formats.combine` against dense sums in float64; and what cannot be combined."""
import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from minilora import formats, lora
from minilora.errors import ConfigError, FormatError, ShapeError, StateError
from minilora.formats.adapters.saved import TokenRows, Update
from minilora.formats.algebra.combine import METHODS
from minilora.formats.placing.fingerprint import KEY

UNIT = {"float16": 2.0 ** -11, "float32": 2.0 ** -24, "float64": 2.0 ** -53, "bfloat16": 2.0 ** -8}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@settings(max_examples=20)
@given(st.lists(st.tuples(oracle.adapters(), oracle.WEIGHTS), min_size=1, max_size=3), st.sampled_from(["cat", "sum"]))
def test_a_sum_is_exact_but_for_the_rounding_that_it_reports(pairs, how):
    given_, weights = [a for a, _ in pairs], [w for _, w in pairs]
    done = formats.combine(given_, weights, how)
    assert sorted(done.adapter.updates) == sorted(set().union(*(a.updates for a in given_)))
    for row in done.rows:
        wanted = sum(w * oracle.deltas(a, row.path) for a, w in pairs)
        got = oracle.D(done.adapter.updates[row.path])
        size = sum(abs(w) * np.abs(oracle.deltas(a, row.path)).sum() for a, w in pairs) + 1e-30
        assert np.linalg.norm(got - wanted) <= row.error * (1 + 1e-6) + 1e-12 * size
        assert row.norm == pytest.approx(np.linalg.norm(wanted), rel=1e-6, abs=1e-12 * size)
        worst = max(UNIT[a.updates[row.path].A.dtype.name] for a in given_ if row.path in a.updates)
        assert row.error <= 20 * worst * size
        if how == "cat":
            assert row.after == sum(a.updates[row.path].r for a in given_ if row.path in a.updates)
    assert done.error == pytest.approx(math.hypot(*(row.error for row in done.rows)))


@settings(max_examples=20)
@given(st.lists(st.tuples(oracle.adapters(dtypes=("float64",)), oracle.WEIGHTS), min_size=1, max_size=3), st.integers(1, 3))
def test_svd_is_the_nearest_of_its_rank(pairs, rank):
    done = formats.combine([a for a, _ in pairs], [w for _, w in pairs], "svd", rank=rank)
    for row in done.rows:
        wanted = sum(w * oracle.deltas(a, row.path) for a, w in pairs)
        got = oracle.D(done.adapter.updates[row.path])
        groups = oracle.GROUPS if row.path == "grouped" else 1
        best = 0.0
        for part in np.split(wanted, groups):
            best += (np.linalg.svd(part, compute_uv=False)[max(1, rank // groups):] ** 2).sum()
        size = np.linalg.norm(wanted) + 1e-6
        assert np.linalg.norm(got - wanted) == pytest.approx(math.sqrt(best), rel=1e-6, abs=1e-7 * size)
        assert row.error == pytest.approx(math.sqrt(best), rel=1e-6, abs=1e-7 * size)
        assert done.adapter.updates[row.path].r <= max(groups, rank)


@settings(max_examples=15)
@given(oracle.adapters(biased=True))
def test_one_adapter_with_weight_1_is_the_same_function(adapter):
    for how in ("cat", "sum", "svd"):
        assert formats.difference(adapter, formats.combine([adapter], [1.0], how).adapter).same


@settings(max_examples=15)
@given(oracle.adapters())
def test_an_adapter_twice_is_its_double_and_minus_itself_nothing(adapter):
    twice = formats.combine([adapter, adapter])
    double = dataclasses.replace(adapter, updates={p: dataclasses.replace(u, s=2 * u.s) for p, u in adapter.updates.items()})
    assert formats.difference(double, twice.adapter).same
    nothing = formats.combine([adapter, adapter], [1.0, -1.0], "cat")
    assert nothing.norm <= 1e-12 * twice.norm


def test_ranks_and_rules_are_said_by_alpha_over_r(rng, tmp_path):
    """PEFT takes use_rslora over, and its combination is too large by sqrt(r)."""
    one = oracle.with_settings(oracle.adapter(rng, r=4, s=16 / 2.0), use_rslora=True, lora_alpha=16)
    for how in ("cat", "sum", "svd"):
        done = formats.combine([one, oracle.adapter(rng, r=2)], [0.5, 2.0], how)
        assert not done.adapter.config.use_rslora
        formats.write_adapter(done.adapter, tmp_path / how)
        again = formats.read_adapter(tmp_path / how)
        for path, update in done.adapter.updates.items():
            assert again.updates[path].s == update.s
        assert formats.difference(done.adapter, again).same


@pytest.mark.parametrize("how", METHODS)
def test_the_same_numbers_give_the_same_bytes(how, rng, tmp_path):
    pair = [oracle.adapter(rng, oracle.SHAPES, r=3), oracle.adapter(rng, oracle.SHAPES, r=2, s=0.3)]
    seed = {"seed": 7} if "dare" in how else {}
    for name in ("one", "two"):
        formats.write_adapter(formats.combine(pair, [1.0, -0.4], how, **seed).adapter, tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_ties_and_dare_are_those_of_D(rng):
    one, two = oracle.adapter(rng, ["h.0.attn"], dtype="float64"), oracle.adapter(rng, ["h.0.attn"], dtype="float64", s=0.7)
    parts = [lora.LowRank(a.updates["h.0.attn"].A, a.updates["h.0.attn"].B, a.updates["h.0.attn"].s) for a in (one, two)]
    for how, same in (("ties", lora.ties(parts, [1.0, 2.0], 0.3, 4)),
                      ("dare", lora.dare(parts, [1.0, 2.0], 0.3, 4, np.random.default_rng(3))),
                      ("dare_ties", lora.dare(parts, [1.0, 2.0], 0.3, 4, np.random.default_rng(3), "ties"))):
        done = formats.combine([one, two], [1.0, 2.0], how, density=0.3, rank=4, seed=None if how == "ties" else 3)
        np.testing.assert_allclose(oracle.D(done.adapter.updates["h.0.attn"]), same.update.dense(), atol=1e-12)
        assert done.rows[0].error == pytest.approx(same.error, rel=1e-9)


def test_ties_by_hand_with_a_layer_that_one_lacks():
    """Trimmed to half; 4 and -2 against 3 and 3: the signs of the sums are elected, and what agrees is averaged."""
    def row(values, path="h.0.attn"):
        return oracle.of({path: Update("linear", np.array([values]), np.ones((1, 1)), 1.0)})

    one, two = row([4.0, 1.0, -2.0, 0.5]), row([3.0, 3.0, 1.0, 0.5])
    alone = row([5.0, 1.0, 1.0, 7.0], "h.0.mlp")
    done = formats.combine([one, oracle.of({**two.updates, **alone.updates})], how="ties", density=0.5)
    np.testing.assert_allclose(oracle.D(done.adapter.updates["h.0.attn"]), [[3.5, 3.0, -2.0, 0.0]], atol=1e-12)
    np.testing.assert_allclose(oracle.D(done.adapter.updates["h.0.mlp"]), [[5.0, 0.0, 0.0, 7.0]], atol=1e-12)


def test_what_no_source_touches_stays_zero(rng):
    """A token that no adapter has seen, and another group's channels: exactly 0, also behind an SVD."""
    one = oracle.adapter(rng, ["tokens", "grouped"], r=4)
    one.updates["tokens"].A[:, [0, 3, 11]] = 0
    for how in ("sum", "svd", "ties"):
        made = formats.combine([one, one], [1.0, 0.5], how).adapter.updates
        assert not made["tokens"].A[:, [0, 3, 11]].any()
        blocks = np.split(made["grouped"].A, 2)
        assert not blocks[0][:, 2:].any() and not blocks[1][:, :2].any()


def test_biases_of_updates_add_up(rng):
    one = oracle.adapter(rng, ["h.0.attn", "tokens"], with_bias=True, dtype="float64")
    two = oracle.adapter(rng, ["h.0.attn", "h.0.mlp"], s=0.3, dtype="float64")
    for how in ("cat", "sum", "svd"):
        made = formats.combine([one, two, one], [2.0, 1.0, -0.5], how).adapter
        wanted = 1.5 * oracle.bias(one.updates["h.0.attn"])
        np.testing.assert_allclose(oracle.bias(made.updates["h.0.attn"]), wanted, rtol=1e-12)
        assert made.config.lora_bias and not made.updates["h.0.mlp"].bias.any() and made.updates["tokens"].bias is None
    with pytest.raises(FormatError, match="(?s)h.0.attn.*lora_bias.*how='svd'"):
        formats.combine([one, two], how="ties")


def test_dora_and_moved_bases_are_refused_with_the_reason(rng):
    dora, plain = oracle.adapter(rng, dora=True), oracle.adapter(rng)
    pissa = oracle.with_settings(plain, init_lora_weights="pissa")
    with pytest.raises(FormatError, match=r"(?s)2 problems.*style: h.0.attn.*DoRA.*extract.*poems.*pissa.*save_adapter"):
        formats.combine([dora, pissa, plain], names=["style", "poems", "plain"])
    doubled = oracle.with_settings(plain, init_lora_weights="pissa", r=1)  # twice the rank: the start is in the file
    assert formats.combine([doubled, plain]).adapter.config.init_lora_weights is True


def test_misfits_are_all_named(rng):
    one = oracle.adapter(rng, ["h.0.attn", "tokens"])
    swapped = {"h.0.attn": oracle.update(rng, "h.0.mlp"), "tokens": oracle.update(rng, "h.0.attn")}
    with pytest.raises(FormatError, match="(?s)2 problems.*h.0.attn.*tokens"):
        formats.combine([one, oracle.of(swapped)])
    with pytest.raises(FormatError, match="(?s)transformer.h.0.attn.*mapping"):
        formats.combine([one, oracle.of({"transformer.h.0.attn": one.updates["h.0.attn"]})])


def test_options_that_do_nothing_are_refused(rng):
    one = oracle.adapter(rng)
    for options, words in (({"rank": 2}, "rank.*svd"), ({"how": "cat", "energy": 0.9}, "energy"), ({"density": 0.2}, "density"),
                           ({"how": "mean"}, "cat, sum, svd"), ({"how": "dare"}, "rng"), ({"how": "svd", "rank": 0}, "r "),
                           ({"how": "ties", "density": 1.5}, "density"), ({"weights": [1.0, 2.0]}, "1 update"),
                           ({"weights": [math.nan]}, "finite"), ({"saved": "all"}, "saved"), ({"saved": 1}, "saved")):
        with pytest.raises(ConfigError, match=words):
            formats.combine([one], **options)
    with pytest.raises(ConfigError, match="none|got none"):
        formats.combine([])
    with pytest.raises(ConfigError, match="SavedAdapter"):
        formats.combine([one, "path"])


def test_nan_is_found_and_named(rng):
    one = oracle.adapter(rng)
    one.updates["h.0.mlp"].B[0, 0] = np.nan
    for how in METHODS:
        with pytest.raises(StateError, match="h.0.mlp.*NaN"):
            formats.combine([one], how=how, **({"seed": 0} if "dare" in how else {}))


def test_what_does_not_fit_the_dtype_is_refused(rng):
    one = oracle.adapter(rng, dtype="float16")
    with pytest.raises(FormatError, match="h.0.attn.*dtype='float32'"):
        formats.combine([dataclasses.replace(one, updates={p: dataclasses.replace(u, s=1e12) for p, u in one.updates.items()})])
    wide = formats.combine([one], [1e12], dtype="float32").adapter
    assert wide.updates["h.0.attn"].A.dtype == np.float32


def test_mixed_dtypes_take_the_wider(rng):
    made = formats.combine([oracle.adapter(rng, dtype="float16"), oracle.adapter(rng, dtype="float32")]).adapter
    assert {u.A.dtype.name for u in made.updates.values()} == {"float32"}


def test_bfloat16(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    one, two = oracle.adapter(rng, dtype=ml_dtypes.bfloat16), oracle.adapter(rng, dtype="float16")
    assert formats.combine([one]).adapter.updates["h.0.attn"].A.dtype == ml_dtypes.bfloat16
    done = formats.combine([one, two])
    assert done.adapter.updates["h.0.attn"].A.dtype == np.float32
    wanted = sum(oracle.deltas(a, "h.0.attn") for a in (one, two))
    assert np.linalg.norm(oracle.D(done.adapter.updates["h.0.attn"]) - wanted) <= 1e-6 * np.linalg.norm(wanted)


def fingerprinted(adapter, digest="a"):
    tensors = {path: {"sha256": digest * 64, "shape": [1], "dtype": "float32"} for path in adapter.updates}
    said = {"version": 1, "base": "b", "tensors": tensors, "rule": "alpha / r",
            "s": {path: update.s for path, update in adapter.updates.items()}}
    return dataclasses.replace(adapter, metadata={KEY: json.dumps(said)})


def test_different_bases_are_refused_unless_forced(rng):
    one, two = oracle.adapter(rng), oracle.adapter(rng)
    same = formats.combine([fingerprinted(one), fingerprinted(two)])
    said = json.loads(same.adapter.metadata[KEY])
    assert sorted(said["tensors"]) == sorted(one.updates) and said["s"]["h.0.attn"] == same.adapter.updates["h.0.attn"].s
    with pytest.raises(FormatError, match="(?s)different bases.*--force.*h.0.attn.weight of adapters.0. and of adapters.1."):
        formats.combine([fingerprinted(one), fingerprinted(two, "c")])
    forced = formats.combine([fingerprinted(one), fingerprinted(two, "c")], force=True)
    assert any("different bases" in note for note in forced.notes)
    assert any("no fingerprint in adapters[1]" in note for note in formats.combine([fingerprinted(one), two]).notes)


def test_whole_modules_biases_and_rows(rng, tmp_path):
    head, bias = rng.standard_normal((2, 9)).astype("float32"), rng.standard_normal(7).astype("float32")
    rows = rng.standard_normal((2, 5)).astype("float32")

    def adapter(scale):
        made = oracle.with_settings(oracle.adapter(rng), modules_to_save=["score"], bias="lora_only",
                                    trainable_token_indices={"words": [3, 1]})
        return dataclasses.replace(made, saved={"score.weight": scale * head}, biases={"h.0.attn.bias": scale * bias},
                                   tokens={"words": TokenRows((3, 1), scale * rows)})

    one, two = adapter(1), adapter(2)
    with pytest.raises(FormatError, match="(?s)score.weight.*words.*--saved average"):
        formats.combine([one, two])
    with pytest.raises(ConfigError, match="add up to 3"):
        formats.combine([one, two], [1.0, 2.0], saved="average")
    for saved, weights, factor in (("average", [0.25, 0.75], 1.75), (0, [1.0, 1.0], 1), (1, [3.0, 1.0], 2)):
        made = formats.combine([one, two], weights, saved=saved).adapter
        formats.write_adapter(made, tmp_path / str(saved))
        again = formats.read_adapter(tmp_path / str(saved))
        np.testing.assert_allclose(again.saved["score.weight"], factor * head, rtol=1e-6)
        np.testing.assert_allclose(again.biases["h.0.attn.bias"], factor * bias, rtol=1e-6)
        np.testing.assert_allclose(again.tokens["words"].rows, factor * rows, rtol=1e-6)
    assert formats.combine([one, one], saved="same").adapter.saved["score.weight"] is one.saved["score.weight"]
    dropped = formats.combine([one, two], saved="drop")
    formats.write_adapter(dropped.adapter, tmp_path / "dropped")
    assert not formats.read_adapter(tmp_path / "dropped").saved and sum('left out' in note for note in dropped.notes) == 3
    with pytest.raises(FormatError, match="not in adapters.1."):
        formats.combine([one, oracle.adapter(rng)])


def test_a_tied_head_follows_its_table(rng, tmp_path):
    table = oracle.update(rng, "tokens", r=3, s=0.5)

    def tied(update):
        return oracle.of({"tokens": update, "lm_head": Update("linear", update.B.T.copy(), update.A.T.copy(), update.s)})

    one, two = tied(table), tied(oracle.update(rng, "tokens", r=2, s=0.3))
    for how in ("cat", "sum", "svd"):
        made = formats.combine([one, two], [1.0, 0.3], how).adapter.updates
        assert np.array_equal(made["lm_head"].A, made["tokens"].B.T) and np.array_equal(made["lm_head"].B, made["tokens"].A.T)
    with pytest.raises(FormatError, match="tied head"):
        formats.combine([one, oracle.of({"tokens": table})])


def test_nothing_of_the_weight_s_size_is_formed():
    """Sums, their SVD and distances of a layer of 4e9 entries."""
    rng = np.random.default_rng(0)
    one = oracle.of({"fc": Update("linear", rng.standard_normal((2, 70_000)), rng.standard_normal((60_000, 2)), 1.0)})
    done = formats.combine([one, one], [1.0, 0.5], "svd")
    assert done.rows[0].after == 2 and done.rows[0].relative < 1e-9


def test_a_wrong_shape_of_factors_is_an_error_with_its_path():
    wrong = oracle.of({"fc": Update("linear", np.ones((2, 3)), np.ones((4, 2)), 1.0)})
    wrong.updates["fc"] = Update("linear", np.ones((2, 0)), np.ones((4, 2)), 1.0)
    with pytest.raises(ShapeError):
        formats.combine([wrong])
