"""Embedding: which rows, the sums of their gradients, and what is refused."""
import numpy as np
import pytest
import standin
from conftest import fetch, place
from hypothesis import given
from hypothesis import strategies as st

import minilora
from minilora import Parameter, Tensor, backend, engine, ops
from minilora.errors import ConfigError, DTypeError, OutOfRangeError, ShapeError, StateError
from minilora.ops.embedding import plan_sums
from minilora.ops.indices import first_of_all

IDS = st.lists(st.integers(0, 6), max_size=40).map(lambda ids: np.array(ids, "int64"))


def gradient(ids, dy, V=7, padding_idx=None):
    W = Parameter(place(np.zeros((V, dy.shape[-1]), dy.dtype)))
    ops.embedding(ids, W, padding_idx).backward(place(dy))
    return fetch(W.grad)


@given(ids=IDS, seed=st.integers(0, 99), padding=st.sampled_from([None, 0, 3]))
def test_integers_sum_as_add_at_does(device, ids, seed, padding):
    dy = np.random.default_rng(seed).integers(-9, 10, (ids.size, 2)).astype("float32")
    expected = np.zeros((7, 2), "float32")
    np.add.at(expected, ids, dy)
    if padding is not None:
        expected[padding] = 0
    np.testing.assert_array_equal(gradient(ids, dy, padding_idx=padding), expected)


@given(ids=IDS)
def test_plan_adds_every_row_once_to_its_segment(ids):
    """Played through with sets of rows in place of numbers."""
    plan = plan_sums(ids)
    sums = [{int(row)} for row in plan.order]
    for k, places in enumerate(plan.pairs):
        touched = [*places, *(places + 2 ** k)]
        assert len(set(touched)) == len(touched)
        for p in places:
            assert not sums[p] & sums[p + 2 ** k]
            sums[p] |= sums[p + 2 ** k]
    assert plan.ids.tolist() == sorted(set(ids.tolist()))
    for start, i in zip(plan.starts, plan.ids):
        places = np.flatnonzero(ids == i)
        assert sums[start] == set(places.tolist())
        assert plan.order[start:start + places.size].tolist() == places.tolist()  # else the bits depend on the sort


def test_rows_of_one_id_keep_their_order():
    ids = np.random.default_rng(0).integers(0, 3, 5000)
    plan = plan_sums(ids, without=1)
    assert plan.order.tolist() == [*np.flatnonzero(ids == 0), *np.flatnonzero(ids == 2)]


def test_rounds_grow_with_the_logarithm():
    assert len(plan_sums(np.arange(1000)).pairs) == 0
    for n, rounds in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (1024, 10), (1025, 11)]:
        plan = plan_sums(np.zeros(n, "int64"))
        assert len(plan.pairs) == rounds
        assert sum(p.size for p in plan.pairs) == n - 1


def test_the_same_bits_every_time_and_on_every_device(device):
    rng = np.random.default_rng(0)
    ids, dy = rng.integers(0, 5, 3000), rng.standard_normal((3000, 4)).astype("float32")
    once = gradient(ids, dy)
    assert once.tobytes() == gradient(ids, dy).tobytes()
    with minilora.use("cpu"):
        assert once.tobytes() == gradient(ids, dy).tobytes()
    exact = gradient(ids, dy.astype("float64"))
    eps = np.finfo("float32").eps
    bound = np.zeros((7, 4))
    np.add.at(bound, ids, abs(dy))
    assert (abs(once - exact) <= 10 * eps * bound).all()  # the depth of the tree, log2 600, not the number of rows


def test_gradient_goes_into_the_optimizers_array(device):
    W = Parameter(place(np.ones((4, 2))))
    W.room = place(np.full((4, 2), 9.0))
    ops.embedding([1, 1, 3], W).sum().backward()
    assert W.gathered is W.room
    np.testing.assert_array_equal(fetch(W.grad), [[0, 0], [2, 2], [0, 0], [1, 1]])


def test_frozen_table_makes_no_plan_and_no_node(device):
    W = Parameter(place(np.ones((4, 2))), trainable=False)
    assert ops.embedding([0, 1], W).node is None


def test_ids_in_every_form(device):
    W = Parameter(place(np.arange(8.0).reshape(4, 2)))
    expected = [[6.0, 7.0], [0.0, 1.0]]
    for ids in ([3, 0], (3, 0), np.array([3, 0], "uint16"), place([3, 0]), minilora.tensor([3, 0]), Tensor(np.array([3, 0]))):
        y = ops.embedding(ids, W)
        np.testing.assert_array_equal(fetch(y), expected)
        assert y.device.name == device
        W.grad = None
        y.sum().backward()
        np.testing.assert_array_equal(fetch(W.grad), [[1, 1], [0, 0], [0, 0], [1, 1]])


