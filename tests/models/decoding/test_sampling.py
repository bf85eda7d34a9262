"""Choosing the next token: each definition by hand, ties and ends included, and the frequencies of draws."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minilora.errors import ConfigError, StateError
from minilora.models.decoding.sampling import Sampler, draw, keep_top_k, keep_top_p, penalise, probabilities

LOGITS = arrays("float64", st.tuples(st.integers(1, 3), st.integers(1, 6)),
                elements=st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0]))


def sampler(rows=1, V=4, temperature=0.0, top_k=None, top_p=None, repetition_penalty=None, seed=0):
    return Sampler(rows, V, temperature, top_k, top_p, repetition_penalty, seed)


def test_the_penalty_by_hand():
    z = np.array([[2.0, -2.0, 0.0, 4.0], [2.0, -2.0, 0.0, 4.0]])
    seen = np.array([[True, True, True, False], [False] * 4])
    np.testing.assert_array_equal(penalise(z, seen, 2.0), [[1.0, -4.0, 0.0, 4.0], z[1]])
    np.testing.assert_array_equal(penalise(z, seen, 0.5), [[4.0, -1.0, 0.0, 4.0], z[1]])


def test_top_k_keeps_what_is_equal_to_the_kth():
    z = np.array([[1.0, 3.0, 2.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    inf = np.inf
    np.testing.assert_array_equal(keep_top_k(z, 1), [[-inf, 3.0, -inf, -inf], z[1]])
    np.testing.assert_array_equal(keep_top_k(z, 2), [[-inf, 3.0, 2.0, 2.0], z[1]])
    for k in (4, 9):
        np.testing.assert_array_equal(keep_top_k(z, k), z)


def test_top_p_by_hand():
    z = np.log([[0.1, 0.4, 0.3, 0.2]])
    for p, kept in ((1.0, [0, 1, 2, 3]), (0.95, [0, 1, 2, 3]), (0.85, [1, 2, 3]), (0.69, [1, 2]), (0.35, [1]), (1e-9, [1])):
        assert np.flatnonzero(np.isfinite(keep_top_p(z, p)[0])).tolist() == kept


@given(z=LOGITS, k=st.integers(1, 7), p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 1.0]))
def test_what_is_kept_is_the_top(z, k, p):
    for kept in (keep_top_k(z, k), keep_top_p(z, p)):
        for before, after in zip(z, kept):
            alive = np.isfinite(after)
            assert (after[alive] == before[alive]).all() and before.max() in after
            assert before[alive].min() >= before[~alive].max(initial=-np.inf)
    assert (np.isfinite(keep_top_k(z, k)).sum(axis=1) >= min(k, z.shape[1])).all()
    total = np.where(np.isfinite(keep_top_p(z, p)), probabilities(z), 0.0).sum(axis=1)
    assert (total >= p - 1e-12).all()


def test_the_order_of_the_steps():
    """First the penalty, then the temperature, then top-k, then top-p of what that left."""
    z = np.array([[2.0, 1.9, 1.0, -1.0]])
    choose = sampler(temperature=1.0, top_k=2, top_p=0.55, repetition_penalty=4.0)
    choose.read(np.array([[0]]))  # 0.5, 1.9, 1.0: of the two largest, the larger has 0.71
    assert {int(choose(z)[0]) for _ in range(50)} == {1}
    warm = sampler(temperature=20.0, top_k=2, top_p=0.55, repetition_penalty=4.0)
    warm.read(np.array([[0]]))  # now 0.51
    assert {int(warm(z)[0]) for _ in range(50)} == {1, 2}


def test_seen_tokens_are_those_that_are_no_padding():
    choose = sampler(2, 4, repetition_penalty=100.0)
    choose.read(np.array([[0, 1], [2, 3]]), np.array([[False, True], [True, True]]))
    assert choose.seen.tolist() == [[False, True, False, False], [False, False, True, True]]
    choose.read(np.array([[2], [2]]))
    assert choose.seen.tolist() == [[False, True, True, False], [False, False, True, True]]


def test_draws_have_their_frequencies():
    P = np.array([0.05, 0.0, 0.6, 0.35])
    with np.errstate(divide="ignore"):
        z = np.log(P)[None]
    choose = sampler(temperature=1.0)
    counts = np.bincount([int(choose(z)[0]) for _ in range(4000)], minlength=4)
    assert counts[1] == 0
    assert (np.abs(counts / 4000 - P) < 5 * np.sqrt(P * (1 - P) / 4000) + 1e-9).all()


class Fixed:
    """A generator that gives one number."""

    def __init__(self, u):
        self.u = u

    def random(self):
        return self.u


def test_the_ends_of_a_draw():
    """Never a token of probability 0, also where rounding puts the number at the very end."""
    P = np.array([[0.0, 0.25, 0.0, 0.75, 0.0]])
    for u, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (1.0 - 2**-53, 3), (1.0, 3)):
        assert draw(P, [Fixed(u)]).tolist() == [token]


def test_greedy_takes_the_first_of_equals_and_leaves_the_logits():
    z = np.array([[1.0, 3.0, 3.0], [0.0, 0.0, -np.inf]])
    before = z.copy()
    assert sampler(2, 3)(z).tolist() == [1, 0]
    assert sampler(2, 3, temperature=1.0, top_k=1, top_p=0.5, repetition_penalty=2.0)(z).shape == (2,)
    np.testing.assert_array_equal(z, before)


def test_rows_draw_apart():
    z = np.zeros((3, 50))
    three = [sampler(3, 50, temperature=1.0, seed=8)(z).tolist() for _ in range(2)]
    assert three[0] == three[1] and len(set(three[0])) > 1
    assert sampler(1, 50, temperature=1.0, seed=8)(z[:1]).tolist() == three[0][:1]


@pytest.mark.parametrize("row", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf]])
def test_logits_that_choose_nothing(row):
    with pytest.raises(StateError, match=r"the largest logit of row 1 is -?(nan|inf) \(and 1 more rows"):
        sampler(3, 2)(np.array([[0.0, 1.0], row, row]))


def test_numbers_of_numpy_are_settings():
    choose = sampler(temperature=np.float32(1.0), top_k=np.int64(2), top_p=np.float64(0.5), repetition_penalty=np.float32(2.0))
    assert type(choose.top_k) is int and type(choose.temperature) is float
    with pytest.raises(ConfigError):
        sampler(temperature="warm")
