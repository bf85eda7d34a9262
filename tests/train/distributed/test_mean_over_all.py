"""The sums of an update, over ranks that are threads: any number of them, any shares, the gradients that some lack."""
import numpy as np
import pytest
import standin
from conftest import fetch, place
from hypothesis import example, given
from hypothesis import strategies as st
from ranks import together

from minilora import backend, optim
from minilora.errors import ShapeError, StateError
from minilora.tensor import Parameter
from minilora.train.distributed.comm import Serial
from minilora.train.distributed.gradients import Sums, mean_over_all, sums

SHAPES = [(3, 2), (), (5,), (0, 4), (1, 7)]


def optimizer_of(dtypes=("float32",), groups=1):
    """Parameters of the shapes, of each dtype in so many groups."""
    specs = []
    for dtype in dtypes:
        parameters = [Parameter(np.zeros(shape, dtype)) for shape in SHAPES]
        specs += [{"params": parameters[i::groups]} for i in range(groups)]
    return optim.AdamW(specs, lr=0.1)


def parameters_of(optimizer):
    return [p for group in optimizer.groups for p in group.parameters]


def after(optimizer):
    return [None if p.gathered is None else np.array(p.gathered) for p in parameters_of(optimizer)]


def drawn(size, count, seed, presence):
    """Whole numbers as gradients, [rank][parameter]; None where the presence says so."""
    rng = np.random.default_rng(seed)
    shapes = [p.shape for p in parameters_of(optimizer_of(groups=1))]
    return [[rng.integers(-50, 50, shapes[i % len(shapes)]) if presence[rank][i] else None for i in range(count)]
            for rank in range(size)]


def set_gradients(optimizer, gradients):
    for p, g in zip(parameters_of(optimizer), gradients):
        if g is not None:
            p.grad = np.asarray(g, p.dtype)


@st.composite
def cases(draw):
    size = draw(st.integers(1, 7))
    counts = draw(st.lists(st.integers(0, 9), min_size=size, max_size=size).filter(any))
    presence = draw(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=size, max_size=size))
    return size, counts, presence, draw(st.integers(0, 99))


@given(cases())
@example((4, [0, 3, 0, 1], [[False] * 5, [True, False] * 2 + [False], [False] * 5, [True] * 4 + [False]], 1))
def test_ranks_hold_the_mean_that_one_process_computes_to_the_bit(case):
    size, counts, presence, seed = case
    gradients = drawn(size, 5, seed, presence)
    losses = [float(7 * i + 1) for i in range(size)]

    def rank(comm):
        optimizer = optimizer_of()
        set_gradients(optimizer, gradients[comm.rank])
        made = mean_over_all(optimizer, comm, losses[comm.rank], counts[comm.rank], 2 * counts[comm.rank], comm.rank == 2)
        return made, after(optimizer)

    alone = optimizer_of()
    whole = [[g[i] for g in gradients if g[i] is not None] for i in range(5)]
    set_gradients(alone, [sum(each) if each else None for each in whole])
    expected = mean_over_all(alone, Serial(), sum(losses), sum(counts), 2 * sum(counts), size > 2)
    for made, arrays in together(size, rank):
        assert made == expected == Sums(sum(losses) / sum(counts), sum(counts), 2 * sum(counts), size > 2)
        for got, want, each in zip(arrays, after(alone), whole):
            assert (got is None) == (want is None) == (not each)
            if got is not None:
                np.testing.assert_array_equal(got, want)
                np.testing.assert_allclose(got, sum(each) / sum(counts), rtol=1e-6, err_msg="the mean over all targets")


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("dtypes", "messages"), [(("float32",), [("float32", 19)]), (("float64",), [("float64", 19)]),
                                                  (("float32", "float64"), [("float32", 19), ("float64", 19)]),
                                                  (("float16", "float32"), [("float32", 38)])])
@pytest.mark.parametrize("groups", [1, 2])
def test_groups_travel_in_one_message_a_dtype(size, dtypes, messages, groups):
    count = len(SHAPES) * len(dtypes)

    def rank(comm):
        optimizer = optimizer_of(dtypes, groups)
        for p in parameters_of(optimizer):
            p.grad = np.full(p.shape, 4.0 * (comm.rank + 1), p.dtype)
        mean_over_all(optimizer, comm, 1.0, 2, 2)
        return comm.messages, after(optimizer)

    for sent, arrays in together(size, rank):
        assert sent == [("sum", *each) for each in [("float64", 6 + count), *messages]] * (size > 1)
        for array in arrays:
            assert (array == 4.0 * sum(range(1, size + 1)) / (2 * size)).all()


def test_a_sum_outside_of_float16_has_a_mean_within():
    def rank(comm):
        p = Parameter(np.zeros(3, "float16"))
        optimizer = optim.SGD([p], lr=0.1)
        p.grad = np.full(3, 60000.0, "float16")
        mean_over_all(optimizer, comm, 1.0, 1, 1)
        return p.gathered

    assert all((g == 60000.0).all() for g in together(3, rank))


