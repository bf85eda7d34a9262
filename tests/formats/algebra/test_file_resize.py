"""`formats.resize` against a dense SVD."""
import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from minilora import formats
from minilora.errors import ConfigError, FormatError, StateError
from minilora.formats.adapters.saved import Update
from minilora.formats.placing.fingerprint import KEY


@settings(max_examples=25)
@given(oracle.adapters(biased=True), st.integers(1, 5), st.sampled_from([None, 0.5, 0.9, 0.999, 1.0]))
def test_each_layer_is_the_nearest_and_the_error_is_certain(adapter, rank, energy):
    done = formats.resize(adapter, rank, energy)
    for row in done.rows:
        before, after = adapter.updates[row.path], done.adapter.updates[row.path]
        wanted, got = oracle.D(before), oracle.D(after)
        norm = np.linalg.norm(wanted)
        groups = oracle.GROUPS if row.path == "grouped" else 1
        if after.r < before.r:
            parts = [np.linalg.svd(part, compute_uv=False) for part in np.split(wanted, groups)]
            best = math.sqrt(sum((sigma[after.r // groups:] ** 2).sum() for sigma in parts))
            assert np.linalg.norm(got - wanted) <= row.error * (1 + 1e-6) + 1e-12 * norm
            assert row.error <= best + 4e-3 * norm  # the rest is float16's rounding
            assert np.linalg.norm(got - wanted) >= best * (1 - 1e-9)
            assert after.r <= max(rank, groups)
        else:
            assert after.A.tobytes() == before.A.tobytes() and after.s == before.s and row.error == 0
        np.testing.assert_allclose(oracle.bias(after), oracle.bias(before), rtol=2e-3, atol=1e-6)
        assert after.A.dtype == before.A.dtype and after.A.shape[1:] == before.A.shape[1:]


@settings(max_examples=15)
@given(oracle.adapters(dtypes=("float32", "float64")), st.sampled_from([0.3, 0.9, 0.99]))
def test_energy_is_kept_with_the_fewest_ranks(adapter, energy):
    for row in formats.resize(adapter, energy=energy).rows:
        assert row.energy >= energy - 1e-6
        if row.path != "grouped" and row.after > 1:
            sigma = np.linalg.svd(oracle.D(adapter.updates[row.path]), compute_uv=False)
            assert (sigma[:row.after - 1] ** 2).sum() < energy * (sigma ** 2).sum() * (1 + 1e-6)


@settings(max_examples=15)
@given(oracle.adapters())
def test_at_full_rank_it_is_the_same_function_and_the_same_bits(adapter):
    done = formats.resize(adapter, 64)
    assert formats.difference(adapter, done.adapter).same
    for row in done.rows:
        if row.after == adapter.updates[row.path].r:  # else it has more ranks than the layer
            assert done.adapter.updates[row.path] is adapter.updates[row.path] and row.error == 0


def test_everything_else_stays(tmp_path):
    rng = np.random.default_rng(0)
    made = oracle.with_settings(oracle.adapter(rng, r=4), modules_to_save=["score"], task_type="SEQ_CLS", use_rslora=True,
                                base_model_name_or_path="roberta")
    said = {"version": 1, "base": "b", "tensors": {"h.0.mlp": {"sha256": "c", "shape": [1], "dtype": "float32"}},
            "rule": "alpha / sqrt r", "s": {path: update.s for path, update in made.updates.items()}}
    made = dataclasses.replace(made, saved={"score.weight": rng.standard_normal((2, 7))},
                               metadata={KEY: json.dumps(said), "author": "me"})
    small = formats.resize(made, 2).adapter
    assert small.metadata["author"] == "me" and json.loads(small.metadata[KEY])["s"] == {"h.0.attn": 1.0, "h.0.mlp": 1.0}
    formats.write_adapter(small, tmp_path / "small")
    again = formats.read_adapter(tmp_path / "small")
    assert again.config.task_type == "SEQ_CLS" and again.config.base_model_name_or_path == "roberta"
    assert np.array_equal(again.saved["score.weight"], made.saved["score.weight"])
    assert formats.difference(small, again).same and again.config.r == 2


def test_mixed_ranks_are_read_back(tmp_path):
    rng = np.random.default_rng(0)
    done = formats.resize(oracle.adapter(rng, oracle.SHAPES, r=4), energy=0.8)
    assert len({row.after for row in done.rows}) > 1
    formats.write_adapter(done.adapter, tmp_path / "mixed")
    assert formats.difference(done.adapter, formats.read_adapter(tmp_path / "mixed")).same


def test_a_tied_head_follows_its_table():
    table = oracle.update(np.random.default_rng(0), "tokens", r=3)
    head = Update("linear", table.B.T.copy(), table.A.T.copy(), table.s)
    small = formats.resize(oracle.of({"lm_head": head, "tokens": table}), 2).adapter.updates
    assert list(small) == ["lm_head", "tokens"] and np.array_equal(small["lm_head"].A, small["tokens"].B.T)


def test_an_update_of_zeros_keeps_its_function():
    zero = oracle.of({"h.0.attn": Update("linear", np.ones((3, 9), "float32"), np.zeros((7, 3), "float32"), 1.0)})
    done = formats.resize(zero, 1)
    assert done.rows[0].after == 1 and not oracle.D(done.adapter.updates["h.0.attn"]).any() and done.energy == 1


def test_what_cannot_be_resized_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(FormatError, match="style: h.0.attn.*DoRA"):
        formats.resize(oracle.adapter(rng, dora=True), 1, name="style")
    with pytest.raises(FormatError, match="olora"):
        formats.resize(oracle.with_settings(oracle.adapter(rng), init_lora_weights="olora"), 1)
    with pytest.raises(FormatError, match="no update"):
        formats.resize(dataclasses.replace(oracle.adapter(rng), updates={}), 1)
    bad = oracle.adapter(rng)
    bad.updates["h.0.mlp"].A[0, 0] = np.inf
    with pytest.raises(StateError, match="h.0.mlp.*inf"):
        formats.resize(bad, 1)
    for target in ({}, {"rank": 0}, {"rank": 1.5}, {"energy": 0.0}, {"energy": 95}, {"tolerance": 1.0}):
        with pytest.raises(ConfigError):
            formats.resize(oracle.adapter(rng), **target)
