"""Sums, recompression, extraction, TIES and DARE, against dense formulas written differently.

Sums of whole-numbered updates are exact. Every error that is reported is compared with the error itself, and with what
Eckart and Young allow.
"""
import math
import tracemalloc

import numpy as np
import pytest
from conftest import fetch, place
from hypothesis import given, strategies as st

from minilora import lora
from minilora.errors import ConfigError, DeviceError, DTypeError, ShapeError, StateDictError, StateError
from minilora.lora.algebra import compress, sparse

SHAPES = [(6, 8, 3), (8, 6, 3), (5, 5, 1), (3, 4, 7), (1, 6, 2), (6, 1, 2)]  # out, in, r
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
drawn_shapes = st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 5))


def draw(shape, seed=0, s=0.5, dtype="float64"):
    out, n_in, r = shape
    rng = np.random.default_rng(seed)
    return lora.LowRank(place(rng.standard_normal((r, n_in)).astype(dtype)),
                        place(rng.standard_normal((out, r)).astype(dtype)), s)


def integers(shape, seed=0, s=2.0, high=6):
    out, n_in, r = shape
    rng = np.random.default_rng(seed)
    return lora.LowRank(place(rng.integers(-high, high + 1, (r, n_in)).astype(float)),
                        place(rng.integers(-high, high + 1, (out, r)).astype(float)), s)


def dense(update):
    """D in float64 from the stored factors, index by index."""
    return update.s * np.einsum("kj,ji->ki", fetch(update.B).astype("float64"), fetch(update.A).astype("float64"))


