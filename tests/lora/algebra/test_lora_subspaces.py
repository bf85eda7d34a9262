"""Section 7 of the paper: subspaces, amplification and spectra, against dense formulas, by hand, and against chance."""
import math

import numpy as np
import pytest
from conftest import fetch, place
from hypothesis import given, strategies as st

from minilora import lora
from minilora.errors import ConfigError, DeviceError, DTypeError, ShapeError, StateError
from minilora.lora.algebra import compress, subspaces

drawn_shapes = st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(1, 5))


def draw(shape, seed=0, s=0.5, dtype="float64"):
    out, n_in, r = shape
    rng = np.random.default_rng(seed)
    return lora.LowRank(place(rng.standard_normal((r, n_in)).astype(dtype)),
                        place(rng.standard_normal((out, r)).astype(dtype)), s)


def dense(update):
    return update.s * fetch(update.B).astype("float64") @ fetch(update.A).astype("float64")


def moved(update, seed=0):
    """The same D in another gauge."""
    C = np.linalg.qr(np.random.default_rng(seed).standard_normal((update.r, update.r)))[0] * np.linspace(0.5, 2, update.r)
    return lora.LowRank(place(C @ fetch(update.A)), place(fetch(update.B) @ np.linalg.inv(C)), update.s)


def vectors(update, of):
    """The singular vectors that a name stands for, as columns, from dense SVDs."""
    A, B, D = fetch(update.A), fetch(update.B), dense(update)
    matrix, right = {"A": (A, True), "B": (B, False), "V": (D, True), "U": (D, False)}[of]
    left, _, Vt = np.linalg.svd(matrix, full_matrices=False)
    rank = min(update.r, *update.shape) if of in "UV" else min(matrix.shape)
    return (Vt.T if right else left)[:, :rank]


# -- subspaces ------------------------------------------------------------------------------------------------------


@given(shape=drawn_shapes, r=st.integers(1, 5), seed=st.integers(0, 2 ** 20), of=st.sampled_from("ABVU"))
def test_similarity_is_the_formula(device, shape, r, seed, of):
    one, two = draw(shape, seed), draw((*shape[:2], r), seed + 1)
    result = lora.subspace_similarity(one, two, of)
    U1, U2 = vectors(one, of), vectors(two, of)
    assert result.grid.shape == (U1.shape[1], U2.shape[1]) and result.n == shape[1 if of in "AV" else 0]
    for (i, j), phi in np.ndenumerate(result.grid):
        expected = np.linalg.norm(U1[:, :i + 1].T @ U2[:, :j + 1]) ** 2 / min(i + 1, j + 1)
        assert phi == pytest.approx(expected, abs=1e-9) and 0 <= phi <= 1


@pytest.mark.parametrize("of", "ABVU")
def test_similarity_with_itself_and_with_its_complement(device, of):
    update = draw((8, 9, 3))
    same = lora.subspace_similarity(update, update.scaled(-3.0), of)
    np.testing.assert_allclose(same.grid, 1, atol=1e-12)
    left, right = (np.linalg.qr(np.random.default_rng(0).standard_normal((n, 6)))[0] for n in (8, 9))
    one, two = (lora.LowRank(place(right[:, part].T.copy()), place(left[:, part].copy())) for part in (slice(3), slice(3, 6)))
    np.testing.assert_allclose(lora.subspace_similarity(one, two, of).grid, 0, atol=1e-12)


def test_a_subspace_inside_a_larger_one(device):
    """The paper's question for r = 8 and r = 64: are the first directions of one within those of the other?"""
    big = draw((10, 12, 6), seed=1)
    small = lora.recompress(big, r=2).update
    grid = lora.subspace_similarity(small, big, "V").grid
    np.testing.assert_allclose(grid[1, 1:], 1, atol=1e-12)
    np.testing.assert_allclose(grid[0], 1, atol=1e-12)


def test_which_vectors_know_the_gauge(device):
    one, two = draw((8, 9, 3)), draw((8, 9, 4), seed=1)
    for of in "VU":
        np.testing.assert_allclose(lora.subspace_similarity(moved(one), two, of).grid,
                                   lora.subspace_similarity(one, two, of).grid, atol=1e-10)
    for of in "AB":
        there, here = lora.subspace_similarity(moved(one), two, of).grid, lora.subspace_similarity(one, two, of).grid
        assert np.abs(there - here).max() > 1e-3
        np.testing.assert_allclose(there[-1], here[-1], atol=1e-10)  # the whole space is the same


