"""Applying an operation: what is recorded, what is refused, and for how long."""
import asyncio
import threading

import numpy as np
import pytest
import standin
from conftest import fetch, place

import minilora
from minilora import Parameter, Tensor, backend, engine, errors, no_grad, ops


class Twice(engine.Op):
    """y = 2 x, by a setting."""

    factor = 2.0

    def forward(self, x):
        return x * self.factor

    def backward(self, dy):
        return (dy * self.factor,)


# -- what is recorded --------------------------------------------------------------------------------------------------


def test_only_what_depends_on_a_trainable_parameter_is_recorded(device):
    trained, frozen = Parameter(place([1.0, 2.0])), Parameter(place([1.0, 2.0]), trainable=False)
    assert (frozen * 2.0 + Tensor(place([1.0, 1.0]))).node is None
    y = frozen * trained
    assert type(y.node).__name__ == "Mul" and list(y.node.needs) == [False, True]
    assert (y.detach() * 3.0).node is None


def test_a_frozen_layer_below_the_first_trained_one_keeps_nothing(device):
    rng = np.random.default_rng(0)
    below, above = minilora.nn.Linear(4, 5, rng=rng), minilora.nn.Linear(5, 2, rng=rng)
    below.requires_grad(False)
    hidden = ops.relu(below(Tensor(place(np.ones((3, 4)), "float32"))))
    assert hidden.node is None
    assert [row[0] for row in engine.ledger(above(hidden)).rows] == ["Linear"]


def test_a_frozen_layer_above_keeps_its_weight_but_not_its_input(device):
    """The weight is a parameter's own array, so that it costs nothing."""
    rng = np.random.default_rng(0)
    below, above = minilora.nn.Linear(4, 5, rng=rng), minilora.nn.Linear(5, 2, rng=rng)
    above.requires_grad(False)
    y = above(below(Tensor(place(np.ones((3, 4)), "float32"))))
    assert [(row.op, row.nbytes) for row in engine.ledger(y).rows] == [("Linear", 3 * 4 * 4), ("Linear", 0)]
    y.sum().backward()
    assert above.weight.grad is None and above.bias.grad is None and below.weight.grad is not None


def test_settings_become_attributes(device):
    p = Parameter(place([1.0, 2.0]))
    y = engine.apply(Twice, p, factor=-3.0)
    assert y.node.factor == -3.0 and Twice.factor == 2.0
    y.backward(place([1.0, 1.0]))
    np.testing.assert_array_equal(fetch(p.grad), [-3.0, -3.0])


def test_creation_numbers_rise():
    p = Parameter(np.ones(2))
    a = p * 2.0
    assert a.node.order < (a + p).node.order


def test_scalars_become_0d_arrays_of_the_device(device):
    y = Tensor(place([1.0, 2.0], "float32")).sum()
    assert type(y.data) is backend.current_device().array_type and y.shape == () and y.dtype == "float32"


@pytest.mark.parametrize("unfinished", ["forward", "backward"])
def test_an_operation_without_a_half_says_what_to_define(unfinished):
    half = {"forward": "backward", "backward": "forward"}[unfinished]
    broken = type("Broken", (engine.Op,), {half: getattr(Twice, half), "factor": 2.0})
    with pytest.raises(TypeError, match=f"Broken has no {unfinished}: define {unfinished}"):
        engine.apply(broken, Parameter(np.ones(2))).sum().backward()


# -- no_grad -----------------------------------------------------------------------------------------------------------


def test_no_grad_nests_and_is_restored_after_an_exception():
    p = Parameter(np.ones(2))
    with no_grad():
        with no_grad():
            assert not engine.is_recording()
        assert not engine.is_recording() and (p * 2.0).node is None
    assert engine.is_recording()
    with pytest.raises(ZeroDivisionError), no_grad():
        1 / 0
    assert engine.is_recording()


def test_one_no_grad_object_used_again_inside_itself():
    switch = no_grad()
    with switch:
        with switch:
            pass
        assert not engine.is_recording()
    assert engine.is_recording()


def test_no_grad_as_a_decorator():
    @no_grad()
    def predict(p, depth=2):
        """Predict."""
        return predict(p, depth - 1) if depth else p * 2.0

    p = Parameter(np.ones(2))
    for _ in range(2):
        assert predict(p).node is None
        assert engine.is_recording()
    assert (predict.__name__, predict.__doc__) == ("predict", "Predict.")