def decaying(out, n_in, r, seed=0, ratio=0.5, dtype="float64"):
    """An update with the singular values 1, ratio, ratio^2, ..., and these."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((n, r)))[0] for n in (out, n_in))
    sigma = ratio ** np.arange(r)
    return lora.LowRank(place((right * sigma).T.astype(dtype)), place(left.astype(dtype))), sigma


# -- cat and sums ---------------------------------------------------------------------------------------------------


@given(shape=drawn_shapes, ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 2 ** 20),
       data=st.data())
def test_cat_of_whole_numbers_is_exact(device, shape, ranks, seed, data):
    updates = [integers((*shape[:2], r), seed + i, s=data.draw(st.sampled_from([1.0, 2.0, 0.5, -4.0])))
               for i, r in enumerate(ranks)]
    weights = [data.draw(st.sampled_from([0.0, 1.0, -1.0, 3.0, 0.25, -5.0])) for _ in ranks]
    combined = lora.cat(updates, weights)
    assert combined.r == sum(ranks) and combined.shape == shape[:2] and combined.dtype == "float64"
    assert (fetch(combined.dense()) == sum(w * dense(u) for u, w in zip(updates, weights))).all()


@given(shape=drawn_shapes, seed=st.integers(0, 2 ** 20), weights=st.lists(st.floats(-10, 10), min_size=3, max_size=3))
def test_cat_is_the_sum(device, shape, seed, weights):
    updates = [draw((*shape[:2], r), seed + r, s=r - 1.5) for r in (1, 2, 3)]
    expected = sum(w * dense(u) for u, w in zip(updates, weights))
    size = sum(abs(w) * np.abs(dense(u)).sum() for u, w in zip(updates, weights))
    np.testing.assert_allclose(dense(lora.cat(updates, weights)), expected, rtol=0, atol=1e-14 * size + 1e-300)
    summed = lora.linear_sum(updates, weights)
    assert np.linalg.norm(dense(summed.update) - expected) <= summed.error + summed.rounding


def test_difference_with_one_scaling_is_exact_to_the_bit(device):
    """s = 0.3 is no binary number, but no entry has to be multiplied by it."""
    one, two = draw((6, 8, 3), s=0.3), draw((6, 8, 2), seed=1, s=0.3)
    difference = lora.cat([one, two], [1.0, -1.0])
    assert difference.s == 0.3
    assert fetch(difference.A).tobytes() == np.concatenate([fetch(one.A), -fetch(two.A)]).tobytes()
    assert fetch(difference.B).tobytes() == np.concatenate([fetch(one.B), fetch(two.B)], axis=1).tobytes()
    size = 2 * one.s * np.linalg.norm(fetch(one.B)) * np.linalg.norm(fetch(one.A))  # of what cancels
    assert lora.cat([one, one], [1.0, -1.0]).norm() <= float(np.finfo("float64").eps) * size  # a LAPACK's QR, or cuSOLVER's


@pytest.mark.parametrize("weights", [None, [1.0], [-2.0], [0.0]], ids=str)
def test_a_single_adapter(device, weights):
    update = draw((6, 8, 3))
    np.testing.assert_allclose(dense(lora.cat([update], weights)), (weights or [1.0])[0] * dense(update), rtol=1e-15)
    np.testing.assert_allclose(dense(lora.svd([update], weights).update), (weights or [1.0])[0] * dense(update), atol=1e-14)


def test_weights_of_zero(device):
    one, two = integers((4, 5, 2)), integers((4, 5, 3), seed=1)
    assert not dense(lora.cat([one, two], [0, 0])).any() and lora.cat([one, two], [0, 0]).r == 5
    assert (dense(lora.cat([one, two], [0, 1])) == dense(two)).all()
    nothing = lora.linear_sum([one, two], [0, 0])
    assert (nothing.update.r, nothing.error, nothing.norm, nothing.relative_error, nothing.energy) == (1, 0, 0, 0, 1)


def test_float32_stays_float32(device):
    one, two = draw((6, 8, 3), dtype="float32"), draw((6, 8, 2), seed=1, dtype="float32")
    assert lora.cat([one, two], [0.3, 0.7]).dtype == "float32"
    for result in (lora.svd([one, two]), lora.ties([one, two]), lora.dare([one, two], rng=0),
                   lora.dare([one, two], rng=0, then="ties")):
        assert result.update.dtype == "float32" and result.update.device.name == device and result.update.r == 3


def test_adding_factors_is_not_adding_updates(device):
    """The cross terms: what (B1 + B2)(A1 + A2) has and the sum of the updates has not."""
    one, two = draw((6, 8, 3), s=1.0), draw((6, 8, 3), seed=1, s=1.0)
    mixed = (fetch(one.B) + fetch(two.B)) @ (fetch(one.A) + fetch(two.A))
    cross = fetch(one.B) @ fetch(two.A) + fetch(two.B) @ fetch(one.A)
    right = dense(lora.linear_sum([one, two]).update)
    np.testing.assert_allclose(mixed - right, cross, atol=1e-13)
    assert np.linalg.norm(cross) > 0.5 * np.linalg.norm(right)


# -- recompression --------------------------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("r", [1, 2, 3, 50])
def test_error_is_the_dense_error_and_the_least_possible(device, shape, r):
    update = draw(shape, seed=r)
    small = lora.recompress(update, r=r)
    D = dense(update)
    sigma = np.linalg.svd(D, compute_uv=False)
    kept = min(r, *shape)
    assert small.update.r == kept and small.update.s == 1 and small.singular_values.shape == (min(shape),)
    true = np.linalg.norm(D - dense(small.update))
    best = math.sqrt((sigma[kept:] ** 2).sum())  # Eckart, Young
    assert small.error == pytest.approx(true, rel=1e-12, abs=1e-13) and small.error == pytest.approx(best, rel=1e-12, abs=1e-13)
    assert small.norm == pytest.approx(np.linalg.norm(D), rel=1e-12)
    assert small.energy == pytest.approx((sigma[:kept] ** 2).sum() / (sigma ** 2).sum(), abs=1e-12)
    assert abs(small.error - true) <= small.rounding
    rng = np.random.default_rng(r)
    for _ in range(5):  # no other subspace of that rank does better
        Q = np.linalg.qr(rng.standard_normal((shape[0], kept)))[0]
        assert np.linalg.norm(D - Q @ (Q.T @ D)) >= small.error * (1 - 1e-12) - 1e-13


@given(shape=drawn_shapes, seed=st.integers(0, 2 ** 20), r=st.integers(1, 6),
       dtype=st.sampled_from(["float16", "float32", "float64"]))
def test_error_is_certified_within_the_rounding_stated(device, shape, seed, r, dtype):
    """In every dtype, that of storage included."""
    update = draw(shape, seed, dtype=dtype)
    small = lora.recompress(update, r=r)
    assert small.update.dtype == dtype
    assert abs(np.linalg.norm(dense(update) - dense(small.update)) - small.error) <= small.rounding


@pytest.mark.parametrize("ratio", [0.9, 0.5, 0.1])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_rank_by_energy(device, ratio, energy):
    update, sigma = decaying(30, 20, 8, ratio=ratio)
    small = lora.recompress(update, energy=energy)
    parts = np.cumsum(sigma ** 2) / (sigma ** 2).sum()
    expected = 8 if energy == 1.0 else int(np.argmax(parts >= energy)) + 1
    assert small.update.r == expected and small.energy >= energy - 1e-15
    if expected > 1:
        assert lora.recompress(update, r=expected - 1).energy < energy


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 1e-3, 0.0])
def test_rank_by_tolerance(device, tolerance):
    update, sigma = decaying(30, 20, 8, ratio=0.3)
    small = lora.recompress(update, tolerance=tolerance)
    assert small.relative_error <= tolerance
    if small.update.r > 1:
        assert lora.recompress(update, r=small.update.r - 1).relative_error > tolerance
    assert lora.recompress(update, r=2, tolerance=tolerance).update.r == min(2, small.update.r)


def test_small_tails_keep_their_digits(device):
    """sigma down to 1e-10: 1 - kept / total would be rounding; the tail is summed from its small end."""
    update, sigma = decaying(30, 20, 11, ratio=0.1)
    for k in range(1, 11):
        assert lora.recompress(update, r=k).error == pytest.approx(math.sqrt((sigma[k:] ** 2).sum()), rel=1e-5)
        assert lora.recompress(update, tolerance=float(2 * sigma[k])).update.r == k


@shapes
def test_without_a_target_only_rounding_is_dropped(device, shape):
    update = draw(shape)
    doubled = lora.cat([update, update], [0.75, 0.25])
    small = lora.recompress(doubled)
    assert doubled.r == 2 * update.r and small.update.r == min(shape)
    np.testing.assert_allclose(dense(small.update), dense(update), rtol=0, atol=1e-13)
    assert small.error <= small.rounding < 1e-12


def test_rank_deficient_and_zero_updates(device):
    for s in (1.0, -0.3):
        deficient = lora.LowRank(place(np.ones((4, 5))), place(np.ones((6, 4))), s)
        small = lora.recompress(deficient, r=3)
        assert small.update.r == 1 and small.error < 1e-13
    zero = lora.recompress(lora.LowRank(place(np.ones((4, 5))), place(np.zeros((6, 4)))), energy=0.9)
    assert zero.update.r == 1 and zero.error == 0 and not dense(zero.update).any()
    assert str(zero) == "rank 1: error 0 of norm 0 (0.000%), energy kept 1.000000"


def test_recompression_is_gauge_invariant(device):
    update = draw((6, 8, 3))
    C = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0] * [0.25, 1, 4]
    moved = lora.LowRank(place(C @ fetch(update.A)), place(fetch(update.B) @ np.linalg.inv(C)), update.s)
    one, two = lora.recompress(update, r=2), lora.recompress(moved, r=2)
    np.testing.assert_allclose(dense(one.update), dense(two.update), atol=1e-12)
    assert one.error == pytest.approx(two.error, rel=1e-12)


def test_no_array_of_the_weight_is_formed():
    """2000 x 3000, ranks 8 and 4: the weight would be 48 MB, the factors 480 kB."""
    updates = [draw((2000, 3000, 8)), draw((2000, 3000, 4), seed=1)]
    tracemalloc.start()
    lora.cat(updates)
    lora.linear_sum(updates, [0.5, 2.0], energy=0.9)
    lora.svd(updates, r=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 8 * 5000 * 12  # eight times the factors of the sum


# -- extraction -----------------------------------------------------------------------------------------------------


def pair_of_weights(out, n_in, r, seed=0, noise=0.0, dtype="float64", ratio=0.5):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((out, n_in)).astype(dtype)
    left, right = (np.linalg.qr(rng.standard_normal((n, r)))[0] for n in (out, n_in))
    D = (left * ratio ** np.arange(r)) @ right.T + noise * rng.standard_normal((out, n_in))
    return base, (base + D).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("out", "n_in"), [(30, 20), (20, 30), (7, 7)])
def test_extract(device, out, n_in, dtype):
    base, tuned = pair_of_weights(out, n_in, 3, noise=1e-3, dtype=dtype)
    true = tuned.astype("float64") - base
    found = lora.extract(place(tuned), place(base), r=3)
    assert found.update.dtype == dtype and found.update.r == 3
    assert found.error == pytest.approx(np.linalg.norm(true - dense(found.update)), rel=1e-12)
    best = math.sqrt((np.linalg.svd(true, compute_uv=False)[3:] ** 2).sum())
    assert best * (1 - 1e-12) <= found.error <= best * (1 + (1e-4 if dtype == "float32" else 1e-12))
    assert lora.extract(place(tuned), place(base), energy=0.99).update.r <= 3
    assert fetch(place(tuned)).tobytes() == tuned.tobytes()


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-3])
def test_randomised_extraction_is_nearly_the_exact_one(device, noise):
    base, tuned = pair_of_weights(120, 90, 6, noise=noise)
    exact = lora.extract(place(tuned), place(base), r=6)
    near = lora.extract(place(tuned), place(base), r=6, exact=False, rng=np.random.default_rng(3))
    assert exact.error * (1 - 1e-9) - 1e-13 <= near.error <= exact.error * (1 + 1e-3) + 1e-13
    D = tuned - base
    assert near.error == pytest.approx(np.linalg.norm(D - dense(near.update)), rel=1e-12, abs=1e-14)
    np.testing.assert_allclose(near.singular_values[:6], exact.singular_values[:6], rtol=1e-6 if noise < 1e-3 else 1e-3)
    by_energy = lora.extract(place(tuned), place(base), r=6, energy=0.9, exact=False, rng=3)
    assert by_energy.update.r == lora.extract(place(tuned), place(base), r=6, energy=0.9).update.r < 6
    again = lora.extract(place(tuned), place(base), r=6, exact=False, rng=3)
    assert fetch(again.update.A).tobytes() == fetch(near.update.A).tobytes()


def test_randomised_energy_that_is_not_reached(device):
    """What lies outside the sketch counts as missing: full noise cannot pass for a small tail."""
    rng = np.random.default_rng(0)
    D = rng.standard_normal((60, 50))
    found = lora.extract(place(D), place(np.zeros_like(D)), r=4, energy=0.99, exact=False, rng=0)
    assert found.update.r == 4 and found.energy < 0.5
    half = lora.extract(place(D), place(np.zeros_like(D)), r=30, energy=0.5, exact=False, rng=0)
    assert half.energy >= 0.5 and half.update.r < 30
    assert found.error == pytest.approx(np.linalg.norm(D - dense(found.update)), rel=1e-12)


def test_extract_gives_back_an_update(device):
    update = draw((12, 9, 3))
    base = np.random.default_rng(7).integers(-4, 5, (12, 9)).astype(float)
    found = lora.extract(place(base + dense(update)), place(base))
    assert found.update.r == 9 or found.error < 1e-14  # the sum was rounded: what it left is in the error
    three = lora.extract(place(base + dense(update)), place(base), r=3)
    np.testing.assert_allclose(dense(three.update), dense(update), atol=1e-14)
    same = lora.extract(place(base), place(base), r=3)
    assert same.update.r == 1 and same.error == same.norm == 0


def test_extract_in_several_row_blocks(device, monkeypatch):
    base, tuned = pair_of_weights(30, 20, 3, noise=1e-3)
    whole = lora.extract(place(tuned), place(base), r=3)
    monkeypatch.setattr(compress, "BLOCK", 45)
    assert lora.extract(place(tuned), place(base), r=3).error == pytest.approx(whole.error, rel=1e-14)
    assert [(b.start, b.stop) for b in compress.row_blocks((5, 20))] == [(0, 2), (2, 4), (4, 5)]
    assert len(list(compress.row_blocks((5, 1000)))) == 5


# -- TIES and DARE --------------------------------------------------------------------------------------------------


def plain_ties(matrices, weights, density, method):
    """The paper, entry by entry, in Python; ties elect nothing."""
    trimmed = []
    for D in matrices:
        order = sorted(np.abs(D).ravel(), reverse=True)
        limit = order[int(round(density * D.size, 6)) - 1]
        trimmed.append(np.where(np.abs(D) >= limit, D, 0.0))
    merged = np.zeros_like(matrices[0])
    for at in np.ndindex(merged.shape):
        values = [float(D[at]) for D in trimmed]
        vote = math.fsum(values) if method == "total" else sum((v > 0) - (v < 0) for v in values)
        agreeing = [(v, w) for v, w in zip(values, weights) if v * vote > 0]
        if agreeing:
            merged[at] = sum(v * w for v, w in agreeing) / len(agreeing)
    return merged


@given(shape=drawn_shapes, count=st.integers(1, 4), seed=st.integers(0, 2 ** 20), density=st.floats(0.3, 1.0),
       method=st.sampled_from(["total", "frequency"]), data=st.data())
def test_ties_entry_by_entry(device, shape, count, seed, density, method, data):
    """Whole numbers: every sum, threshold and tie of the votes is exact; full rank keeps the merged D."""
    updates = [integers(shape, seed + i, high=3) for i in range(count)]
    weights = [data.draw(st.sampled_from([1.0, 0.5, -1.0, 2.0, 0.0])) for _ in range(count)]
    if int(round(density * shape[0] * shape[1], 6)) == 0:
        return
    result = lora.ties(updates, weights, density, r=8, majority_sign_method=method)
    expected = plain_ties([dense(u) for u in updates], weights, density, method)
    np.testing.assert_allclose(dense(result.update), expected, rtol=0, atol=1e-12 * (1 + np.abs(expected).max()))
    assert result.error <= 1e-12 * (1 + np.abs(expected).sum())


def test_ties_by_hand(device):
    one = lora.LowRank(place([[4.0, -2.0, 1.0, 3.0]]), place([[1.0]]))
    two = lora.LowRank(place([[2.0, 3.0, -1.0, -3.0]]), place([[1.0]]))
    three = lora.LowRank(place([[-1.0, 2.0, 5.0, 0.0]]), place([[1.0]]))
    total = lora.ties([one, two, three], density=1.0)
    np.testing.assert_allclose(dense(total.update), [[3.0, 2.5, 3.0, 0.0]], atol=1e-14)  # 1 and 5 agree; 3 - 3 elects nothing
    trimmed = lora.ties([one, two, three], density=0.5)  # keep 4 3 | 3 -3 | 2 5: of two equal sizes both stay
    np.testing.assert_allclose(dense(trimmed.update), [[4.0, 2.5, 5.0, 0.0]], atol=1e-14)
    few = lora.LowRank(place([[-5.0]]), place([[1.0]]))
    many = lora.LowRank(place([[2.0]]), place([[1.0]]))
    assert dense(lora.ties([few, many, many], density=1.0).update) == pytest.approx(-5)
    assert dense(lora.ties([few, many, many], density=1.0, majority_sign_method="frequency").update) == pytest.approx(2)
    assert dense(lora.ties([few, many], density=1.0, majority_sign_method="frequency").update) == 0


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_ties_is_odd_and_knows_no_gauge(device, method):
    updates = [draw((6, 8, 2), seed=i) for i in range(3)]
    result = lora.ties(updates, None, 0.4, 6, method)
    np.testing.assert_allclose(dense(lora.ties([-u for u in updates], None, 0.4, 6, method).update), -dense(result.update),
                               atol=1e-13)
    C = np.array([[2.0, 0.5], [-1.0, 1.0]])
    moved = [lora.LowRank(place(C @ fetch(u.A)), place(fetch(u.B) @ np.linalg.inv(C)), u.s) for u in updates]
    np.testing.assert_allclose(dense(lora.ties(moved, None, 0.4, 6, method).update), dense(result.update), atol=1e-13)


def test_equal_weights_scale_ties_as_in_the_paper(device):
    updates = [draw((6, 8, 2), seed=i) for i in range(3)]
    one, two = lora.ties(updates, [1, 1, 1], 0.4, 6), lora.ties(updates, [0.3] * 3, 0.4, 6)
    np.testing.assert_allclose(dense(two.update), 0.3 * dense(one.update), atol=1e-13)


def test_density_counts_as_it_is_written(device):
    """0.29 of 100 entries are 29, though 0.29 * 100 is 28.999999999999996."""
    update = lora.LowRank(place(np.arange(1.0, 101.0).reshape(1, 100)), place([[1.0]]))
    assert (dense(lora.ties([update], density=0.29).update) > 0.5).sum() == 29


@pytest.mark.parametrize("then", ["linear", "ties"])
def test_dare_with_equal_masks(device, then):
    """The masks are drawn as documented: one stream for each update, row by row, kept where below density."""
    updates, weights, density = [draw((6, 8, 2), seed=i) for i in range(3)], [1.0, -0.5, 2.0], 0.6
    result = lora.dare(updates, weights, density, r=6, rng=11, then=then)
    seeds = np.random.default_rng(11).integers(2 ** 63, size=3)
    kept = [dense(u) * (np.random.default_rng(seed).random((6, 8)) < density) / density for u, seed in zip(updates, seeds)]
    expected = sum(w * D for w, D in zip(weights, kept)) if then == "linear" else plain_ties(kept, weights, 1.0, "total")
    np.testing.assert_allclose(dense(result.update), expected, atol=1e-12)


def test_dare_keeps_the_mean(device):
    """Unbiased: the mean over draws is D; each entry has the variance D^2 (1 - p) / p."""
    update, density, draws = integers((3, 4, 3)), 0.5, 400
    D = dense(update)
    mean = sum(dense(lora.dare([update], density=density, r=3, rng=seed).update) for seed in range(draws)) / draws
    sigma = np.abs(D) * math.sqrt((1 - density) / density / draws)
    assert (np.abs(mean - D) <= 5 * sigma + 1e-9).all()
    np.testing.assert_allclose(dense(lora.dare([update], density=1.0, r=3, rng=0).update), D, atol=1e-12)


def test_blocks_change_nothing(device, monkeypatch):
    updates = [draw((7, 8, 2), seed=i) for i in range(3)]
    calls = [lambda: lora.ties(updates, None, 0.4, 7), lambda: lora.dare(updates, None, 0.4, 7, rng=3),
             lambda: lora.dare(updates, None, 0.4, 7, rng=3, then="ties")]
    whole = [dense(call().update) for call in calls]
    for block in (1, 17, 24):
        monkeypatch.setattr(compress, "BLOCK", block)
        for call, expected in zip(calls, whole):
            np.testing.assert_allclose(dense(call().update), expected, atol=1e-13)


def test_randomised_svd_of_merged_updates(device):
    updates = [draw((60, 50, 2), seed=i) for i in range(2)]
    exact = lora.ties(updates, density=0.9, r=4)
    near = lora.ties(updates, density=0.9, r=4, exact=False, rng=0)
    assert exact.error <= near.error * (1 + 1e-12) <= exact.error * 1.02
    again = lora.dare(updates, density=0.9, r=4, exact=False, rng=0)
    assert again.update.r == 4 and np.isfinite(again.error)


def test_memory_of_ties_does_not_grow_with_the_updates():
    """Two arrays of the weight's size in float64, and blocks, however many the updates."""
    out, n_in = 700, 1000
    peaks = []
    for count in (2, 6):
        updates = [draw((out, n_in, 2), seed=i) for i in range(count)]
        tracemalloc.start()
        lora.ties(updates, density=0.3, exact=False, rng=0)
        peaks.append(tracemalloc.get_traced_memory()[1] / (8 * out * n_in))
        tracemalloc.stop()
    blocks = 8 * compress.BLOCK / (8 * out * n_in)
    assert peaks[0] < 2.1 + 8 * blocks and peaks[1] - peaks[0] < 4 * 4 * blocks