@pytest.mark.parametrize("of", "AV")
def test_chance_is_max_i_j_over_n(of):
    """200 pairs of Gaussian adapters: the mean grid within five standard errors of max(i, j) / n, entry by entry."""
    n, pairs = 24, 200
    grids = np.array([lora.subspace_similarity(draw((n, n, 3), 2 * k), draw((n, n, 5), 2 * k + 1), of).grid
                      for k in range(pairs)])
    result = lora.subspace_similarity(draw((n, n, 3)), draw((n, n, 5), 1), of)
    assert (np.abs(grids.mean(axis=0) - result.expected) <= 5 * grids.std(axis=0) / math.sqrt(pairs)).all()
    for (i, j), expected in np.ndenumerate(result.expected):
        assert expected == lora.expected_similarity(i + 1, j + 1, n) == max(i + 1, j + 1) / n
    np.testing.assert_allclose(result.above_chance, (result.grid - result.expected) / (1 - result.expected), rtol=1e-12)


def test_above_chance_where_chance_is_all(device):
    one = draw((3, 3, 3))
    result = lora.subspace_similarity(one, one)
    assert np.isnan(result.above_chance[2]).all() and np.isnan(result.above_chance[:, 2]).all()
    np.testing.assert_allclose(result.above_chance[:2, :2], 1, atol=1e-12)


def test_only_directions_that_exist_are_compared(device):
    deficient = lora.LowRank(place(np.outer([1.0, 2.0, 3.0], np.arange(1.0, 6.0))), place(np.ones((4, 3))))
    for of in "ABVU":
        assert lora.subspace_similarity(deficient, deficient, of).grid.shape == (1, 1)
    fresh = lora.LowRank(place(np.ones((2, 5))), place(np.zeros((4, 2))))  # as before training
    assert lora.subspace_similarity(fresh, fresh, "A").grid.shape == (1, 1)
    for of in "BVU":
        with pytest.raises(StateError, match=f"{of} of LowRank.* is 0.*compare A"):
            lora.subspace_similarity(fresh, fresh, of)


def test_similarity_table(device):
    right = np.eye(8)
    one = lora.LowRank(place(right[:3] * [[3.0], [2.0], [1.0]]), place(np.ones((2, 3))))
    assert str(lora.subspace_similarity(one, one)) == "\n".join([
        "phi(i, j), A, n = 8; in brackets: random subspaces",
        "   i \\ j               1               2               3",
        "       1   1.000 (0.125)   1.000 (0.250)   1.000 (0.375)",
        "       2   1.000 (0.250)   1.000 (0.250)   1.000 (0.375)",
        "       3   1.000 (0.375)   1.000 (0.375)   1.000 (0.375)"])


# -- amplification --------------------------------------------------------------------------------------------------


@given(shape=drawn_shapes, seed=st.integers(0, 2 ** 20), r=st.one_of(st.none(), st.integers(1, 6)),
       dtype=st.sampled_from(["float32", "float64"]))
def test_amplification_is_the_formula(device, shape, seed, r, dtype):
    update = draw(shape, seed, dtype=dtype)
    W = np.random.default_rng(seed + 1).standard_normal(shape[:2]).astype(dtype)
    result = lora.amplification(update, place(W), r)
    D, W = dense(update), W.astype("float64")
    rank = min(shape)
    k = rank if r is None else min(r, rank)
    left, S, Vt = np.linalg.svd(D)
    own = np.linalg.svd(W, compute_uv=False)
    assert result.r == k
    assert result.update_norm == pytest.approx(np.linalg.norm(D), rel=1e-12)
    assert result.weight_norm == pytest.approx(np.linalg.norm(W), rel=1e-12)
    gap = 1.0 if k == min(shape[:2]) else (S[k - 1] - S[k]) / S[0]  # of vectors that a small gap leaves open
    projected = np.linalg.norm(left[:, :k].T @ W @ Vt[:k].T)
    assert result.along_update == pytest.approx(projected, abs=1e-12 * np.linalg.norm(W) / max(gap, 1e-9))
    assert result.along_weight == pytest.approx(math.sqrt((own[:k] ** 2).sum()), rel=1e-12)
    assert result.along_random == pytest.approx(k * np.linalg.norm(W) / math.sqrt(shape[0] * shape[1]), rel=1e-12)
    assert result.along_update <= result.along_weight * (1 + 1e-12)  # W's own directions hold the most of it
    assert result.factor == result.update_norm / result.along_update


