"""Frequencies for long texts: what each kind leaves, and where it goes. The numbers themselves: tests/parity."""
import math

import numpy as np
import pytest

from minilora import ops
from minilora.errors import ConfigError

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
PLAIN = ops.rotary_frequencies(64, 10000.0)


def scaled(scaling, **more):
    frequencies, factor = ops.scaled_rotary_frequencies(64, 10000.0, scaling, **{"max_positions": 4096, **more})
    return np.array(frequencies) / PLAIN, factor


def test_nothing_is_nothing():
    for scaling in (None, {}, {"rope_type": "default"}, {"type": "default", "factor": None}):
        assert ops.scaled_rotary_frequencies(64, 10000.0, scaling) == (PLAIN, 1.0)
        assert ops.check_rotary_scaling(scaling) is None


def test_linear_slows_all_alike():
    ratio, factor = scaled({"rope_type": "linear", "factor": 4})
    np.testing.assert_allclose(ratio, 0.25, rtol=1e-15)
    assert factor == 1.0


def test_dynamic_depends_on_the_length_and_never_below_the_first():
    for length in (1, 4096):
        np.testing.assert_allclose(scaled({"type": "dynamic", "factor": 4.0}, length=length)[0], 1.0, rtol=1e-14)
    ratio, _ = scaled({"type": "dynamic", "factor": 4.0}, length=8192)
    assert ratio[0] == 1.0 and (np.diff(ratio) < 0).all()
    np.testing.assert_allclose(ratio[-1], 1 / 5, rtol=1e-12)  # the slowest by s N / L - s + 1 = 5


@pytest.mark.parametrize("scaling", [
    dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=1024),
    {**LLAMA3, "original_max_position_embeddings": 1024},
], ids=["yarn", "llama3"])
def test_ramps_leave_fast_turns_and_slow_the_others(scaling):
    ratio, _ = scaled(scaling)
    turns = np.array(PLAIN) * 1024 / (2 * math.pi)
    assert (np.diff(ratio) <= 1e-15).all()
    np.testing.assert_allclose(ratio[turns > 40], 1.0)
    np.testing.assert_allclose(ratio[turns < 0.5], 1 / 8)
    assert ((ratio > 0.13) & (ratio < 0.99)).any()


def test_the_factor_of_yarn():
    base = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=1024)
    usual = 0.1 * math.log(8.0) + 1.0
    assert scaled(base)[1] == usual == scaled({**base, "mscale": 3.0})[1]
    assert scaled({**base, "attention_factor": 0.5})[1] == 0.5
    assert scaled({**base, "mscale": 1.0, "mscale_all_dim": 1.0})[1] == 1.0
    assert scaled({**base, "factor": 1.0})[1] == 1.0
    short = {"rope_type": "yarn", "original_max_position_embeddings": 512}
    np.testing.assert_array_equal(scaled(short)[0], scaled({**short, "factor": 8.0})[0])


@pytest.mark.parametrize("scaling", [{**LLAMA3}, {"type": "dynamic", "factor": 2.0}, {"type": "yarn", "factor": 2.0}], ids=str)
def test_a_length_is_needed(scaling):
    with pytest.raises(ConfigError, match="max_positions"):
        ops.scaled_rotary_frequencies(64, 10000.0, scaling)


def test_numbers_of_every_kind_are_read():
    read = ops.check_rotary_scaling({"type": "yarn", "factor": np.float32(2), "original_max_position_embeddings": np.int64(64),
                                     "truncate": False, "beta_fast": None})
    assert read == {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "truncate": False}
    assert type(read["factor"]) is float and type(read["original_max_position_embeddings"]) is int
    for name, value in (("truncate", 1), ("factor", True), ("factor", "2"), ("original_max_position_embeddings", 1.5)):
        with pytest.raises(ConfigError, match=name):
            ops.check_rotary_scaling({"type": "yarn", name: value})