# -- whole models ---------------------------------------------------------------------------------------------------


def adapters():
    return [{"q": draw((4, 5, 2), seed=0), "v": draw((6, 5, 2), seed=1)},
            {"v": draw((6, 5, 3), seed=2), "q": draw((4, 5, 1), seed=3)}]


@pytest.mark.parametrize("method", [lora.cat, lora.linear_sum, lora.svd, lora.ties, lora.dare])
def test_models_are_combined_layer_by_layer(device, method):
    one, two = adapters()
    options = {"rng": 5} if method is lora.dare else {}
    combined = lora.combine_adapters([one, two], [0.5, -2.0], method, **options)
    assert list(combined) == ["q", "v"]
    if options:
        options = {"rng": np.random.default_rng(5)}  # one generator for all layers
    for path in ("q", "v"):
        alone = method([one[path], two[path]], [0.5, -2.0], **options)
        got, expected = (u if method is lora.cat else u.update for u in (combined[path], alone))
        assert fetch(got.A).tobytes() == fetch(expected.A).tobytes()


def test_all_misfits_are_in_one_error(device):
    one, two = adapters()
    two["extra"] = two.pop("q")
    two["v"] = draw((6, 4, 3))
    called = []
    with pytest.raises(StateDictError) as caught:
        lora.combine_adapters([one, two], method=lambda *args: called.append(args))
    text = str(caught.value)
    for part in ("extra: not in adapters[0]", "q: not in adapters[1]", "v: adapters[0] has LowRank(out=6, in=5, r=2",
                 "adapters[1] has LowRank(out=6, in=4, r=3", "missing='zero'", "nothing was combined"):
        assert part in text
    assert not called