def test_no_target_anywhere_is_an_error_and_changes_nothing():
    def rank(comm):
        optimizer = optimizer_of()
        for p in parameters_of(optimizer):
            p.grad = np.ones(p.shape, p.dtype)
        with pytest.raises(StateError, match="no target.*0 / 0"):
            mean_over_all(optimizer, comm, 0.0, 0, 5)
        return after(optimizer)

    for size in (1, 3):
        assert all((array == 1.0).all() for arrays in together(size, rank) for array in arrays)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_loss_that_is_not_finite_is_known_to_all(bad):
    def rank(comm):
        optimizer = optimizer_of()
        parameters_of(optimizer)[0].grad = np.ones(SHAPES[0], "float32")
        return mean_over_all(optimizer, comm, bad if comm.rank == 1 else -bad if comm.rank == 2 else 1.0, 1, 1).loss

    assert not np.isfinite(together(4, rank)).any()


def test_stale_numbers_of_the_flat_array_are_not_added():
    def rank(comm):
        p, q = Parameter(np.zeros(2, "float32")), Parameter(np.zeros(2, "float32"))
        optimizer = optim.SGD([p, q], lr=0.1)
        q.grad = np.full(2, np.nan, "float32")
        optimizer.groups[0].gather()
        optimizer.zero_grad()
        p.grad = np.ones(2, "float32")
        if comm.rank == 0:
            q.grad = np.ones(2, "float32")
        mean_over_all(optimizer, comm, 1.0, 1, 1)
        return p.gathered.tolist() + q.gathered.tolist()

    assert together(2, rank) == [[1.0, 1.0, 0.5, 0.5]] * 2


def test_an_array_that_somebody_has_read_stays_theirs():
    p = Parameter(np.zeros(2, "float32"))
    optimizer = optim.SGD([p], lr=0.1)
    p.grad = mine = np.full(2, 6.0, "float32")
    mean_over_all(optimizer, Serial(), 1.0, 3, 3)
    assert mine.tolist() == [6.0, 6.0] and p.gathered.tolist() == [2.0, 2.0]


def test_a_replaced_array_is_refused_before_anything_is_sent():
    p = Parameter(np.zeros(2, "float32"))
    optimizer = optim.SGD([p], lr=0.1)
    p.data = np.zeros(2, "float32")
    with pytest.raises(StateError, match="replaced"):
        mean_over_all(optimizer, Serial(), 1.0, 1, 1)
    q = Parameter(np.zeros(2, "float32"))
    other = optim.SGD([q], lr=0.1)
    q.gathered = np.zeros(3, "float32")
    with pytest.raises(ShapeError):
        mean_over_all(other, Serial(), 1.0, 1, 1)


@pytest.mark.parametrize("change", [1e-7, -0.0, 3.0])
def test_trained_numbers_that_drift_apart_are_noticed_by_all(change):
    def rank(comm):
        p, q = Parameter(np.zeros(5, "float32")), Parameter(np.ones(4, "float64"))
        optimizer = optim.SGD([{"params": [p]}, {"params": [q]}], lr=0.1)
        p.grad, q.grad = np.ones(5, "float32"), np.ones(4)
        mean_over_all(optimizer, comm, 1.0, 1, 1)
        if comm.rank == 2:
            p.data[3] = change
        with pytest.raises(StateError, match="same trained numbers"):
            mean_over_all(optimizer, comm, 1.0, 1, 1)
        return p.gathered.tolist()

    assert together(4, rank) == [[4.0 / 4] * 5] * 4


def test_small_sums_are_exact_for_whole_numbers():
    for got in together(3, lambda comm: sums(comm, 2.0 ** 51, comm.rank, -1)):
        assert got == (3 * 2.0 ** 51, 3.0, -3.0)


def test_a_loss_on_a_device_is_not_waited_for():
    standin.register()
    with backend.use("standin"), standin.counting() as counts:
        p = Parameter(place([1.0, 2.0], "float32"))
        optimizer = optim.SGD([p], lr=0.1)
        p.grad = place([2.0, 4.0], "float32")
        before = counts.syncs
        loss = mean_over_all(optimizer, Serial(), place(6.0, "float32"), 2, 2).loss
        assert counts.syncs == before and float(loss) == 3.0
    backend.unregister_device("standin")


def test_gradients_of_several_groups_on_a_device_travel_together():
    standin.register()

    def rank(comm):
        p, q = (Parameter(standin.xp.asarray(np.zeros(3, "float32"))) for _ in range(2))
        optimizer = optim.SGD([{"params": [p]}, {"params": [q]}], lr=0.1)
        q.grad = standin.xp.asarray(np.full(3, comm.rank + 1.0, "float32"))
        mean_over_all(optimizer, comm, standin.xp.asarray(np.float32(1.0)), 1, 1)
        return p.gathered, fetch(q.gathered).tolist(), len(comm.messages)

    assert together(2, rank) == [(None, [1.5] * 3, 2)] * 2
    backend.unregister_device("standin")


def test_on_the_device(device):
    p, q = (Parameter(place([0.0] * 3, "float32")) for _ in range(2))
    optimizer = optim.AdamW([{"params": [p]}, {"params": [q], "lr": 0.5}], lr=0.1)
    p.grad = place([2.0, 4.0, 6.0], "float32")
    mean_over_all(optimizer, Serial(), 1.0, 2, 2)
    assert fetch(p.gathered).tolist() == [1.0, 2.0, 3.0] and q.gathered is None
