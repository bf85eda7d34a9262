"""A batch in parts: the loss and gradients of the whole, whatever happens in the parts, and nothing left behind."""

import threading
import time
import weakref
from collections import namedtuple
from contextvars import ContextVar

import numpy as np
import pytest

from minilora import Parameter, Tensor, blas, lora, nn, no_grad, ops, optim, parallel
from minilora.errors import ConfigError, DTypeError, GraphError, ShapeError, StateError

pytestmark = pytest.mark.skipif(not blas.can_hold(), reason="needs an OpenBLAS whose threads can be set")
CLASSES = 5


class Model(nn.Module):
    """Four layers, one of them with an adapter, on rows of 3 tokens."""

    def __init__(self, p=0.0):
        rng = np.random.default_rng(0)
        self.inner = lora.Linear(4, 6, r=2, dtype="float64", rng=rng)
        self.drop = nn.Dropout(p, rng=rng)
        self.norm = nn.LayerNorm(6, dtype="float64")
        self.outer = nn.Linear(6, CLASSES, dtype="float64", rng=rng)
        self.inner.lora_B.data[...] = rng.standard_normal((6, 2))

    def forward(self, x):
        return self.outer(self.norm(ops.gelu(self.drop(self.inner(x)), "none")))


def make(rows, seed=0, counted=0.7):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, (rows, 3))
    labels[rng.random((rows, 3)) > counted] = -100
    labels[:, 0] = 1
    return {"x": rng.standard_normal((rows, 3, 4)), "labels": labels}


def tokens(part):
    return (part["labels"] != -100).sum()


def loss_of(model):
    return lambda part: ops.cross_entropy(model(part["x"]), part["labels"])


def gradients(model):
    return {name: p.grad.copy() for name, p in model.named_parameters() if p.grad is not None}


def whole(model, batch):
    for p in model.parameters():
        p.grad = None
    loss = loss_of(model)(batch)
    loss.backward()
    return loss.data, gradients(model)


def split(model, batch, threads=2, weight=tokens):
    for p in model.parameters():
        p.grad = None
    loss = parallel.backward(loss_of(model), batch, threads, weight)
    return loss.data, gradients(model)


def assert_same(one, other):
    np.testing.assert_allclose(one[0], other[0], rtol=1e-12)
    assert one[1].keys() == other[1].keys() and one[1]
    for name, dx in one[1].items():
        np.testing.assert_allclose(dx, other[1][name], rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.parametrize(("rows", "threads"), [(8, 2), (7, 2), (7, 3), (2, 5), (1, 2), (5, 1), (3, 3)])
def test_parts_give_what_the_whole_batch_gives(rows, threads):
    model, batch = Model(), make(rows)
    assert_same(split(model, batch, threads), whole(model, batch))


def test_rows_weigh_alike_unless_told_otherwise():
    model, batch = Model(), make(7, counted=1.0)
    assert_same(split(model, batch, weight=None), whole(model, batch))
    uneven = make(7, counted=0.2)
    with pytest.raises(AssertionError):  # a mean over tokens is no mean over rows
        assert_same(split(model, uneven, weight=None), whole(model, uneven))


def test_a_part_without_a_counted_token_is_left_out():
    model, batch = Model(), make(6)
    batch["labels"][:2] = -100
    assert_same(split(model, batch, 3), whole(model, batch))
    batch["labels"][2:] = -100
    with pytest.raises(ShapeError, match="nothing to average"):  # as the whole batch would
        split(model, batch, 3)
    assert gradients(model) == {}


@pytest.mark.parametrize("count", [-1, float("nan"), float("inf"), "3", None])
def test_weights_are_numbers(count):
    with pytest.raises(ConfigError, match="part 1 of 2 of the batch, rows 0 to 2"):
        split(Model(), make(6), weight=lambda part: count)


def test_weights_may_be_arrays_and_tensors():
    model, batch = Model(), make(6)
    for kind in (np.float32, np.asarray, lambda n: Tensor(np.asarray(float(n)))):
        assert_same(split(model, batch, weight=lambda part: kind(tokens(part))), whole(model, batch))


def test_the_same_bits_in_every_run():
    model, batch = Model(0.3), make(9)

    def run():
        model.drop.step = 0
        return split(model, batch, 3)

    first = run()
    for _ in range(20):
        again = run()
        assert again[0] == first[0]
        for name, dx in first[1].items():
            np.testing.assert_array_equal(again[1][name], dx)


def test_gradients_are_added_and_optimizers_step_alike():
    one, other, batch = Model(), Model(), make(8)
    optimizers = [optim.Adam(model.parameters(), lr=0.1) for model in (one, other)]
    for step in range(3):
        for _ in range(2):  # two backward passes a step
            loss_of(one)(batch).backward()
            parallel.backward(loss_of(other), batch, 2, tokens)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(one.parameters(), other.parameters()):
        np.testing.assert_allclose(a.data, b.data, rtol=1e-9, atol=1e-12)


# -- batches ----------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "x names")


def test_trees_are_cut_along_the_first_axis():
    seen = {}
    w = Parameter(np.ones(3))

    def loss(part):
        first = int(part["pair"].x[0, 0])
        seen[first] = part
        return (w * part["pair"].x).mean()

    x = np.arange(15.0).reshape(5, 3)
    parallel.backward(loss, {"pair": Pair(x, ["a", "b", "c", "d", "e"]), "t": Tensor(x), "n": 3, "none": None, "s": "text",
                             "scalar": np.array(2.0), "deep": ((x,),)}, threads=2)
    assert sorted(seen) == [0, 6]
    part = seen[6]
    assert isinstance(part["pair"], Pair) and part["pair"].names == ["c", "d", "e"]
    assert np.shares_memory(part["deep"][0][0], x) and part["t"].shape == (3, 3) and part["scalar"].shape == ()
    assert (part["n"], part["none"], part["s"]) == (3, None, "text")
    np.testing.assert_allclose(w.grad, x.mean(axis=0) / 3)


@pytest.mark.parametrize(("batch", "error", "text"), [
    ((np.ones((3, 2)), np.ones((4, 2))), ShapeError, r"batch\[0\] with 3 rows, batch\[1\] with 4 rows"),
    ({"n": 3}, ConfigError, "no array"), ((), ConfigError, "no array"),
    ({"set": {1, 2}, "x": np.ones(3)}, DTypeError, r"batch\['set'\] is of type set"),
    (Parameter(np.ones(3)), GraphError, r"pass batch.detach\(\)"),
], ids=["lengths", "numbers", "nothing", "a set", "a graph"])
def test_what_cannot_be_cut_is_refused(batch, error, text):
    with pytest.raises(error, match=text):
        parallel.backward(lambda part: pytest.fail("not called"), batch, 2)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, None])