def test_layers_that_only_some_have(device):
    one, two = adapters()
    del two["q"]
    combined = lora.combine_adapters([one, two], [3.0, 1.0], missing="zero")
    np.testing.assert_allclose(dense(combined["q"]), 3 * dense(one["q"]), rtol=1e-14)
    assert combined["q"].r == 2 and combined["v"].r == 5
    zero = lora.LowRank(place(np.zeros((1, 5))), place(np.zeros((4, 1))))
    left_out = lora.combine_adapters([one, two], [3.0, 1.0], lora.ties, missing="zero", density=0.5)["q"]
    as_zero = lora.ties([one["q"], zero], [3.0, 1.0], density=0.5)
    np.testing.assert_allclose(dense(left_out.update), dense(as_zero.update), atol=1e-13)


def test_an_error_inside_names_the_layer(device):
    one, two = adapters()
    one["v"] = lora.LowRank(place(np.full((2, 5), np.nan)), one["v"].B)
    with pytest.raises(StateError, match="^v: .*found in: A") as caught:
        lora.combine_adapters([one, two], method=lora.svd)
    assert caught.value.path == "v"


# -- bad input ------------------------------------------------------------------------------------------------------


def test_updates_that_do_not_fit_are_all_named(device):
    fit = draw((4, 5, 2))
    odd = [draw((4, 6, 2)), draw((4, 5, 3)), draw((4, 5, 2), dtype="float32")]
    for method in (lora.cat, lora.linear_sum, lora.svd, lora.ties, lambda u: lora.dare(u, rng=0)):
        with pytest.raises(ShapeError) as caught:
            method([fit, *odd])
        text = str(caught.value)
        assert "updates[1]" in text and "in=6" in text and "updates[3]" in text and "float32" in text
        assert "updates[2]" not in text


