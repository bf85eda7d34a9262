"""The counter-based generator and the dropout that rests on it: known answers, equal bits, honest odds."""
import math

import numpy as np
import pytest
from cases import philox_block, philox_word
from conftest import fetch, place
from hypothesis import given
from hypothesis import strategies as st

from minilora import Parameter, Tensor, backend, errors, ops
from minilora.ops.philox import philox4x32, random_bits

WORD, LONG = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)

KNOWN = [  # counter, key, answer: philox4x32-10 in the file kat_vectors of Random123
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer, device):
    block = philox4x32(*(place([word], "uint64") for word in words(counter)), *words(key))
    assert [int(fetch(word)[0]) for word in block] == words(answer)
    assert philox_block(words(counter), words(key)) == words(answer)  # the oracle of the other tests


@given(counter=st.tuples(WORD, WORD, WORD, WORD), key=st.tuples(WORD, WORD))
def test_equals_the_algorithm_in_whole_numbers(device, counter, key):
    block = philox4x32(*(place([word, 0], "uint64") for word in counter), *key)
    assert [int(fetch(word)[0]) for word in block] == philox_block(counter, key)


@given(n=st.integers(0, 23), seed=LONG, step=LONG)
def test_words_are_numbered_block_by_block(device, n, seed, step):
    bits = random_bits(backend.current_device().xp, n, seed, step)
    assert bits.dtype == "uint64" and bits.shape == (n,)
    assert fetch(bits).tolist() == [philox_word(seed, step, i) for i in range(n)]


def test_fewer_words_are_a_beginning_of_more():
    long = random_bits(np, 1003, 5, 7)
    for n in (1, 4, 5, 1000):
        np.testing.assert_array_equal(random_bits(np, n, 5, 7), long[:n])


def test_each_bit_is_set_half_of_the_time():
    n = 40_000
    bits = random_bits(np, n, 123, 4)
    assert bits.max() < 2**32
    for i in range(32):
        share = float((bits >> i & 1).mean())
        assert abs(share - 0.5) < 6 * 0.5 / math.sqrt(n)


# -- dropout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_odds_and_scale(p, device):
    n = 40_000
    y = fetch(ops.dropout(Tensor(place(np.ones((200, n // 200)))), p, seed=11, step=3))
    kept = y != 0
    np.testing.assert_allclose(y[kept], 1 / (1 - p), rtol=1e-15)
    assert abs(kept.mean() - (1 - p)) < 6 * math.sqrt(p * (1 - p) / n)
    assert abs(y.mean() - 1) < 6 * math.sqrt(p / (1 - p) / n)


def test_p_0_is_the_identity_and_a_fresh_array(device):
    x = Tensor(place([1.0, -0.0, 3.0]))
    y = ops.dropout(x, 0.0, seed=1)
    assert fetch(y).tobytes() == fetch(x).tobytes() and y.data is not x.data


def test_seed_and_step_decide_the_mask(device):
    x = Tensor(place(np.ones(1000)))
    masks = [fetch(ops.dropout(x, 0.5, seed, step)).tobytes()
             for seed, step in [(1, 0), (1, 1), (2, 0), (1, 2**32), (2**32 + 1, 0), (1, 0)]]
    assert len(set(masks)) == 5 and masks[0] == masks[5]


@pytest.mark.parametrize("device", ["standin"], indirect=True)
def test_the_same_bits_on_both_devices(device):
    host = np.random.default_rng(0).standard_normal((33, 7)).astype("float32")
    on_device = fetch(ops.dropout(Tensor(place(host)), 0.3, seed=2**50, step=9))
    with backend.use("cpu"):
        np.testing.assert_array_equal(fetch(ops.dropout(Tensor(host), 0.3, seed=2**50, step=9)), on_device, strict=True)


def test_backward_draws_the_same_mask(device):
    p = Parameter(place(np.ones((50, 20))))
    y = ops.dropout(p, 0.4, seed=3, step=8)
    y.backward(place(np.ones((50, 20))))
    np.testing.assert_array_equal(fetch(p.grad), fetch(y))


def test_the_mask_depends_on_the_position_only(device):
    """Not on the dtype, the values or the memory layout."""
    host = np.random.default_rng(0).uniform(1, 2, (6, 10))
    expected = fetch(ops.dropout(Tensor(place(host)), 0.5, seed=4)) != 0
    for array in (place(host, "float16"), place(host.T.copy()).T, place(-host)):
        np.testing.assert_array_equal(fetch(ops.dropout(Tensor(array), 0.5, seed=4)) != 0, expected)


@pytest.mark.parametrize("p", [1, 1.0, -0.1, 1.5, float("nan"), float("inf"), "0.5", None, [0.5]], ids=str)
def test_p_out_of_range(p):
    with pytest.raises(errors.ConfigError, match="dropout"):
        ops.dropout(Tensor(np.ones(3)), p, seed=1)


@pytest.mark.parametrize("numbers", [(-1, 0), (0, -1), (2**64, 0), (0, 2**64), (0.5, 0), (0, "1")], ids=str)
def test_seed_and_step_out_of_range(numbers):
    with pytest.raises(errors.ConfigError):
        ops.dropout(Tensor(np.ones(3)), 0.5, *numbers)