def test_threads_are_counted(threads):
    with pytest.raises(ConfigError, match="threads"):
        parallel.backward(loss_of(Model()), make(4), threads)


# -- contexts ---------------------------------------------------------------------------------------------------------


def test_parts_run_in_threads_of_their_own_with_one_thread_of_blas():
    found, names = blas._calls().get(), set()
    model = Model()

    def loss(part):
        names.add(threading.current_thread().name)
        assert blas._calls().get() == 1
        return loss_of(model)(part)

    parallel.backward(loss, make(6), 3)
    assert len(names) == 3 and blas._calls().get() == found


def test_parts_see_the_contexts_of_the_caller_and_leave_them():
    setting, seen = ContextVar("setting", default=0), []
    model = Model()

    def loss(part):
        seen.append(setting.get())
        setting.set(99)
        with no_grad():
            assert model(part["x"]).node is None
        return loss_of(model)(part)

    setting.set(7)
    loss_and_gradients = parallel.backward(loss, make(6), 3, tokens).data, gradients(model)
    assert seen == [7, 7, 7] and setting.get() == 7
    assert_same(loss_and_gradients, whole(model, make(6)))


def test_without_recording_there_is_nothing_to_do():
    with no_grad(), pytest.raises(GraphError, match="nothing to do"):
        split(Model(), make(6))


def test_a_part_does_not_split_again():
    model, batch = Model(), make(6)
    with pytest.raises(StateError, match="one thread"):
        parallel.backward(lambda part: parallel.backward(loss_of(model), part, 2), batch, 2)
    assert gradients(model) == {}
    assert_same(split(model, batch), whole(model, batch))


def test_two_callers_at_once():
    found = blas._calls().get()
    models, results = [Model() for _ in range(3)], {}

    def work(k):
        for _ in range(5):
            results[k] = split(models[k], make(6, seed=k))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, model in enumerate(models):
        assert_same(results[k], whole(model, make(6, seed=k)))
    assert blas._calls().get() == found


def test_names_for_the_whole_batch_do_not_fit_its_parts():
    model = nn.Sequential(lora.Linear(4, CLASSES, r=2, dtype="float64", rng=0))
    batch = make(6)
    with lora.mixed(model, ["default"] * 6), pytest.raises(ShapeError, match="6 names"):
        split(model, batch)


# -- errors -----------------------------------------------------------------------------------------------------------


class Planted(Exception):
    pass


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("kind", [Planted, KeyboardInterrupt])
@pytest.mark.parametrize("late", [False, True], ids=["forward", "backward"])
def test_an_error_in_a_part_names_it_and_changes_nothing(which, kind, late):
    model, batch, found = Model(0.5), make(6), blas._calls().get()
    before = whole(model, batch)
    step = model.drop.step

    class Failing(ops.Add):
        def backward(self, dy):
            raise kind

    def loss(part):
        mine = part["x"][0, 0, 0] == batch["x"][2 * which, 0, 0]
        if mine and not late:
            raise kind
        y = loss_of(model)(part)
        if not mine:
            return y
        from minilora.engine import apply
        return apply(Failing, y, Parameter(np.zeros(())))

    with pytest.raises(kind) as caught:
        parallel.backward(loss, batch, 3)
    assert caught.value.__notes__[-1:] == [f"in part {which + 1} of 3 of the batch, rows {2 * which} to {2 * which + 1}"]
    assert late and kind is Planted or len(caught.value.__notes__) == 1  # the walk names the operation
    assert blas._calls().get() == found and model.drop.step == step
    for name, dx in gradients(model).items():
        np.testing.assert_array_equal(dx, before[1][name])