@pytest.mark.parametrize(("call", "text"), [
    (lambda u: lora.cat([]), "at least one update"), (lambda u: lora.svd([]), "at least one update"),
    (lambda u: lora.ties([]), "at least one update"), (lambda u: lora.combine_adapters([]), "at least one update"),
    (lambda u: lora.cat([u, u], [1.0]), "2 updates and 1 weights"),
    (lambda u: lora.cat([u], [math.nan]), r"weights\[0\] must be a finite number, got nan"),
    (lambda u: lora.cat([u], ["1"]), r"weights\[0\].*'1'"),
    (lambda u: lora.recompress(u, r=0), "r must be an int >= 1, got 0"),
    (lambda u: lora.recompress(u, r=2.0), "r must be an int >= 1, got 2.0"),
    (lambda u: lora.recompress(u, energy=0), r"energy must be a number in \(0, 1\], got 0"),
    (lambda u: lora.recompress(u, energy=1.5), "got 1.5"), (lambda u: lora.recompress(u, energy=math.nan), "got nan"),
    (lambda u: lora.recompress(u, tolerance=1.0), r"tolerance must be a number in \[0, 1\), got 1.0"),
    (lambda u: lora.recompress(u, tolerance=-0.1), "got -0.1"), (lambda u: lora.recompress(u, tolerance=True), "got True"),
    (lambda u: lora.ties([u], density=0), r"density must be a number in \(0, 1\].*got 0"),
    (lambda u: lora.ties([u], density=1.2), "got 1.2"), (lambda u: lora.ties([u], density=0.01), "0.01 of the 20 entries"),
    (lambda u: lora.ties([u], majority_sign_method="sum"), "total, frequency, got 'sum'"),
    (lambda u: lora.ties([u], exact=False), "exact=False needs r"), (lambda u: lora.ties([u], r=0), "got 0"),
    (lambda u: lora.dare([u]), "pass rng"), (lambda u: lora.dare([u], rng=0, then="svd"), "got 'svd'"),
    (lambda u: lora.dare([u], rng=0, density=None), "got None"),
    (lambda u: lora.extract(u.dense(), u.dense(), exact=False, rng=0), "r=None"),
    (lambda u: lora.extract(u.dense(), u.dense(), r=2, exact=False), "rng=None"),
    (lambda u: lora.extract(u.dense(), u.dense(), energy=2), "got 2"),
    (lambda u: lora.combine_adapters([{"q": u}], missing="skip"), "got 'skip'"),
    (lambda u: lora.combine_adapters([{"q": u}], [1.0, 2.0]), "1 updates and 2 weights"),
    (lambda u: lora.combine_adapters([{}, {}]), "the 2 adapters have no layers"),
])
def test_settings_out_of_range(device, call, text):
    with pytest.raises(ConfigError, match=text):
        call(draw((4, 5, 2)))