def test_figures_of_the_paper():
    """Table 7: W_q (12288 x 12288) of norm 61.95 gives 0.02 for a random pair at r = 4 and 0.33 at r = 64, by one draw."""
    for r, printed in ((4, 0.02), (64, 0.33)):
        assert subspaces.random_projection(61.95, (12288, 12288), r) == pytest.approx(printed, abs=0.01)
    assert subspaces.Amplification(4, 6.91, 61.95, 0.32, 21.67, 0.02).factor == pytest.approx(21.6, abs=0.1)


def test_random_directions_in_mean():
    """E ||U^T W V||^2 = r^2 ||W||^2 / (out in), within five standard errors."""
    out, n_in, r, draws = 12, 9, 3, 400
    rng = np.random.default_rng(0)
    W = rng.standard_normal((out, n_in)) * np.linspace(0.1, 3, n_in)
    squares = []
    for _ in range(draws):
        left, right = (np.linalg.qr(rng.standard_normal((n, r)))[0] for n in (out, n_in))
        squares.append(np.linalg.norm(left.T @ W @ right) ** 2)
    expected = lora.amplification(draw((out, n_in, r)), W).along_random ** 2
    assert abs(np.mean(squares) - expected) <= 5 * np.std(squares) / math.sqrt(draws)


def test_planted_amplification(device):
    """W has 0.1 along the update's two directions; the update has 2 there: a factor of 2 sqrt 2 / (0.1 sqrt 2) = 20."""
    left, right = (np.linalg.qr(np.random.default_rng(n).standard_normal((n, n)))[0] for n in (10, 8))
    sigma = np.array([5, 4, 3, 0.1, 0.1, 0.05, 0.05, 0.05])
    W = left[:, :8] * sigma @ right.T
    update = lora.LowRank(place(right[:, 3:5].T.copy()), place(left[:, 3:5].copy()), 2.0)
    result = lora.amplification(update, place(W))
    assert result.factor == pytest.approx(20, rel=1e-10)
    assert result.along_weight == pytest.approx(math.hypot(5, 4), rel=1e-12)
    nowhere = lora.amplification(update, place(W - 0.1 * left[:, 3:5] @ right[:, 3:5].T))
    assert nowhere.factor > 1e14
    assert lora.amplification(update, place(np.zeros((10, 8)))).factor == math.inf
    assert "inf" in str(lora.amplification(update, place(np.zeros((10, 8)))))


def test_amplification_knows_no_gauge_and_no_blocks(device, monkeypatch):
    update, W = draw((8, 9, 3)), place(np.random.default_rng(1).standard_normal((8, 9)))
    whole = lora.amplification(update, W)
    assert lora.amplification(moved(update), W).factor == pytest.approx(whole.factor, rel=1e-10)
    assert lora.amplification(update.scaled(-2.0), W).factor == pytest.approx(2 * whole.factor, rel=1e-12)
    monkeypatch.setattr(compress, "BLOCK", 20)
    assert lora.amplification(update, W).factor == pytest.approx(whole.factor, rel=1e-12)


def test_randomised_directions_of_the_weight(device):
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, 40)))[0] for n in (60, 50))
    W = left * 0.7 ** np.arange(40) @ right.T
    update = draw((60, 50, 4))
    exact = lora.amplification(update, place(W))
    near = lora.amplification(update, place(W), exact=False, rng=0)
    assert exact.along_weight * (1 - 1e-6) <= near.along_weight <= exact.along_weight * (1 + 1e-12)
    assert near.along_update == exact.along_update


# -- spectra --------------------------------------------------------------------------------------------------------


@given(shape=drawn_shapes, seed=st.integers(0, 2 ** 20))
def test_spectrum_is_the_formula(device, shape, seed):
    update = draw(shape, seed)
    result = lora.spectrum(update)
    count = min(shape)
    sigma = np.linalg.svd(dense(update), compute_uv=False)[:count]
    np.testing.assert_allclose(result.singular_values, sigma, rtol=0, atol=1e-12 * sigma[0])
    p = sigma / sigma.sum()
    assert result.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-9)
    assert result.stable_rank == pytest.approx((sigma ** 2).sum() / sigma[0] ** 2, rel=1e-9)
    assert 1 <= result.stable_rank <= result.rank + 1e-9 and 1 - 1e-9 <= result.effective_rank <= result.rank + 1e-9
    assert result.r == shape[2] and result.rank == count and result.norm == pytest.approx(np.linalg.norm(sigma), rel=1e-12)
    for energy in (0.1, 0.5, 0.9, 0.99):
        k = result.rank_at(energy)
        assert (sigma[:k] ** 2).sum() >= energy * (sigma ** 2).sum() * (1 - 1e-12)
        assert k == 1 or (sigma[:k - 1] ** 2).sum() < energy * (sigma ** 2).sum() * (1 + 1e-12)
    assert result.rank_at(1.0) <= count