def test_an_interrupt_while_waiting_waits_for_the_parts(monkeypatch):
    model, batch, found, done = Model(), make(6), blas._calls().get(), []
    join, times = threading.Thread.join, []

    def interrupted(self, timeout=None):
        times.append(0)
        if len(times) == 1:
            raise KeyboardInterrupt
        join(self, timeout)

    def loss(part):
        y = loss_of(model)(part)
        done.append(threading.current_thread())
        return y

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        parallel.backward(loss, batch, 3)
    assert len(done) == 3 and not any(t.is_alive() for t in done if t is not threading.current_thread())
    assert gradients(model) == {} and blas._calls().get() == found


def test_a_graph_from_before_is_refused():
    model, batch = Model(), make(6)
    outside = model.inner.lora_A * 1.0
    with pytest.raises(GraphError, match=r"Mul with output \(2, 4\), which was computed before"):
        parallel.backward(lambda part: loss_of(model)(part) + outside.sum(), batch, 2)
    assert gradients(model) == {}
    outside.sum().backward()  # it can still be used


def test_a_loss_is_a_number_and_has_a_graph():
    model, batch = Model(), make(6)
    with pytest.raises(GraphError, match="starts from a scalar"):
        parallel.backward(lambda part: model(part["x"]), batch, 2)
    with pytest.raises(GraphError, match="nothing to do"):
        parallel.backward(lambda part: loss_of(model)(part).detach(), batch, 2)


def test_the_parts_are_freed():
    model, batch, nodes = Model(), make(6), []

    def loss(part):
        y = loss_of(model)(part)
        nodes.append(weakref.ref(y.node))
        return y

    value = parallel.backward(loss, batch, 2)
    assert value.node is None and value.shape == () and [node() for node in nodes] == [None, None]


# -- dropout ----------------------------------------------------------------------------------------------------------


def test_masks_differ_from_part_to_part_and_from_step_to_step():
    drop, w = nn.Dropout(0.5, rng=0), Parameter(np.ones(1000))
    masks = []

    def run(threads):
        drawn = {}

        def loss(part):
            y = drop(w * part)
            drawn[int(part[0, 0])] = (y.data != 0).tobytes()
            return y.mean()

        parallel.backward(loss, np.arange(1.0, threads + 1)[:, None] * np.ones(1000), threads)
        return [mask for _, mask in sorted(drawn.items())]

    for step in range(3):
        masks += run(3)
        assert drop.step == step + 1
    masks += run(1)
    assert drop.step == 4 and len(set(masks)) == 10


def test_a_layer_called_twice_counts_twice():
    drop, w = nn.Dropout(0.5, rng=0), Parameter(np.ones(1000))
    parallel.backward(lambda part: (drop(w * part) + drop(w * part)).mean(), np.ones((4, 1000)), 2)
    assert drop.step == 2


# -- choosing ---------------------------------------------------------------------------------------------------------


def test_advice(monkeypatch):
    monkeypatch.setattr(parallel, "cores", lambda: 4)
    narrow, wide = nn.Linear(parallel.WIDE, 3000), nn.Linear(parallel.WIDE + 1, 3000)
    assert parallel.advised_threads(narrow.parameters()) == 4
    assert parallel.advised_threads(wide.requires_grad(False).parameters()) == 1


def test_one_thread_is_the_call_itself():
    model, batch, threads = Model(), make(6), []

    def loss(part):
        threads.append(threading.current_thread())
        assert part is batch
        return loss_of(model)(part)

    parallel.backward(loss, batch, 1)
    assert threads == [threading.current_thread()]


def test_a_blas_that_cannot_be_held_takes_the_whole_batch(monkeypatch):
    monkeypatch.setattr(blas, "can_hold", lambda: False)
    model, batch = Model(), make(6)
    assert split(model, batch)[0] == whole(model, batch)[0]


# -- pieces that share nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_every_piece_is_computed_once_in_the_callers_context(threads, count):
    variable = ContextVar("variable", default="outside")
    variable.set("inside")
    seen = []
    parallel.spread_out(lambda piece: seen.append((piece, variable.get())), range(count), threads)
    assert sorted(seen) == [(piece, "inside") for piece in range(count)]


@pytest.mark.parametrize("threads", [1, 2])
def test_after_an_error_no_further_piece_begins(threads):
    begun = []

    def compute(piece):
        begun.append(piece)
        if piece == 1:
            raise ValueError("piece 1")
        time.sleep(0.01)

    with pytest.raises(ValueError, match="piece 1"):
        parallel.spread_out(compute, range(100), threads)
    assert len(begun) < 20
    with pytest.raises(ConfigError, match="threads"):
        parallel.spread_out(compute, [0], 0)