def test_no_grad_holds_in_its_own_thread_only():
    seen = []
    with no_grad():
        thread = threading.Thread(target=lambda: seen.append(engine.is_recording()))
        thread.start()
        thread.join()
    assert seen == [True]


def test_threads_build_and_walk_graphs_side_by_side():
    results = {}

    def work(number):
        p = Parameter(np.full(3, float(number)))
        for _ in range(50):
            h = p
            for _ in range(10):
                h = h + p * p
            h.sum().backward()
        results[number] = p.grad

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(1, 4):
        np.testing.assert_array_equal(results[number], 50 * (1 + 20.0 * number))


# -- what is refused ---------------------------------------------------------------------------------------------------

TWO_INPUTS = {
    "Add": ops.add, "Sub": ops.sub, "Mul": ops.mul, "Div": ops.div, "MatMul": ops.matmul, "Linear": ops.linear,
    "MSE": ops.mse, "Concatenate": lambda a, b: ops.concatenate([a, b]),
    "LoRALinear": lambda a, b: minilora.lora.lora_linear(a, a, None, a, b, 1.0),
}


@pytest.mark.parametrize("name", TWO_INPUTS)
def test_mixing_devices_names_the_operation_and_both_devices(name):
    standin.register()
    host = Tensor(np.ones((2, 2)))
    with backend.use("standin"):
        other = Parameter(place(np.ones((2, 2))))
    for a, b in [(host, other), (other, host), (other.data, host), (other, host.data)]:
        with pytest.raises(errors.DeviceError) as caught:
            TWO_INPUTS[name](a, b)
        for word in (name, "on the cpu", "on the standin", "to_device"):
            assert word in str(caught.value)
    backend.unregister_device("standin")


@pytest.mark.parametrize("name", TWO_INPUTS)
def test_mixing_dtypes_names_the_operation_and_both_dtypes(name, device):
    single, double = Parameter(place(np.ones((2, 2)), "float32")), Tensor(place(np.ones((2, 2))))
    for a, b in [(single, double), (double, single), (single, double.data)]:
        with pytest.raises(errors.DTypeError) as caught:
            TWO_INPUTS[name](a, b)
        for word in (name, "float32", "float64", "astype"):
            assert word in str(caught.value)


@pytest.mark.parametrize("value", [2j, np.complex64(2j), "2", [2.0], object(), np.str_("2")],
                         ids=lambda value: type(value).__name__)
def test_what_is_no_array_is_refused_by_name(value, device):
    x = Tensor(place([1.0, 2.0]))
    cure = "" if isinstance(value, str) or type(value) is object else ".*minilora.tensor"  # text makes no tensor either
    for op in (ops.add, ops.mul):
        for a, b in [(x, value), (value, x)]:
            with pytest.raises(errors.DTypeError, match=f"{type(value).__name__}{cure}"):
                op(a, b)


def test_only_numbers_is_refused():
    with pytest.raises(errors.DTypeError, match="Add got no array, only int, float"):
        ops.add(1, 2.0)


SHAPES = {
    "add": lambda x: x + Tensor(place(np.ones(4))),
    "matmul of batches": lambda x: ops.matmul(Tensor(place(np.ones((2, 3, 3)))), Tensor(place(np.ones((4, 3, 3))))),
    "matmul inner": lambda x: x @ x,
    "matmul of a vector": lambda x: x @ Tensor(place(np.ones(4))),
    "linear": lambda x: ops.linear(x, Tensor(place(np.ones((2, 2))))),
    "linear bias": lambda x: ops.linear(x, x, Tensor(place(np.ones(3)))),
    "mse": lambda x: ops.mse(x, Tensor(place(np.ones(2)))),
    "mse of nothing": lambda x: ops.mse(x[:0], x[:0]),
    "mean of nothing": lambda x: x[:0].mean(),
    "mean of nothing along an axis": lambda x: x[:0].mean(axis=0),
    "reshape": lambda x: x.reshape(4, 2),
    "transpose": lambda x: x.transpose(0, 0),
    "concatenate": lambda x: ops.concatenate([x, Tensor(place(np.ones((2, 4))))]),
    "concatenate nothing": lambda x: ops.concatenate([]),
    "concatenate 0-d": lambda x: ops.concatenate([x.sum(), x.sum()]),
    "sum axis": lambda x: x.sum(axis=5),
    "mean axis": lambda x: x.mean(axis=5),
    "mean axis twice": lambda x: x.mean(axis=(0, 0)),
    "softmax axis": lambda x: ops.softmax(x, axis=5),
    "log_softmax axis": lambda x: ops.log_softmax(x, axis=-3),
}


