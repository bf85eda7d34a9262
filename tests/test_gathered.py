"""The gradient of a value in the middle: what `retain_grad` keeps, when it is there, and that nobody else pays for it."""
import contextlib
import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest
from conftest import fetch, place, shares
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora
from minilora import Parameter, Tensor, errors, lora, nn, no_grad, ops, parallel
from minilora.engine import Op, apply
from minilora.half import mixed
from minilora.ops.weights import COMPUTED, put_weights, with_weights


def parameter(values, dtype="float64"):
    return Parameter(place(values, dtype))


class Breaks(Op):
    """y = x, whose backward raises."""

    def forward(self, x):
        return x + 0.0

    def backward(self, dy):
        raise ArithmeticError("planted")


def test_the_worked_example(device):
    """The gradient of z is s u, of docs/lora_gradients.md."""
    x, W, b = (Tensor(place(v, "float64")) for v in ([[1, 0, 2], [-1, 1, 1]], [[1, 0, -1], [2, 1, 0]], [1, -1]))
    A, B = parameter([[1, 2, 1]]), parameter([[1], [-2]])
    z = ops.linear(x, A).retain_grad()
    y = (ops.linear(x, W, b) + 2.0 * ops.linear(z, B)).retain_grad()
    dy = place([[1, 2], [3, -1]], "float64")
    y.backward(gradient=dy)
    np.testing.assert_array_equal(fetch(z.grad), [[-6], [10]])
    np.testing.assert_array_equal(fetch(y.grad), fetch(dy))
    np.testing.assert_array_equal(fetch(A.grad), [[-16, 10, -2]])


