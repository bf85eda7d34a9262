"""Walking the graph: right gradients for every shape of graph, errors that change nothing, and memory given back."""
import contextlib
import gc
import tracemalloc
import weakref

import numpy as np
import pytest
import standin
from conftest import fetch, place, shares
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora
from minilora import Parameter, Tensor, engine, errors, lora, no_grad, ops, optim


def parameter(values, dtype="float64"):
    return Parameter(place(values, dtype))


@contextlib.contextmanager
def no_collector():
    """Only reference counting frees memory."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# -- shapes of graphs --------------------------------------------------------------------------------------------------


def test_doubling_twice(device):
    a = parameter([1.0, 2.0])
    b = a + a
    (b + b).sum().backward()
    np.testing.assert_array_equal(fetch(a.grad), [4.0, 4.0])


def test_diamond(device):
    a = parameter([0.5, 2.0])
    b = a * a
    left, right = b * 3.0, ops.exp(b)
    (left * right).sum().backward()
    x = np.array([0.5, 2.0])
    np.testing.assert_allclose(fetch(a.grad), 6 * x * np.exp(x * x) * (1 + x * x), rtol=1e-14)


def test_an_early_result_used_late(device):
    """The oldest operation must wait for its youngest consumer."""
    a = parameter([3.0])
    early = a * 2.0
    h = early
    for _ in range(5):
        h = h + 1.0
    (h * early).sum().backward()
    np.testing.assert_array_equal(fetch(a.grad), [2 * (6.0 + 5.0) + 2 * 6.0])


def test_residual_chain(device):
    a = parameter([0.1, -0.2])
    h = a
    for _ in range(100):
        h = h + 0.01 * ops.tanh(h)
    h.sum().backward()
    x, slope = np.array([0.1, -0.2]), np.ones(2)
    for _ in range(100):
        slope *= 1 + 0.01 * (1 - np.tanh(x) ** 2)
        x = x + 0.01 * np.tanh(x)
    np.testing.assert_allclose(fetch(a.grad), slope, rtol=1e-13)


def test_a_parameter_used_many_times(device):
    a = parameter([1.0, 2.0])
    h = a * 0.0
    for i in range(300):
        h = h + a * float(i)
    h.sum().backward()
    np.testing.assert_array_equal(fetch(a.grad), [300 * 299 / 2] * 2)


SQUARE = np.array([[1.0, -2.0], [3.0, 0.5]])
WITH_ITSELF = {  # one parameter in several places of one operation
    "p * p": (lambda p: p * p, lambda p: p * p),
    "p + p": (lambda p: p + p, lambda p: p + p),
    "p - p": (lambda p: p - p, lambda p: p - p),
    "p / p": (lambda p: p / p, lambda p: p / p),
    "p @ p": (lambda p: p @ p, lambda p: p @ p),
    "p @ p.T": (lambda p: p @ p.T, lambda p: p @ p.T),
    "p.T @ p": (lambda p: p.T @ p, lambda p: p.T @ p),
    "linear(p, p)": (lambda p: ops.linear(p, p), lambda p: p @ p.T),
    "linear(p, p, p[0])": (lambda p: ops.linear(p, p, p[0]), lambda p: p @ p.T + p[0]),
    "concatenate": (lambda p: ops.concatenate([p, p, p * p]), lambda p: np.concatenate([p, p, p * p])),
    "mse": (lambda p: ops.mse(p, p), lambda p: ((p - p) ** 2).mean()),
    "lora_linear": (lambda p: lora.lora_linear(p, p, None, p, p, 0.5), lambda p: p @ (p + 0.5 * p @ p).T),
    "twice": (lambda p: ops.linear(p, p) @ p + p, lambda p: p @ p.T @ p + p),
}


@pytest.mark.parametrize("name", WITH_ITSELF)
@pytest.mark.parametrize("room", [False, True], ids=["own grad", "optimizer's array"])
def test_one_parameter_in_several_places_of_one_operation(name, room, device):
    call, formula = WITH_ITSELF[name]
    p, other = parameter(SQUARE), parameter(np.ones(3))
    if room:
        optim.SGD([other, p], lr=0.1)
    dy = np.random.default_rng(0).standard_normal(np.shape(formula(SQUARE)))
    expected = complex_step(lambda x: (formula(x) * dy).sum(), SQUARE)
    for passes in (1, 2):
        call(p).backward(place(dy))
        np.testing.assert_allclose(fetch(p.gathered), passes * expected, rtol=1e-13, atol=1e-14)
        assert not room or p.gathered is p.room


class BothInto(engine.Op):
    """y = x1 x2, asking for a place to write both gradients into."""

    def forward(self, x1, x2):
        self.save(x1, x2)
        return self.xp.dot(x1, x2)

    def backward(self, dy):
        x1, x2 = self.saved
        return self.xp.dot(dy, x2.T, out=self.into(0)), self.xp.dot(x1.T, dy, out=self.into(1))


SHARED = {  # one weight in several operations, each of which may write into the optimizer's array
    "two layers": (lambda x, W: ops.linear(ops.tanh(ops.linear(x, W)), W), lambda x, W: np.tanh(x @ W.T) @ W.T),
    "products": (lambda x, W: ((x @ W) @ W) @ W, lambda x, W: x @ W @ W @ W),
    "first plain": (lambda x, W: ops.linear(x, W) + W, lambda x, W: x @ W.T + W),
    "last plain": (lambda x, W: ops.linear(x + W, W), lambda x, W: (x + W) @ W.T),
    "base of two": (lambda x, W: lora.lora_linear(ops.linear(x, W), W, None, x, x, 0.5),
                    lambda x, W: x @ W.T @ (W + 0.5 * x @ x).T),
    "both places": (lambda x, W: engine.apply(BothInto, W, W), lambda x, W: W @ W),
    "both places twice": (lambda x, W: engine.apply(BothInto, engine.apply(BothInto, W, W), W), lambda x, W: W @ W @ W),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_weight_in_an_optimizers_array(name, device):
    call, formula = SHARED[name]
    x, dy = np.random.default_rng(1).standard_normal((2, 2, 2))
    W, other = parameter(SQUARE), parameter(np.ones(3))
    optim.SGD([other, W], lr=0.1)
    expected = complex_step(lambda weight: (formula(x, weight) * dy).sum(), SQUARE)
    for passes in (1, 2):
        call(Tensor(place(x)), W).backward(place(dy))
        np.testing.assert_allclose(fetch(W.gathered), passes * expected, rtol=1e-13, atol=1e-14)
        assert W.gathered is W.room and other.grad is None
    np.testing.assert_array_equal(fetch(other), np.ones(3))


def complex_step(f, x):
    """The gradient of a function of one array, element by element."""
    gradient = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        moved = x.astype(complex)
        moved[index] += 1e-30j
        gradient[index] = f(moved).imag / 1e-30
    return gradient


# Operations on 2 x 2 matrices that keep every element within [-1, 1]: (tensors, arrays).
STEPS = {
    "add": (lambda a, b: (a + b) * 0.5, lambda a, b: (a + b) * 0.5),
    "sub": (lambda a, b: (a - b) / 2, lambda a, b: (a - b) / 2),
    "mul": (lambda a, b: a * b, lambda a, b: a * b),
    "matmul": (lambda a, b: (a @ b) * 0.5, lambda a, b: (a @ b) * 0.5),
    "linear": (lambda a, b: 0.3 * ops.linear(a, b, b[0]), lambda a, b: 0.3 * (a @ b.T + b[0])),
    "join": (lambda a, b: ops.concatenate([a[:1], b[1:]]), lambda a, b: np.concatenate([a[:1], b[1:]])),
    "row": (lambda a, b: (a[1] + b) * 0.5, lambda a, b: (a[1] + b) * 0.5),
    "sum": (lambda a, b: a.sum(axis=0, keepdims=True) * 0.25 + b * 0.5,
            lambda a, b: a.sum(axis=0, keepdims=True) * 0.25 + b * 0.5),
    "mean": (lambda a, b: (a.mean() + b) * 0.5, lambda a, b: (a.mean() + b) * 0.5),
    "tanh": (lambda a, b: ops.tanh(a), lambda a, b: np.tanh(a)),
    "neg": (lambda a, b: -a, lambda a, b: -a),
    "transpose": (lambda a, b: a.T, lambda a, b: a.T),
    "reverse": (lambda a, b: a[:, ::-1], lambda a, b: a[:, ::-1]),
    "gather": (lambda a, b: a[place([1, 1])], lambda a, b: a[[1, 1]]),
    "reshape": (lambda a, b: a.reshape(4).reshape(2, 2), lambda a, b: a),
    "same": (lambda a, b: a, lambda a, b: a),
}
PROGRAM = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 30), st.integers(0, 30)), max_size=9)


def run(program, values, side):
    """The last of the values that the program makes; each step reads any two values made before."""
    pool = list(values)
    for name, i, j in program:
        pool.append(STEPS[name][side](pool[-1 - i % len(pool)], pool[-1 - j % len(pool)]))
    return pool[-1]


@settings(max_examples=max(150, settings().max_examples))
@given(program=PROGRAM, trainable=st.lists(st.booleans(), min_size=3, max_size=3), rooms=st.booleans(),
       seed=st.integers(0, 2**32 - 1))
def test_random_graphs(device, program, trainable, rooms, seed):
    """Gradients are those of a complex step through plain arrays, and share no memory with anything."""
    rng = np.random.default_rng(seed)
    hosts = [rng.uniform(-1, 1, (2, 2)) for _ in range(3)]
    parameters = [Parameter(place(x), trainable=t) for x, t in zip(hosts, trainable)]
    if rooms and any(trainable):
        optim.SGD(parameters, lr=0.1)
    host_dy = rng.uniform(-1, 1, (2, 2))
    for passes in (1, 2):
        y, dy = run(program, parameters, 0), place(host_dy)
        if y.node is None:
            return
        y.backward(dy)
        held = [p.grad for p in parameters if p.grad is not None]
        others = [dy, y.data, *(p.data for p in parameters)]
        for i, gradient in enumerate(held):
            assert not any(shares(gradient, array) for array in held[:i] + others)
        np.testing.assert_array_equal(fetch(dy), host_dy)
        for i, p in enumerate(parameters):
            expected = complex_step(
                lambda x: (run(program, [*hosts[:i], x, *hosts[i + 1:]], 1) * host_dy).sum(), hosts[i])
            if p.grad is None:
                assert not p.trainable or not expected.any()
            else:
                assert p.trainable
                np.testing.assert_allclose(fetch(p.grad), passes * expected, rtol=0, atol=1e-14)
    np.testing.assert_array_equal([fetch(p) for p in parameters], hosts)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_a_leaf_gradient_is_an_array_of_its_own(reduce, device):
    """Also where it is one number repeated: it must hold a second backward, and an update in place."""
    p = parameter([[1.0, 2.0], [3.0, 4.0]])
    getattr(p, reduce)().backward()
    getattr(p, reduce)().backward()
    (p.sum() + p.mean()).backward()
    once = {"sum": 1.0, "mean": 0.25}[reduce]
    np.testing.assert_array_equal(fetch(p.grad), np.full((2, 2), 2 * once + 1.25))
    p.grad[0] *= 2.0
    np.testing.assert_array_equal(fetch(p.grad)[1], [2 * once + 1.25] * 2)


def test_backward_of_a_parameter_itself(device):
    p, dy = parameter([1.0, 2.0]), place([3.0, 4.0])
    p.backward(dy)
    p.backward(dy)
    np.testing.assert_array_equal(fetch(p.grad), [6.0, 8.0])
    np.testing.assert_array_equal(fetch(dy), [3.0, 4.0])


def test_a_scalar_of_any_shape_needs_no_cotangent(device):
    for shape in [(), (1,), (1, 1)]:
        p = parameter(np.ones(shape))
        (p * 3.0).backward()
        np.testing.assert_array_equal(fetch(p.grad), np.full(shape, 3.0))


def test_gradients_of_two_graphs_add_up(device):
    p = parameter([1.0, 2.0])
    for weights in ([1.0, 5.0], [2.0, 7.0]):
        (p * Tensor(place(weights))).sum().backward()
    np.testing.assert_array_equal(fetch(p.grad), [3.0, 12.0])


def test_the_cotangent_may_be_a_tensor(device):
    p = parameter([1.0, 2.0])
    (p * 2.0).backward(Tensor(place([1.0, 10.0])))
    np.testing.assert_array_equal(fetch(p.grad), [2.0, 20.0])


def test_the_function_and_the_method_do_the_same(device):
    p = parameter([1.0, 2.0])
    minilora.backward((p * p).sum())
    engine.backward(p * p, gradient=place([1.0, 1.0]))
    np.testing.assert_array_equal(fetch(p.grad), [4.0, 8.0])


# -- whose array a gradient is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (2, 2)])
def test_what_an_operation_hands_to_several_is_added_to_for_nobody(shape, device):
    """E1 of the list of faults: dy of (a + b) goes to both; what comes to a besides must not reach q."""
    p, q = parameter(np.ones(shape)), parameter(np.ones(shape))
    a, b = (p * 1.0).sum(), (q * 1.0).sum()
    ((a + b) * 2.0 + a * 3.0).backward()
    np.testing.assert_array_equal(fetch(p.grad), np.full(shape, 5.0))
    np.testing.assert_array_equal(fetch(q.grad), np.full(shape, 2.0))


class Copies(engine.Op):
    """y = x1 + x2 + x3, whose backward gives one array to all three: a new one, no view of dy."""

    def forward(self, x1, x2, x3):
        return x1 + x2 + x3

    def backward(self, dy):
        return (dy * 1.0,) * 3


@pytest.mark.parametrize("shape", [(), (1,), (2, 2)])
@pytest.mark.parametrize("inner", [False, True])
def test_one_array_for_all_inputs(shape, inner, device):
    leaves = [parameter(np.ones(shape)) for _ in range(3)]
    dy, keep = place(np.full(shape, 2.0)), leaves
    if inner:
        leaves = [leaf * 1.0 for leaf in leaves]
    y = engine.apply(Copies, *leaves) + leaves[0] * 5.0 + leaves[1]
    y.backward(dy)
    for p, expected in zip(keep, (12.0, 4.0, 2.0)):
        np.testing.assert_array_equal(fetch(p.grad), np.full(shape, expected))
    keep[0].grad[...] = 7.0
    assert fetch(keep[1].grad).max() == 4.0 and fetch(keep[2].grad).max() == 2.0 and fetch(dy).max() == 2.0


@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_two_parameters_of_a_sum_have_two_gradients(shape, device):
    p, q, dy = parameter(np.ones(shape)), parameter(np.ones(shape)), place(np.full(shape, 2.0))
    for make in (lambda: (p + q) * 0.5, lambda: p + q):
        p.grad = q.grad = None
        make().backward(dy)
        p.grad[...] = 9.0
        assert fetch(q.grad).max() <= 2.0 and fetch(dy).max() == 2.0


@pytest.mark.parametrize("room", [False, True], ids=["own grad", "optimizer's array"])
def test_a_gradient_that_somebody_holds_stays(room, device):
    w = parameter([1.0, 2.0])
    optimizer = optim.SGD([w], lr=0.1) if room else None
    (w * w).sum().backward()
    held = w.grad
    before = fetch(held)
    assert w.grad is held  # and is the gradient until it is given up
    w.grad = None
    (w * 5.0).sum().backward()
    np.testing.assert_array_equal(fetch(w.grad), [5.0, 5.0])
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
        (w * 6.0).sum().backward()
        optimizer.step()
    np.testing.assert_array_equal(fetch(held), before)


# -- arrays that were written in place ---------------------------------------------------------------------------------


def two_losses(x, W, use):
    return use(x, W).sum(), use(x * 2.0, W).sum()


READERS = {  # operations whose backward reads the weight itself
    "Linear": lambda x, W: ops.linear(ops.tanh(x), W), "MatMul": lambda x, W: ops.tanh(x) @ W, "Mul": lambda x, W: x * W,
    "LoRALinear": lambda x, W: lora.lora_linear(x, W, None, W, W, 0.5),
}


@pytest.mark.parametrize("name", READERS)
def test_backward_after_a_step_is_refused(name, device):
    x, W = parameter(SQUARE), parameter(SQUARE)
    optimizer = optim.SGD([W], lr=0.1)
    first, second = two_losses(x, W, READERS[name])
    first.backward()
    held = fetch(x.grad)
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(errors.GraphError, match=rf"{name}.*float64 \(2, 2\).*1 time since.*forward pass again.*before it"):
        second.backward()
    assert W.grad is None
    np.testing.assert_array_equal(fetch(x.grad), held)
    two_losses(x, W, READERS[name])[1].backward()  # the advice, and the other one
    optimizer.step()
    first, second = two_losses(x, W, READERS[name])
    (first + second).backward()


def test_backward_after_other_weights_were_loaded_is_refused(device):
    model = minilora.nn.Sequential(minilora.nn.Linear(2, 2, dtype="float64"), minilora.nn.Linear(2, 2, dtype="float64"))
    optim.SGD(model.parameters(), lr=0.1)
    loss = model(Tensor(place(SQUARE))).sum()
    model.load_state_dict(model.state_dict())
    with pytest.raises(errors.GraphError, match="Linear.*load_state_dict"):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())


def test_what_the_operation_did_not_save_may_be_written(device):
    """A Linear whose input needs no gradient keeps no W; one whose data is another array by now is not touched."""
    W, b = parameter(SQUARE), parameter([1.0, 2.0])
    x = Tensor(place(SQUARE))
    optimizer = optim.SGD([W, b], lr=0.1)
    first, second = two_losses(x, W, lambda x, W: ops.linear(x, W, b))
    first.backward()
    optimizer.step()
    optimizer.zero_grad()
    second.backward()
    np.testing.assert_array_equal(fetch(W.grad), np.tile(2 * SQUARE.sum(axis=0), (2, 1)))
    third = ops.linear(x * b, W).sum()
    W.data, W.room = W.data * 1.0, None
    W.version += 1  # of the new array or the old one: nobody knows
    with pytest.raises(errors.GraphError, match="Linear"):
        third.backward()


@pytest.mark.parametrize("view", [lambda W: W.T, lambda W: W[:, ::-1], lambda W: W.reshape(2, 2), lambda W: W.T[:1].T],
                         ids=["transpose", "slice", "reshape", "view of a view"])
def test_a_view_of_a_written_array_is_that_array(device, view):
    W, x = parameter(SQUARE), parameter(SQUARE)
    optimizer = optim.SGD([W, x], lr=0.1)
    first, second = two_losses(x, W, lambda x, W: ops.matmul(x, view(W)))
    first.backward()
    optimizer.step()
    before = fetch(W.grad), fetch(x.grad)
    with pytest.raises(errors.GraphError, match="MatMul.*1 time since"):
        second.backward()
    assert all(np.array_equal(a, fetch(p.grad)) for a, p in zip(before, (W, x)))


def test_frozen_weights_that_are_written_count_too(device):
    W, x = Parameter(place(SQUARE), trainable=False), parameter(SQUARE)
    loss = ops.linear(x, W).sum()
    W.data[...] = 0.0
    W.version += 1
    W.data[...] = 1.0
    W.version += 1
    with pytest.raises(errors.GraphError, match="Linear.*2 times since"):
        loss.backward()
    assert x.grad is None


# -- errors change nothing ---------------------------------------------------------------------------------------------


class Failing(engine.Op):
    """y = x, and its backward fails."""

    def forward(self, x):
        return x * 1.0

    def backward(self, dy):
        raise ZeroDivisionError("planted")


@pytest.mark.parametrize("room", [False, True], ids=["own grad", "optimizer's array"])
@pytest.mark.parametrize("earlier", [False, True], ids=["no grad yet", "grad from before"])
def test_a_failed_walk_changes_no_gradient(room, earlier, device):
    W, b = parameter(SQUARE), parameter([1.0, 2.0])
    if room:
        optim.SGD([W, b], lr=0.1)
    x = Tensor(place(SQUARE))
    if earlier:
        ops.linear(x, W, b).sum().backward()
    before = [None if p.grad is None else fetch(p.grad) for p in (W, b)]
    h = engine.apply(Failing, b * 2.0)
    loss = ops.linear(ops.linear(x, W, h), W, b).sum()  # W and b get gradients before the walk fails
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    for p, gradient in zip((W, b), before):
        assert (p.grad is None) == (gradient is None)
        np.testing.assert_array_equal(0 if p.grad is None else fetch(p.grad), 0 if gradient is None else gradient)
    for p in (W, b):
        p.grad = None
    ops.linear(x, W, b).sum().backward()  # and the next walk is right
    np.testing.assert_array_equal(fetch(W.grad), np.tile(SQUARE.sum(axis=0), (2, 1)))
    np.testing.assert_array_equal(fetch(b.grad), [2.0, 2.0])


RETURNS = {  # mistakes of an operation's author, for two inputs of shape (2, 2)
    "too few": lambda dy: (dy,), "too many": lambda dy: (dy, dy * 2.0, dy * 3.0),
    "None for one that needs it": lambda dy: (dy, None), "wrong shape": lambda dy: (dy, dy[:1] * 2.0),
}


@pytest.mark.parametrize("leaf", [True, False], ids=["parameters", "inner"])
@pytest.mark.parametrize("mistake", RETURNS)
def test_an_operation_with_a_wrong_backward_is_named(mistake, leaf, device):
    class Mistaken(engine.Op):
        def forward(self, x1, x2):
            return x1 * x2

        def backward(self, dy):
            return RETURNS[mistake](dy)

    p, q = parameter(SQUARE), parameter(SQUARE)
    inputs = (p, q) if leaf else (p * 2.0, q * 2.0)
    loss = engine.apply(Mistaken, *inputs).sum()
    with pytest.raises(errors.GraphError, match="Mistaken"):
        loss.backward()
    assert p.grad is None and q.grad is None


@pytest.mark.parametrize("leaf", [True, False], ids=["parameters", "inner"])
@pytest.mark.parametrize("shape", [(2, 2), (1, 2)])
def test_a_backward_that_forgot_the_tuple_is_named(leaf, shape, device):
    class Mistaken(engine.Op):
        def forward(self, x):
            return x * 2.0

        def backward(self, dy):
            return dy * 2.0

    p = parameter(np.ones(shape))
    loss = engine.apply(Mistaken, p if leaf else p * 2.0).sum()
    with pytest.raises(errors.GraphError, match="Mistaken"):
        loss.backward()
    assert p.grad is None


def test_a_second_backward_is_refused_and_leaves_gradients_alone(device):
    p, q = parameter([1.0, 2.0]), parameter([1.0, 1.0])
    shared = p * p
    first, second = shared.sum(), (shared * q).sum()
    first.backward()
    for loss in (first, second):
        with pytest.raises(errors.GraphError, match="earlier backward.*forward pass again"):
            loss.backward()
    np.testing.assert_array_equal(fetch(p.grad), [2.0, 4.0])
    assert q.grad is None


def test_losses_added_first_walk_a_shared_part_once(device):
    p = parameter([1.0, 2.0])
    shared = p * p
    (shared.sum() + (shared * 3.0).sum()).backward()
    np.testing.assert_array_equal(fetch(p.grad), [8.0, 16.0])


def test_what_has_no_graph_is_refused(device):
    p = parameter([1.0, 2.0])
    with no_grad():
        unrecorded = (p * p).sum()
    for loss in (Tensor(place(1.0)), unrecorded, Parameter(place(1.0), trainable=False)):
        with pytest.raises(errors.GraphError, match="trainable"):
            loss.backward()


@pytest.mark.parametrize("shape", [(2,), (2, 2), (0,)])
def test_more_than_a_scalar_needs_a_cotangent(shape, device):
    p = parameter(np.ones(shape))
    with pytest.raises(errors.GraphError, match=r"scalar.*mean\(\).*gradient="):
        (p * 2.0).backward()
    assert p.grad is None


COTANGENTS = {
    "shape": (lambda: place([1.0]), errors.ShapeError, r"\(2,\).*\(1,\)"),
    "ndim": (lambda: place(np.ones((1, 2))), errors.ShapeError, r"\(2,\).*\(1, 2\)"),
    "dtype": (lambda: place([1.0, 1.0], "float32"), errors.DTypeError, "float64.*float32"),
    "integers": (lambda: place([1, 1]), errors.DTypeError, "float64.*int64"),
    "list": (lambda: [1.0, 1.0], errors.DTypeError, "list"),
    "number": (lambda: 1.0, errors.DTypeError, "float"),
}


@pytest.mark.parametrize("mistake", COTANGENTS)
def test_a_cotangent_that_does_not_fit(mistake, device):
    make, error, words = COTANGENTS[mistake]
    p = parameter([1.0, 2.0])
    y = p * 2.0
    with pytest.raises(error, match=words):
        y.backward(gradient=make())
    with pytest.raises(error, match=words):
        p.backward(gradient=make())
    assert p.grad is None
    y.backward(gradient=place([1.0, 1.0]))  # the graph is still there
    np.testing.assert_array_equal(fetch(p.grad), [2.0, 2.0])


@pytest.mark.parametrize("device", ["standin"], indirect=True)
def test_a_cotangent_on_another_device(device):
    p = parameter([1.0, 2.0])
    with pytest.raises(errors.DeviceError, match="standin.*cpu"):
        (p * 2.0).backward(gradient=np.ones(2))
    assert p.grad is None


# -- memory ------------------------------------------------------------------------------------------------------------


def test_an_activation_dies_with_its_last_name(device):
    p = parameter(np.ones(100))
    with no_collector():
        x = p * 2.0
        activation = weakref.ref(x.data)
        y = x + 1.0  # keeps nothing
        assert activation() is not None
        del x
        assert activation() is None
    y.sum().backward()


def test_a_frozen_network_keeps_no_activation(device):
    with no_collector():
        h = Parameter(place(np.ones((3, 3))), trainable=False)
        activations = []
        for op in (ops.exp, ops.tanh, ops.softmax, ops.gelu, lambda x: x @ x):
            h = op(h)
            activations.append(weakref.ref(h.data))
        assert [a() is None for a in activations] == [True, True, True, True, False]


def test_a_graph_dropped_without_backward_is_freed_at_once(device):
    p = parameter(np.ones(100))
    with no_collector():
        h, watched = p, []
        for _ in range(5):
            h = ops.exp(h * 0.1)
            watched += [weakref.ref(h.node), weakref.ref(h.data)]
        del h
        assert [w() for w in watched] == [None] * 10


class Probe(engine.Op):
    """y = x; its backward reports."""

    def forward(self, x):
        return x * 1.0

    def backward(self, dy):
        self.report()
        return (dy,)


def test_kept_arrays_die_one_by_one_during_backward(device):
    p = parameter(np.ones(100))
    kept, alive = [], []
    with no_collector():
        h = p
        for _ in range(4):
            h = engine.apply(Probe, h, report=lambda: alive.append([a() is not None for a in kept]))
            h = ops.exp(h * 0.1)
            kept.append(weakref.ref(h.data))
        loss = h.sum()
        del h
        loss.backward()
        assert alive == [[True] * i + [False] * (4 - i) for i in (3, 2, 1, 0)]


def test_memory_falls_during_backward():
    megabyte = 2**20
    p = Parameter(np.ones(megabyte // 8))
    tracemalloc.start()
    try:
        h = p
        for _ in range(12):
            h = ops.exp(h * 0.01)
        loss = h.sum()
        del h
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        loss.backward()
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held > 11.9 * megabyte
    assert peak - held < 4 * megabyte, "gradients must not pile up"
    assert left < 1.1 * megabyte, "only the parameter's gradient may stay"


def test_a_used_graph_holds_nothing(device):
    p = parameter(np.ones(100))
    with no_collector():
        h = ops.exp(p)
        kept = weakref.ref(h.data)
        y = h * h
        loss = y.sum()
        del h
        loss.backward()
        assert kept() is None and loss.node.saved == () and y.node.sources is None


LONG = 50_000


def chain(p, length):
    h = p
    for _ in range(length):
        h = h + 1.0
    return h


def test_a_long_chain_is_walked():
    p = Parameter(np.array(1.0))
    chain(p, LONG).backward()
    assert p.grad == 1.0


def test_a_long_chain_is_dropped():
    h = chain(Parameter(np.array(1.0)), LONG)
    last = weakref.ref(h.node)
    del h
    assert last() is None


def test_every_operation_is_walked_once():
    calls = []

    class Counted(ops.Add):
        def backward(self, dy):
            calls.append(self.order)
            return super().backward(dy)

    p = Parameter(np.array(1.0))
    h = p
    for _ in range(60):  # 2^60 paths
        h = engine.apply(Counted, h, h)
    h.backward()
    assert p.grad == 2.0**60
    assert len(calls) == 60 and calls == sorted(calls, reverse=True)


# -- the ledger --------------------------------------------------------------------------------------------------------


def test_ledger_rows_and_total(device):
    p = parameter(np.ones((4, 3)), "float32")
    x = Tensor(place(np.ones((5, 3)), "float32"))
    h = ops.tanh(ops.linear(x, p))
    loss = h.mean()
    book = engine.ledger(loss)
    assert [(row.op, row.shape, row.kept, row.nbytes) for row in book.rows] == [
        ("Linear", (5, 4), (((5, 3), "float32"),), 60),
        ("Tanh", (5, 4), (((5, 4), "float32"),), 80),
        ("Mean", (), (), 0),
    ]
    assert book.nbytes == 140
    lines = str(book).splitlines()
    assert len(lines) == 5 and lines[0].split()[:2] == ["op", "output"]
    assert lines[2].split()[0] == "Tanh" and lines[2].endswith("80") and lines[4].split() == ["total", "140"]
    loss.backward()  # looking changed nothing
    assert p.grad is not None and engine.ledger(loss).nbytes == 0


def test_ledger_counts_an_array_once_and_parameters_not_at_all(device):
    p = parameter(np.ones(10))
    x = ops.exp(p)  # keeps its output
    y = x * x  # keeps it twice more
    z = y * p  # keeps y, and the parameter for free
    assert [row.nbytes for row in engine.ledger(z).rows] == [80, 0, 80]
    assert engine.ledger(z).nbytes == 160


def test_ledger_counts_what_a_view_holds(device):
    p = parameter(np.ones(1000))
    x = p * 1.0
    few = x[:2]
    loss = (few * few).sum() + (x * x).sum()
    assert engine.ledger(loss).nbytes == 8000


def test_ledger_agrees_with_the_memory_held():
    p = Parameter(np.ones((100, 64)))
    W = Parameter(np.ones((64, 64)))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        h = p
        for _ in range(10):
            h = ops.gelu(ops.linear(h, W))
        loss = h.sum()
        del h
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    held = engine.ledger(loss).nbytes
    assert held == 8 * 100 * 64 * 19  # each input but the parameter itself
    assert held <= after - before < 1.02 * held


def test_ledger_of_what_has_no_graph(device):
    book = engine.ledger(Tensor(place([1.0])))
    assert book.rows == () and book.nbytes == 0 and len(str(book).splitlines()) == 2


@pytest.mark.parametrize("device", ["standin"], indirect=True)
def test_forward_and_backward_wait_for_nothing(device):
    rng = np.random.default_rng(0)
    model = minilora.nn.Sequential(lora.Linear(6, 5, r=2, lora_alpha=4, rng=rng), minilora.nn.GELU(),
                                   minilora.nn.Linear(5, 3, rng=rng))
    x, t = (Tensor(place(rng.standard_normal(s), "float32")) for s in ((7, 6), (7, 3)))
    with standin.capturing(), standin.counting() as counts:
        ops.mse(model(x), t).backward()
    assert counts.launches > 0 and counts.syncs == counts.d2h == counts.h2d == 0