@pytest.mark.parametrize(("sigma", "effective", "stable"),
                         [([1, 1, 1, 1], 4, 4), ([3, 0, 0], 1, 1), ([1, 1, 0], 2, 2), ([0], 0, 0)])
def test_effective_rank_by_hand(device, sigma, effective, stable):
    update = lora.LowRank(place(np.diag(np.array(sigma, float))), place(np.eye(len(sigma))))
    result = lora.spectrum(update)
    assert result.effective_rank == pytest.approx(effective, abs=1e-12)
    assert result.stable_rank == pytest.approx(stable, abs=1e-12)
    assert result.rank == np.count_nonzero(sigma) and result.energy[-1] == 1
    assert "nan" not in str(result)


def test_values_that_are_rounding_are_0(device):
    update = draw((8, 9, 3))
    result = lora.spectrum(lora.cat([update, update], [0.75, -0.35]))
    assert result.r == 6 and result.rank == 3 and (result.singular_values[3:] == 0).all()
    assert result.effective_rank == pytest.approx(lora.spectrum(update).effective_rank, rel=1e-12)


def test_spectrum_table(device):
    update = lora.LowRank(place(np.diag([3.0, 1.0])), place(np.eye(2)))
    assert str(lora.spectrum(update)) == "\n".join([
        "   j      sigma_j  energy to j",
        "   1            3     0.900000",
        "   2            1     1.000000",
        "norm 3.162, rank 2 of 2, effective 1.75, stable 1.11, 2 hold 99 % of the energy"])


# -- bad input ------------------------------------------------------------------------------------------------------


def test_bad_input(device):
    update, W = draw((4, 5, 2)), place(np.ones((4, 5)))
    with pytest.raises(ConfigError, match="A, B, V, U, got 'C'"):
        lora.subspace_similarity(update, update, "C")
    with pytest.raises(ShapeError, match=r"\(4, 5\) and \(4, 6\): A lives in 5 and 6"):
        lora.subspace_similarity(update, draw((4, 6, 2)))
    assert lora.subspace_similarity(update, draw((4, 6, 2)), "B").n == 4  # the outputs are the same
    with pytest.raises(ShapeError, match=r"expected a weight \(4, 5\).*got \(5, 4\)"):
        lora.amplification(update, W.T)
    with pytest.raises(DTypeError, match="int64"):
        lora.amplification(update, place(np.ones((4, 5)), "int64"))
    with pytest.raises(ConfigError, match="r must be an int >= 1, got 0"):
        lora.amplification(update, W, 0)
    with pytest.raises(ConfigError, match="rng=None"):
        lora.amplification(update, W, exact=False)
    with pytest.raises(StateError, match="is 0 and has no directions"):
        lora.amplification(update.scaled(0.0), W)
    for arguments, text in (((0, 1, 4), "i must be an int >= 1, got 0"), ((1, 5, 4), "4 dimensions has no subspace of 5")):
        with pytest.raises(ConfigError, match=text):
            lora.expected_similarity(*arguments)
    if device != "cpu":
        with pytest.raises(DeviceError, match="W on the cpu"):
            lora.amplification(update, np.ones((4, 5)))
        with pytest.raises(DeviceError, match="the other on the cpu"):
            lora.subspace_similarity(update, lora.LowRank(np.ones((1, 5)), np.ones((4, 1))))


def test_not_finite(device):
    broken = lora.LowRank(place(np.full((2, 5), np.inf)), place(np.ones((4, 2))))
    calls = [lambda: lora.spectrum(broken), lambda: lora.amplification(broken, place(np.ones((4, 5))))]
    calls += [lambda of=of: lora.subspace_similarity(broken, broken, of) for of in "AVU"]
    calls.append(lambda: lora.amplification(draw((4, 5, 2)), place(np.full((4, 5), np.nan))))
    for call in calls:
        with np.errstate(all="ignore"), pytest.raises(StateError, match="NaN or inf"):
            call()