def test_what_is_no_update(device):
    for call in (lora.cat, lora.ties, lambda u: lora.combine_adapters([{"q": v} for v in u])):
        with pytest.raises(DTypeError, match="expected LowRank, got .*ndarray"):
            call([place(np.ones((4, 5)))])


def test_weights_that_do_not_fit(device):
    W = place(np.ones((4, 5)))
    with pytest.raises(ShapeError, match=r"\(4, 5\) and \(5, 4\)"):
        lora.extract(W, W.T)
    with pytest.raises(ShapeError, match=r"\(4,\)"):
        lora.extract(place(np.ones(4)), place(np.ones(4)))
    with pytest.raises(DTypeError, match="float64 and float32"):
        lora.extract(W, place(np.ones((4, 5)), "float32"))
    with pytest.raises(DTypeError, match="int64"):
        lora.extract(place(np.ones((4, 5)), "int64"), place(np.ones((4, 5)), "int64"))
    with pytest.raises(StateError, match="NaN or inf"):
        lora.extract(place(np.full((4, 5), np.nan)), W)
    if device != "cpu":
        with pytest.raises(DeviceError, match="W_base on the cpu"):
            lora.extract(W, np.ones((4, 5)))


def test_nan_in_ties_is_an_error(device):
    broken = lora.LowRank(place(np.full((2, 5), np.nan)), place(np.ones((4, 2))))
    with pytest.raises(StateError, match="NaN or inf"):
        lora.dare([broken], rng=0)
    with pytest.raises(StateError, match="NaN or inf"):
        lora.ties([draw((4, 5, 2)), broken], density=0.5)


def test_inputs_are_unchanged(device):
    updates = [draw((6, 8, 3)), draw((6, 8, 2), seed=1)]
    before = [fetch(f).tobytes() for u in updates for f in (u.A, u.B)]
    for call in (lora.cat, lora.linear_sum, lora.svd, lora.ties, lambda u: lora.dare(u, rng=0)):
        call(updates)
    assert [fetch(f).tobytes() for u in updates for f in (u.A, u.B)] == before
    assert sparse.METHODS == ("total", "frequency")
