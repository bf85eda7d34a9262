"""Principal angles against planes that were turned by known angles."""
import numpy as np
import pytest
from conftest import place
from hypothesis import given
from hypothesis import strategies as st

from minilora import lora
from minilora.errors import ShapeError, StateError


@given(st.lists(st.sampled_from([0.0, 1e-9, 1e-4, 0.3, np.pi / 4, 1.2, np.pi / 2 - 1e-9, np.pi / 2]), min_size=1, max_size=4),
       st.integers(0, 2 ** 32 - 1), st.sampled_from(["A", "V"]))
def test_angles_that_were_put_in_come_out(angles, seed, of):
    rng = np.random.default_rng(seed)
    k = len(angles)
    Q = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    first, second = Q[:, :k], Q[:, :k] * np.cos(angles) + Q[:, k:2 * k] * np.sin(angles)
    one = lora.LowRank(place(rng.standard_normal((k, k)) @ first.T), place(np.linalg.qr(rng.standard_normal((7, k)))[0]))
    two = lora.LowRank(place((second * rng.uniform(1, 2, k)).T), place(np.linalg.qr(rng.standard_normal((7, k)))[0]), 0.5)
    np.testing.assert_allclose(lora.principal_angles(one, two, of), np.sort(angles), atol=1e-11)
    np.testing.assert_allclose(lora.principal_angles(two, one, of), np.sort(angles), atol=1e-11)


def test_of_different_ranks_there_are_as_many_as_the_smaller_has():
    eye = np.eye(5)
    one, two = (lora.LowRank(place(eye[:r]), place(np.ones((3, r)) + np.eye(3, r))) for r in (3, 1))
    assert lora.principal_angles(one, two).shape == (1,) and lora.principal_angles(one, two)[0] == pytest.approx(0, abs=1e-12)


def test_what_has_no_angle():
    one = lora.LowRank(place(np.eye(3)[:1]), place(np.ones((2, 1))))
    with pytest.raises(StateError, match="no directions"):
        lora.principal_angles(one, lora.LowRank(place(np.eye(3)[:1]), place(np.zeros((2, 1)))))
    with pytest.raises(ShapeError, match="3 and 4 dimensions"):
        lora.principal_angles(one, lora.LowRank(place(np.eye(4)[:1]), place(np.ones((2, 1)))))
