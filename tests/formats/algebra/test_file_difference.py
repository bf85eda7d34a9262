"""`formats.difference` against dense distances, and what counts as the same function."""
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from minilora import formats
from minilora.errors import FormatError, StateError
from minilora.formats.adapters.saved import TokenRows
from minilora.formats.placing.fingerprint import KEY


@settings(max_examples=25)
@given(oracle.adapters(), oracle.adapters())
def test_distances_are_those_of_dense_matrices(a, b):
    found = formats.difference(a, b)
    for row in found.rows:
        one, two = oracle.deltas(a, row.path), oracle.deltas(b, row.path)
        apart = np.linalg.norm(one - two)
        scale = np.linalg.norm(one) + np.linalg.norm(two)
        assert row.distance == pytest.approx(apart, rel=1e-9, abs=1e-12 * scale)
        assert row.norms == pytest.approx((np.linalg.norm(one), np.linalg.norm(two)), rel=1e-9)
        if min(row.norms):
            assert row.cosine == pytest.approx((one * two).sum() / (row.norms[0] * row.norms[1]), abs=1e-9)
            assert 0 <= row.angles_in[0] <= row.angles_in[1] <= 90 + 1e-9
        assert row.same == (apart <= row.rounding)
    assert found.same == all(row.same for row in found.rows)
    assert json.dumps(found.to_dict(), default=str)


@settings(max_examples=25)
@given(oracle.adapters(biased=True), st.integers(0, 2 ** 32 - 1))
def test_another_gauge_is_the_same_function(adapter, seed):
    """B C and C^-1 A, rounded to the file's dtype again."""
    rng = np.random.default_rng(seed)
    updates = {}
    for path, u in adapter.updates.items():
        if path == "grouped":
            updates[path] = u
            continue
        C = np.linalg.qr(rng.standard_normal((u.r, u.r)))[0] * rng.choice([0.5, 1.0, 2.0], u.r)
        A = np.einsum("jk,k...->j...", np.linalg.inv(C), u.A.astype("float64")).astype(u.A.dtype)
        B = np.einsum("ok...,kj->oj...", u.B.astype("float64"), C).astype(u.B.dtype)
        updates[path] = dataclasses.replace(u, A=A, B=B)
    assert formats.difference(adapter, dataclasses.replace(adapter, updates=updates)).same


@settings(max_examples=15)
@given(oracle.adapters(dtypes=("float32",)))
def test_a_half_precision_copy_is_the_same_and_a_small_change_is_not(adapter):
    half = {p: dataclasses.replace(u, A=u.A.astype("float16"), B=u.B.astype("float16")) for p, u in adapter.updates.items()}
    assert formats.difference(adapter, dataclasses.replace(adapter, updates=half)).same
    moved = {p: dataclasses.replace(u, s=u.s * (1 + 1e-4)) for p, u in adapter.updates.items()}
    assert not formats.difference(adapter, dataclasses.replace(adapter, updates=moved)).same


def test_what_stands_beside_D_counts():
    rng = np.random.default_rng(0)
    plain = oracle.adapter(rng)

    def other(**fields):
        return dataclasses.replace(plain, updates={p: dataclasses.replace(u, **fields) for p, u in plain.updates.items()})

    mlp = np.ones(8, "float32")
    only = dataclasses.replace(plain, updates={"h.0.mlp": plain.updates["h.0.mlp"]})
    lengths = dataclasses.replace(only, updates={"h.0.mlp": dataclasses.replace(only.updates["h.0.mlp"], magnitude=mlp)})
    biased = dataclasses.replace(only, updates={"h.0.mlp": dataclasses.replace(only.updates["h.0.mlp"], bias=mlp)})
    longer = dataclasses.replace(only, updates={"h.0.mlp": dataclasses.replace(only.updates["h.0.mlp"], magnitude=2 * mlp)})
    for a, b, word in ((only, lengths, "DoRA"), (lengths, longer, "lengths"), (only, biased, "biases")):
        found = formats.difference(a, b)
        assert not found.same and word in found.rows[0].reason and word in str(found)
    assert formats.difference(lengths, lengths).same and formats.difference(biased, biased).same
    no_bias = dataclasses.replace(only, updates={"h.0.mlp": dataclasses.replace(only.updates["h.0.mlp"], bias=0 * mlp)})
    assert formats.difference(only, no_bias).same


def test_whole_modules_biases_and_rows_count():
    plain = oracle.adapter(np.random.default_rng(0))
    head = np.arange(6.0, dtype="float32").reshape(2, 3)
    whole = dataclasses.replace(plain, saved={"score.weight": head}, biases={"fc.bias": head[0]},
                                tokens={"words": TokenRows((1, 2), head)})
    near = dataclasses.replace(whole, saved={"score.weight": head.astype("float16")})
    assert formats.difference(whole, near).same
    found = formats.difference(whole, dataclasses.replace(whole, saved={"score.weight": head + 1}, biases={},
                                                          tokens={"words": TokenRows((1, 3), head)}))
    said = str(found)
    assert not found.same and "score.weight: differs" in said and "only in a" in said and said.count("words") == 2
    assert "shapes" not in said and "(2, 3) and (3, 3)" in str(
        formats.difference(whole, dataclasses.replace(whole, saved={"score.weight": np.ones((3, 3))})))


def test_a_missing_layer_is_zero():
    rng = np.random.default_rng(0)
    both, one = oracle.adapter(rng), oracle.adapter(rng, ["h.0.mlp"])
    one = dataclasses.replace(one, updates={"h.0.mlp": both.updates["h.0.mlp"]})
    found = formats.difference(both, one)
    assert not found.same and found.rows[0].relative == 1 and found.rows[0].ranks == (2, 0)
    assert formats.difference(one, both).rows[0].relative == np.inf
    both.updates["h.0.attn"].B[:] = 0
    assert formats.difference(both, one).same and formats.difference(one, both).same and "-" in str(found)


def test_what_cannot_be_compared():
    rng = np.random.default_rng(0)
    one = oracle.adapter(rng)
    with pytest.raises(FormatError, match="h.0.attn: updates of different layers"):
        formats.difference(one, oracle.of({"h.0.attn": oracle.update(rng, "h.0.mlp")}))
    with pytest.raises(FormatError, match="(?s)style to the unchanged one, mine to one that its start .pissa"):
        formats.difference(one, oracle.with_settings(one, init_lora_weights="pissa"), names=("style", "mine"))
    pissa = oracle.with_settings(one, init_lora_weights="pissa")
    assert formats.difference(pissa, pissa).same
    one.updates["h.0.mlp"].A[:] = np.nan
    with pytest.raises(StateError, match="NaN"):
        formats.difference(one, one)


def test_different_bases_are_noted():
    one = oracle.adapter(np.random.default_rng(0), ["h.0.mlp"])

    def of(digest):
        said = {"version": 1, "base": "b", "tensors": {"h.0.mlp": {"sha256": digest}}, "rule": "alpha / r", "s": {}}
        return dataclasses.replace(one, metadata={KEY: json.dumps(said)})

    assert "different bases" in formats.difference(of("a"), of("b")).notes[0]
    assert not formats.difference(of("a"), of("a")).notes and not formats.difference(of("a"), one).notes