@pytest.mark.parametrize("mistake", SHAPES)
def test_a_shape_that_does_not_fit_is_a_shape_error(mistake, device):
    with pytest.raises(errors.ShapeError):
        SHAPES[mistake](Tensor(place(np.ones((2, 3)))))


NO_ARRAYS = {
    "matmul": lambda x: x @ 3.0, "matmul list": lambda x: x @ [1.0], "linear": lambda x: ops.linear([[1.0]], x),
    "mse": lambda x: ops.mse(x, 1.0), "concatenate": lambda x: ops.concatenate([x, [1.0]]),
    "add None": lambda x: x + None,
    "pow tensor": lambda x: x ** x, "pow complex": lambda x: x ** 2j,
}


@pytest.mark.parametrize("mistake", NO_ARRAYS)
def test_an_argument_of_another_type_is_a_dtype_error(mistake):
    with pytest.raises(errors.DTypeError):
        NO_ARRAYS[mistake](Tensor(np.ones((2, 2))))


def test_an_operation_refused_leaves_the_graph_as_it_was(device):
    p = Parameter(place(np.ones((2, 3))))
    y = p * 2.0
    for mistake in (lambda: y @ y, lambda: y + Tensor(place(np.ones((2, 3)), "float32"))):
        with pytest.raises(errors.MiniloraError):
            mistake()
    y.sum().backward()
    np.testing.assert_array_equal(fetch(p.grad), np.full((2, 3), 2.0))


# -- no_grad around what runs in pieces --------------------------------------------------------------------------------


def test_no_grad_on_a_generator_covers_its_body_and_nothing_between(device):
    p = Parameter(place([1.0, 2.0]))
    ended = []

    @no_grad()
    def batches(n):
        """Batches."""
        try:
            for _ in range(n):
                sent = yield (p * 2.0).node
                assert not engine.is_recording()
                if sent is not None:
                    yield (sent * 2.0).node
            return (p * 3.0).node
        finally:
            ended.append(engine.is_recording())

    def outer():
        ended.append((yield from batches(2)))

    assert batches.__name__ == "batches" and batches.__doc__ == "Batches."
    for node in outer():
        assert node is None and engine.is_recording() and (p * 2.0).node is not None
    assert ended == [False, None]
    talking = batches(2)
    assert next(talking) is None and talking.send(p) is None and engine.is_recording()
    talking.close()
    with pytest.raises(ZeroDivisionError):
        failing = batches(1)
        next(failing)
        failing.throw(ZeroDivisionError())
    assert ended == [False, None, False, False] and engine.is_recording()


def test_a_generator_under_no_grad_may_be_read_under_no_grad_and_hold_one():
    p = Parameter(np.ones(2))

    @no_grad()
    def items():
        with no_grad():
            yield p * 2.0
        yield p * 2.0

    with no_grad():
        kept = items()
        next(kept)
        assert not engine.is_recording()
    assert engine.is_recording()
    assert next(kept).node is None and engine.is_recording()


def test_no_grad_on_a_coroutine_covers_its_body_and_nothing_beside(device):
    p = Parameter(place([1.0]))
    seen = []

    @no_grad()
    async def predict():
        first = (p * 2.0).node
        await asyncio.sleep(0)
        return first, (p * 2.0).node, engine.is_recording()

    async def beside():
        for _ in range(3):
            seen.append(engine.is_recording())
            await asyncio.sleep(0)

    async def both():
        return (await asyncio.gather(predict(), beside()))[0]

    assert asyncio.run(both()) == (None, None, False)
    assert seen == [True] * 3 and engine.is_recording()


def test_no_grad_on_an_asynchronous_generator_is_refused():
    with pytest.raises(errors.ConfigError, match="items.*with no_grad"):
        @no_grad()
        async def items():
            yield 1.0