@pytest.mark.parametrize("device", ["standin"], indirect=True)
def test_one_copy_to_the_device_for_ids_and_one_for_the_plan(device):
    W = Parameter(place(np.ones((50, 4))))
    ids = np.random.default_rng(0).integers(0, 50, 400)
    with standin.counting() as counts:
        y = ops.embedding(ids, W)
    assert (counts.h2d, counts.d2h, counts.syncs) == (2, 0, 0)
    dy = place(np.ones(y.shape))
    with standin.counting() as counts:
        y.backward(dy)
    assert (counts.h2d, counts.d2h, counts.syncs) == (0, 0, 0)
    W.trainable = False
    with standin.counting() as counts:
        ops.embedding(ids, W)
    assert (counts.h2d, counts.syncs, counts.launches) == (1, 0, 1)


def test_what_is_refused(device):
    W = Parameter(place(np.ones((4, 2))))
    for ids, value, position in [([0, 4], "4", "position 1"),
                                 (np.array([[0, 1], [-1, 9]]), "-1", r"position \(1, 0\) .*1 more"),
                                 (7, "7", "id 7 is"), (np.array([2 ** 63], "uint64"), "9223372036854775808", "position 0")]:
        with pytest.raises(OutOfRangeError, match=position) as caught:
            ops.embedding(ids, W)
        assert value in str(caught.value) and "0 to 3" in str(caught.value)
        assert isinstance(caught.value, IndexError)
    for ids in ([0.0, 1.0], [True], ["a"], "text", None, np.array([1.5]), [[1], [1, 2]], object()):
        with pytest.raises(DTypeError):
            ops.embedding(ids, W)
    with pytest.raises(ShapeError):
        ops.embedding([0], place(np.ones(3)))
    for padding_idx in (-1, 4, True, 1.0):
        with pytest.raises(ConfigError, match="padding_idx"):
            ops.embedding([0], W, padding_idx)
    with pytest.raises(DTypeError):
        ops.embedding([0], place([[1, 2]]))
    assert W.grad is None and engine.is_recording() and backend.current_device().name == device


# -- ids that count up --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[2, 3, 4], [0], [6], [[0, 1], [2, 3]], [[[5]]], list(range(7))])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_ids_that_count_up_are_a_part_of_the_table(ids, dtype, device):
    """The numbers and the gradients are those of any ids, and the caller's own; where there is room, they are written there."""
    table, ids = np.random.default_rng(0).standard_normal((7, 3)).astype(dtype), np.array(ids)
    W = Parameter(place(table))
    W.room = place(np.full(table.shape, np.nan), dtype)
    y = ops.embedding(ids, W)
    np.testing.assert_array_equal(fetch(y), table[ids])
    W.data[...] = 0.0
    np.testing.assert_array_equal(fetch(y), table[ids])
    dy = np.random.default_rng(1).standard_normal(y.shape).astype(dtype)
    y.backward(place(dy))
    expected = np.zeros_like(table)
    expected[ids] = dy
    np.testing.assert_array_equal(fetch(W.grad), expected)


@pytest.mark.parametrize("ids", [[0, 2, 1, 3], [1, 1, 3], [3, 2, 1], [4, 3, 6], [], [0, 0, 2]])
def test_other_ids_do_not_count_up(ids):
    assert first_of_all(np.array(ids, "int64")) is None


def test_what_is_copied_to_a_card():
    W, table = (Parameter(np.random.default_rng(0).standard_normal((9, 2)), trainable=n) for n in (True, False))
    with standin.card() as card:
        for weight, ids, copies in ((W, np.arange(4), 0), (table, np.arange(4), 0), (W, np.array([3, 1, 3]), 1),
                                    (table, np.array([3, 1, 3]), 1), (W, place([0, 1]), 0)):
            there = Parameter(place(weight.data), trainable=weight.trainable)
            with standin.counting() as counts:
                ops.embedding(ids, there).sum().backward() if there.trainable else ops.embedding(ids, there)
            assert counts.h2d == copies and card.name == "card", ids


def test_a_recorded_step_sends_no_ids_of_the_host():
    """Also none that count up: they may be others at the next call."""
    with standin.card():
        W = Parameter(place(np.ones((4, 2), "float32")))
        for ids in ([1, 3], [1, 2]):
            with pytest.raises(StateError, match="to_(device|host)"):
                minilora.record(lambda x: ops.embedding(np.array(ids), W).sum().backward())(place([1.0], "float32"))