@given(st.lists(st.sampled_from("mul add exp neg cube".split()), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_it_is_the_gradient_of_a_leaf_in_its_place(device, program, seed):
    rng = np.random.default_rng(seed)
    at = int(rng.integers(len(program)))

    def run(h, program):
        for name in program:
            h = {"mul": lambda: h * h, "add": lambda: h + h, "exp": lambda: ops.exp(h * 0.1), "neg": lambda: -h,
                 "cube": lambda: h * h * 0.1 + h}[name]()
        return h

    p = parameter(rng.standard_normal((2, 3)) / 2)
    middle = run(p * 1.0, program[:at]).retain_grad()
    run(middle, program[at:]).sum().backward()
    leaf = Parameter(middle.data + 0.0)
    run(leaf, program[at:]).sum().backward()
    np.testing.assert_array_equal(fetch(middle.grad), fetch(leaf.grad))


def test_all_uses_of_a_value_are_added_up(device):
    p = parameter([1.0, 2.0])
    z = (p * 1.0).retain_grad()
    (z * z + z * 3.0 + z.reshape(2, 1).T.reshape(2)).sum().backward()
    np.testing.assert_array_equal(fetch(z.grad), [6.0, 8.0])


def test_it_returns_the_tensor_and_a_second_call_changes_nothing(device):
    p = parameter([2.0])
    z = p * 3.0
    assert z.retain_grad() is z and z.grad is None and z.retain_grad() is z
    (z * z).sum().backward()
    first = z.grad
    assert z.retain_grad() is z and z.grad is first and fetch(first).tolist() == [12.0]


def test_a_parameter_keeps_its_gradient_anyway(device):
    p = parameter([2.0])
    assert p.retain_grad() is p
    (p * 3.0).sum().backward()
    assert fetch(p.grad).tolist() == [3.0]
    p.trainable = False
    with pytest.raises(errors.GraphError, match="trainable=True"):
        p.retain_grad()


def test_what_has_no_part_in_the_loss_stays_none(device):
    p = parameter([2.0])
    z, beside = (p * 3.0).retain_grad(), (p * 5.0).retain_grad()
    (z * 2.0).sum().backward()
    assert fetch(z.grad).tolist() == [2.0] and beside.grad is None


def test_where_no_gradient_comes_it_says_what_to_do(device):
    p = parameter([2.0])
    with pytest.raises(errors.GraphError, match=r"minilora\.Parameter\(x\.data\)"):
        Tensor(place([1.0], "float64")).retain_grad()
    with no_grad(), pytest.raises(errors.GraphError, match=r"no_grad\(\)"):
        (p * 2.0).retain_grad()
    with pytest.raises(errors.GraphError):
        (p * 2.0).detach().retain_grad()
    z = p * 2.0
    z.sum().backward()
    with pytest.raises(errors.GraphError, match="too late"):
        z.retain_grad()
    with pytest.raises(AttributeError, match=r"x\.retain_grad\(\) before backward\(\)"):
        z.grad
    assert not hasattr(z, "grad") and "grad" not in dir(z)
    with pytest.raises(AttributeError, match="cannot be assigned"):
        z.grad = None


def test_the_loss_itself_and_values_without_axes(device):
    p = parameter([1.0, 2.0])
    total = p.sum().retain_grad()
    loss = (total * total).retain_grad()
    loss.backward()
    assert type(loss.grad) is type(p.data) and loss.grad.shape == total.grad.shape == ()
    assert float(loss.grad) == 1.0 and float(total.grad) == 6.0


def test_empty_values(device):
    p = parameter(np.zeros((0, 3)))
    z = (p * 2.0).retain_grad()
    z.sum().backward()
    assert z.grad.shape == (0, 3)


def test_it_is_an_array_of_its_own(device):
    """Gradients in a walk are borrowed: an addition hands the very array of the cotangent to both of its inputs."""
    p, q = parameter([1.0, 2.0]), parameter([3.0, 4.0])
    a, b = (p * 1.0).retain_grad(), (q * 1.0).retain_grad()
    y = (a + b).retain_grad()
    dy = place([5.0, 6.0], "float64")
    y.backward(gradient=dy)
    arrays = [a.grad, b.grad, y.grad, dy, p.grad, q.grad]
    assert not any(shares(one, other) for i, one in enumerate(arrays) for other in arrays[:i])
    a.grad[...] = 0.0
    assert fetch(b.grad).tolist() == fetch(p.grad).tolist() == [5.0, 6.0]


@pytest.mark.parametrize("move", [lambda z: z.T, lambda z: z.reshape(-1), lambda z: z[0], lambda z: z + 0.0],
                         ids=["transposed", "flat", "a row", "moved by nothing"])
def test_views_have_gradients_of_their_own(move, device):
    p = parameter([[1.0, 2.0], [3.0, 4.0]])
    z = (p * 1.0).retain_grad()
    v = move(z).retain_grad()
    (v * v).sum().backward()
    np.testing.assert_array_equal(fetch(v.grad), 2.0 * fetch(v.data))
    assert z.grad.shape == z.shape and v.grad.shape == v.shape and not shares(z.grad, v.grad)


def test_half_precision_is_added_in_single_and_rounded_once(device):
    p = parameter(np.full(3, 1.0), "float16")
    z = (p * 1.0).retain_grad()
    loss = sum((z * 2.0 ** -11).sum() for _ in range(3)) + z.sum()
    loss.backward()
    assert z.grad.dtype == p.grad.dtype == "float16"
    np.testing.assert_array_equal(fetch(z.grad), fetch(p.grad))


def test_a_failed_walk_keeps_nothing(device):
    p = parameter([1.0])
    z = apply(Breaks, p)
    y = (z * 2.0).retain_grad()
    with pytest.raises(ArithmeticError):
        y.sum().backward()
    assert y.grad is None and p.grad is None


def test_two_losses_over_one_value(device):
    """The graph of a value is used once: the second loss is refused, and what was kept stays."""
    p = parameter([1.0])
    z = (p * 2.0).retain_grad()
    one, other = (z * 3.0).sum(), (z * 5.0).sum()
    one.backward()
    with pytest.raises(errors.GraphError, match="run the forward pass again"):
        other.backward()
    assert fetch(z.grad).tolist() == [3.0]


def test_a_second_graph_does_not_touch_the_first(device):
    p, kept = parameter([1.0]), []
    for factor in (3.0, 5.0):
        z = (p * 2.0).retain_grad()
        (z * factor).sum().backward()
        kept.append(z)
    assert [fetch(z.grad).tolist() for z in kept] == [[3.0], [5.0]] and fetch(p.grad).tolist() == [16.0]


def test_copies_are_outside_of_the_graph(device):
    p = parameter([1.0])
    z = (p * 2.0).retain_grad()
    z.sum().backward()
    for twin in (copy.copy(z), copy.deepcopy(z), pickle.loads(pickle.dumps(z))):
        assert twin.node is None and not hasattr(twin, "grad")


@contextlib.contextmanager
def no_collector():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_nothing_outlives_the_tensor():
    class Watched(Op):
        """y = x"""

        def forward(self, x):
            return x + 0.0

        def backward(self, dy):
            return (dy,)

    p = Parameter(np.ones(3))
    with no_collector():
        z = apply(Watched, p).retain_grad()
        place_of = weakref.ref(z.node)
        loss = (z * 2.0).sum()
        del z
        assert place_of() is not None  # the graph needs it
        loss.backward()
        assert place_of() is None  # and with the walk it goes, its gradient too
        z = apply(Watched, p).retain_grad()
        place_of = weakref.ref(z.node)
        z.sum().backward()
        assert place_of().retained.gradient is z.grad
        del z
        assert place_of() is None


# -- where a graph is inside of an operation, and in threads -------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        self.linear = nn.Linear(3, 3, rng=0).to(dtype="float64")
        self.seen = []

    def forward(self, x):
        z = self.linear(x)
        self.seen.append(z.retain_grad() if z.node is not None else z)
        return ops.tanh(z)


def test_a_part_that_is_computed_twice(device):
    block = Block().to(device) if device != "cpu" else Block()
    x = Tensor(place([[0.5, -1.0, 2.0]], "float64"))
    (block(x) * 3.0).sum().backward()
    expected = fetch(block.seen.pop().grad)
    block.grad_checkpoint = True
    loss = (block(x) * 3.0).sum()
    loss.backward()
    first, second = block.seen
    assert first.grad is None
    np.testing.assert_array_equal(fetch(second.grad), expected)


def test_a_part_that_is_computed_twice_below_an_error(device):
    """What the walk inside found is not handed out if the walk outside fails."""
    block = Block().to(device) if device != "cpu" else Block()
    block.grad_checkpoint = True
    x = parameter([[0.5, -1.0, 2.0]])
    y = block(apply(Breaks, x)).retain_grad()
    with pytest.raises(ArithmeticError):
        y.sum().backward()
    assert len(block.seen) == 2 and all(z.grad is None for z in block.seen) and y.grad is None


def test_a_network_whose_weights_are_computed():
    """Its graph lies in one operation; what is asked for in there comes with the walk outside."""
    theta, x, seen = Parameter(np.array([3.0, 4.0])), Tensor(np.array([[1.0, 2.0]])), []
    w = Parameter(np.zeros((1, 2)), trainable=COMPUTED)
    put_weights(theta.data, [w], ["float64"])

    def network(x):
        seen.append(ops.linear(x, w).retain_grad())
        return seen[-1] * seen[-1]

    loss = with_weights(network, [w], theta, [], x).sum()
    assert seen[0].grad is None
    loss.backward()
    assert seen[0].grad.tolist() == [[22.0]] and theta.grad.tolist() == [22.0, 44.0]


def test_mixed_precision():
    layer = nn.Linear(3, 2, rng=0)
    with mixed():
        y = layer(Tensor(np.ones((1, 3), "float32"))).retain_grad()
        (y * y).sum().backward()
    assert y.dtype == y.grad.dtype == "float16" and layer.weight.grad.dtype == "float32"
    np.testing.assert_allclose(y.grad, 2.0 * y.data, rtol=1e-3)


def test_a_tensor_is_as_small_as_it_was():
    z = (Parameter(np.ones(2)) * 2.0).retain_grad()
    assert not hasattr(z, "__dict__") and Tensor.__slots__ == ("node",)


def test_parts_of_a_batch_in_threads():
    w, seen, lock = Parameter(np.array([[1.0, 2.0]])), {}, threading.Lock()

    def loss_of(batch):
        z = ops.linear(Tensor(batch), w).retain_grad()
        with lock:
            seen[float(batch[0, 0])] = z
        return z.mean()

    batch = np.arange(8.0).reshape(4, 2)
    parallel.backward(loss_of, batch, threads=2)
    assert sum(z.grad.sum() for z in seen.values()) == pytest.approx(1.0)
    assert all((z.grad == 0.25).all() for z in seen.values())


def test_parts_of_a_batch_of_which_one_fails():
    w, seen = Parameter(np.array([[1.0, 2.0]])), []

    def loss_of(batch):
        z = ops.linear(Tensor(batch), w)
        z = (apply(Breaks, z) if batch[0, 0] else z).retain_grad()
        seen.append(z)
        return z.mean()

    with pytest.raises(ArithmeticError):
        parallel.backward(loss_of, np.arange(8.0).reshape(4, 2), threads=2)
    assert w.grad is None and all(z.grad is None for z in seen)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["plain", "dora"])
def test_adapted_layers_merged_and_not(options):
    """Behind a layer the gradient is the same, however the layer computes. A merged layer is frozen, so a leaf comes first."""
    layer = lora.Linear(3, 2, r=1, lora_alpha=2, rng=0, **options).to(dtype="float64")
    layer.lora_B.data[...] = 0.5
    x = Parameter(np.array([[1.0, 2.0, 3.0]]))
    gradients = []
    for merged in (False, True):
        if merged:
            layer.eval().merge()
        y = layer(x * 1.0).retain_grad()
        (y * y).sum().backward()
        np.testing.assert_array_equal(y.grad, 2.0 * y.data)
        gradients.append(y.grad)
    np.testing.assert_allclose(*gradients, rtol=1e-12)


def test_a_step_that_may_be_recorded_gives_it_back(device):
    w = parameter([[1.0, 2.0]], "float32")

    @minilora.record
    def step(x):
        w.grad = None
        z = ops.linear(x, w).retain_grad()
        loss = (z * z).sum()
        loss.backward()
        return loss, z.grad

    for k in range(4):
        loss, dz = step(Tensor(place([[1.0 + k, 0.0]], "float32")))
        assert fetch(dz).tolist() == [[2.0 * (1.0 + k)]]
