"""Section 7 for one update: the figures are those of spectrum, subspace_similarity and amplification; their tables."""
import numpy as np
import pytest

from minilora import lora
from minilora.errors import ConfigError
from minilora.lora.algebra import analysis


def drawn(seed, r, zero=False):
    rng = np.random.default_rng(seed)
    return lora.LowRank(A=rng.standard_normal((r, 9)), B=rng.standard_normal((7, r)) * (not zero))


def test_the_figures_are_those_of_the_algebra():
    one, two, W = drawn(0, 3), drawn(1, 5), np.random.default_rng(2).standard_normal((7, 9))
    found = lora.analyse(one, two, W, sides=("A", "U"))
    used, amplified = lora.spectrum(one), lora.amplification(one, W)
    assert (found["r"], found["norm"], found["effective_rank"]) == (3, used.norm, used.effective_rank)
    for side in ("A", "U"):
        np.testing.assert_array_equal(found["similarity"][side]["grid"], lora.subspace_similarity(one, two, side).grid)
    assert found["amplification"]["factor"] == amplified.factor and found["amplification"]["exact"]


def test_an_update_that_is_zero():
    W = np.ones((7, 9))
    found = lora.analyse(drawn(0, 3, zero=True), drawn(1, 2), W)
    assert found["rank"] == found["rank_99"] == 0 and found["similarity"] is found["amplification"] is None
    assert lora.analyse(drawn(0, 3), drawn(1, 2, zero=True))["similarity"] is None
    assert "  0.000  " in lora.analysis_table("ranks", [(("fc",), [found])])
    assert lora.analysis_table("similarity", [(("fc",), [found])]) == ""
    assert lora.analysis_table("amplification", []) == ""


def test_large_weights_are_estimated(monkeypatch):
    monkeypatch.setattr(analysis, "LARGE", 4)
    found = lora.analyse(drawn(0, 3), W=np.random.default_rng(2).standard_normal((7, 9)))["amplification"]
    assert not found["exact"] and found["along_weight"] > 0


def test_the_similarity_table():
    same = lora.analyse(drawn(0, 3), drawn(0, 3))  # equal ranks: top i in top i
    text = lora.analysis_table("similarity", [(("fc", "1"), [same]), (("low", "1"), [lora.analyse(drawn(0, 1), drawn(0, 5))])],
                               ("layer", "n")).split("\n")
    assert text[0].split() == ["layer", "n", "top", "1", "top", "2"] and text[2].split() == [
        "fc", "1", "1.00", "(0.11)", "1.00", "(0.22)"]
    assert text[3].split()[:2] == ["low", "1"] and text[3].split()[-1] == "(0.56)"
    drawn_chance = {"similarity": {"V": {**same["similarity"]["V"], "random": np.full((3, 3), 0.25)}}}
    assert "1.00 (0.25)" in lora.analysis_table("similarity", [(("fc",), [drawn_chance])])


def test_means_and_refusals():
    figures = [lora.analyse(drawn(seed, 2)) for seed in range(3)]
    assert f"{sum(one['norm'] for one in figures) / 3:.3f}" in lora.analysis_table("ranks", [(("fc",), figures)])
    with pytest.raises(ConfigError, match="part must be one of ranks, similarity, amplification"):
        lora.analysis_table("angles", [])
