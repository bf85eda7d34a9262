"""Loops over the table of operations: what holds for every one of them, on every device."""
import importlib
import itertools
from pathlib import Path

import numpy as np
import pytest
from cases import AFFINE, ANY, CASES, EQUAL, FILLED, LOW_RANK, PAIR, PRODUCT
from conftest import PROOF, fetch, place, shares
from hypothesis import given
from hypothesis import strategies as st

from minilora import Parameter, Tensor, backend, engine, lora, ops, testing, versions
from minilora.half import in_single
from minilora.ops.elementwise import unbroadcast
from minilora.optim.adam import adam_update
from minilora.quant.halves import widened

ROWS = [pytest.param(case, id=case.name) for case in CASES]
DRAWN = [pytest.param(case, id=case.name) for case in CASES if case.drawn is not None]
EVERY = pytest.mark.parametrize("case", ROWS)


def generator(case):
    return np.random.default_rng(sum(map(ord, case.name)))


def tolerance(arrays, dtype):
    """Rounding of a sum of so many numbers of size 1, and of a few function values."""
    return 4 * (4 + max([a.size for a in arrays], default=0)) * float(np.finfo(dtype).eps)


def assert_near(got, expected, tol):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    scale = max(1.0, float(abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(got.astype(np.float64), expected, rtol=0, atol=tol * scale)


def applied(case, arrays, needs=None):
    """The parameters, of which those with `needs` are trainable, and the output."""
    needs = [True] * len(arrays) if needs is None else needs
    parameters = [Parameter(a, trainable=n) for a, n in zip(arrays, needs)]
    return parameters, case.call(*parameters)


def gradients(case, arrays, dy, needs=None):
    parameters, y = applied(case, arrays, needs)
    y.backward(dy)
    return [None if p.grad is None else fetch(p.grad) for p in parameters]


def fresh(case, arrays, y, needs=None):
    """The node of `y`; of an operation that can be used once, that of another application."""
    return applied(case, arrays, needs)[1].node if case.once else y.node


def cotangent(case, arrays, rng, dtype=np.float64):
    return np.asarray(rng.standard_normal(case.formula(*arrays).shape), dtype)


@pytest.fixture
def references():
    """Switch the overrides off."""
    with backend.use(backend.current_device().name, kernels=False):
        yield


# -- the table ---------------------------------------------------------------------------------------------------------


def operations(module):
    return {value for name in module.__all__ if isinstance(value := getattr(module, name), type)
            and issubclass(value, engine.Op)}


def test_every_operation_has_a_row():
    folder = Path(lora.__path__[0])
    rooms = [importlib.import_module(f"minilora.lora.{'.'.join(path.relative_to(folder).with_suffix('').parts)}")
             for path in folder.rglob("[a-z]*.py")]
    public = [ops, *(room for room in rooms if hasattr(room, "__all__"))]
    assert set().union(*map(operations, public)) == {case.op for case in CASES}


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


# -- values ------------------------------------------------------------------------------------------------------------


@PROOF
@EVERY
def test_value_and_dtype(case, device):
    for dtype in ("float64", "float32", "float16"):
        arrays = case.inputs(generator(case), dtype)
        _, y = applied(case, [place(a) for a in arrays])
        assert (y.dtype, y.device.name) == (dtype, device)
        assert_near(fetch(y), case.formula(*[a.astype(np.float64) for a in arrays]), tolerance(arrays, dtype))


@PROOF
@EVERY
def test_gradients_keep_the_dtype(case, device):
    for dtype in ("float32", "float16"):
        rng = generator(case)
        arrays = case.inputs(rng, dtype)
        dy = cotangent(case, arrays, rng, dtype)
        exact = gradients(case, [place(a, "float64") for a in arrays], place(dy, "float64"))
        for dx, expected in zip(gradients(case, [place(a) for a in arrays], place(dy)), exact):
            assert dx.dtype == dtype
            assert_near(dx, expected, 4 * tolerance(arrays, dtype))


def exact_gradients(case, xs, dy):
    """Where the formula is affine in an input, the derivative is the difference that a step of 1 makes."""
    y = case.formula(*xs)
    for i, x in enumerate(xs):
        dx = np.zeros(x.shape, np.int64)
        for index in np.ndindex(x.shape):
            step = np.zeros_like(x)
            step[index] = 1
            dx[index] = (dy * (case.formula(*xs[:i], x + step, *xs[i + 1:]) - y)).sum()
        yield dx


@PROOF
@pytest.mark.parametrize("case", [row for row in ROWS if row.values[0].affine])
def test_integers_give_exact_gradients(case, device):
    rng = generator(case)
    xs = [rng.integers(-3, 4, shape) for shape in case.shapes]
    y = case.formula(*xs)
    dy = rng.integers(-3, 4, y.shape)
    expected = list(exact_gradients(case, xs, dy))
    for dtype in ("float64", "float32"):
        parameters, result = applied(case, [place(x, dtype) for x in xs])
        np.testing.assert_array_equal(fetch(result), y)
        result.backward(place(dy, dtype))
        for parameter, dx in zip(parameters, expected):
            np.testing.assert_array_equal(fetch(parameter.grad), dx)


# -- gradients ---------------------------------------------------------------------------------------------------------


@PROOF
@EVERY
def test_gradcheck(case, device, references):
    rng = generator(case)
    inputs = [place(a) for a in case.inputs(rng)]
    report = testing.gradcheck(case.call, *inputs, mode="complex" if case.analytic else "central", rng=rng)
    assert report.passed, str(report)


def slope(case, arrays, directions):
    """The derivative of the output along `directions`, by the forward pass alone."""
    def forward(step):
        moved = [Tensor(place(a + step * v)) for a, v in zip(arrays, directions)]
        return fetch(case.call(*moved))
    if case.analytic:
        return forward(1e-30j).imag / 1e-30
    return (forward(1e-6) - forward(-1e-6)) / 2e-6


LAYOUTS = {
    "C": lambda a: place(a),
    "transposed": lambda a: place(a.T.copy(order="C")).T,
    "reversed": lambda a: place(a[..., ::-1])[..., ::-1] if a.ndim else place(a),
    "gaps": lambda a: place(np.repeat(a, 2, axis=-1))[..., ::2] if a.ndim else place(a),
    "offset": lambda a: place(np.stack([a, a]))[1:].reshape(a.shape),
}


@PROOF
@pytest.mark.parametrize("case", DRAWN)
@given(data=st.data())
def test_drawn_shapes_and_strides(case, device, references, data):
    shapes = data.draw(case.drawn)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    layouts = [data.draw(st.sampled_from(sorted(LAYOUTS))) for _ in shapes]
    arrays = case.inputs(rng, shapes=shapes)
    inputs = [LAYOUTS[layout](a) for layout, a in zip(layouts, arrays)]
    parameters, y = applied(case, inputs)
    assert_near(fetch(y), case.formula(*arrays), tolerance(arrays, "float64"))
    dy = cotangent(case, arrays, rng)
    y.backward(place(dy))
    directions = [rng.standard_normal(a.shape) for a in arrays]
    along = sum((fetch(p.grad) * v).sum() for p, v in zip(parameters, directions))
    expected = (dy * slope(case, arrays, directions)).sum()
    scale = 1 + sum(float((abs(fetch(p.grad)) * abs(v)).sum()) for p, v in zip(parameters, directions))
    assert abs(along - expected) <= (1e-12 if case.analytic else 1e-7) * scale


@given(shapes=PAIR, seed=st.integers(0, 2**32 - 1))
def test_unbroadcast_sums_over_the_copies(device, shapes, seed):
    shape, wide = shapes[0], np.broadcast_shapes(*shapes)
    dy = np.random.default_rng(seed).integers(-9, 10, wide).astype(float)
    expected = np.zeros(shape)
    origins = np.broadcast_to(np.arange(expected.size).reshape(shape), wide)
    for origin, value in zip(origins.flat, dy.flat):
        expected.flat[origin] += value
    np.testing.assert_array_equal(fetch(unbroadcast(place(dy), shape)), expected)


@PROOF
@EVERY
def test_every_subset_of_needs(case, device):
    """Frozen inputs get no gradient, and the others the same as if all were trained."""
    rng = generator(case)
    hosts = case.inputs(rng)
    arrays, dy = [place(a) for a in hosts], place(cotangent(case, hosts, rng))
    full = gradients(case, arrays, dy)
    for needs in itertools.product([True, False], repeat=len(arrays)):
        parameters, y = applied(case, arrays, needs)
        if not any(needs):
            assert y.node is None
            continue
        returned = fresh(case, arrays, y, needs).backward(dy)
        for wanted, dx in zip(y.node.needs, returned):
            assert wanted or dx is None or case.op in (ops.Concatenate, ops.Stack)  # slices of dy
        y.backward(dy)
        for needed, parameter, expected in zip(needs, parameters, full):
            if needed:
                assert_near(fetch(parameter.grad), expected, 1e-14 * len(hosts))
            else:
                assert parameter.grad is None


@PROOF
@EVERY
def test_bytes_kept_for_backward(case, device, references):
    arrays = [place(a) for a in case.inputs(generator(case), "float32")]
    for needs in itertools.product([True, False], repeat=len(arrays)):
        if not any(needs):
            continue
        # Parameters' own arrays and views of them are free, so the inputs here are new arrays of an op that keeps nothing.
        inputs = [ops.neg(Parameter(-a)) if n else Tensor(a) for a, n in zip(arrays, needs)]
        y = case.call(*inputs)
        assert type(y.node) is case.op
        assert engine.ledger(y).nbytes == 4 * case.kept(needs, *arrays, y.data), needs


# -- purity ------------------------------------------------------------------------------------------------------------

COTANGENTS = {
    "C": lambda dy: place(dy),
    "transposed": lambda dy: place(dy.T.copy(order="C")).T,
    "one number": lambda dy: backend.current_device().xp.broadcast_to(place(1.5), dy.shape),  # read-only on the CPU
}


@PROOF
@EVERY
def test_pure(case, device):
    """No input, no output and no dy changes; no gradient shares memory, unless with dy; twice gives the same bits."""
    rng = generator(case)
    hosts = case.inputs(rng)
    arrays = [place(a) for a in hosts]
    if device == "cpu":
        for a in arrays:
            a.flags.writeable = False
    _, y = applied(case, arrays)
    value = fetch(y).tobytes()

    assert case.view or not any(shares(y.data, a) for a in arrays)
    host_dy = cotangent(case, hosts, rng)
    for name, layout in COTANGENTS.items():
        dy = layout(host_dy)
        before = fetch(dy).tobytes()
        first, second = ([dx for dx in fresh(case, arrays, y).backward(dy) if dx is not None] for _ in range(2))
        assert [fetch(dx).tobytes() for dx in first] == [fetch(dx).tobytes() for dx in second]
        expected = gradients(case, arrays, place(fetch(dy)))
        for dx, full in zip(first, expected):
            assert_near(fetch(dx), full, 1e-14 * (1 + len(hosts)))
        for one, other in itertools.combinations(first, 2):
            assert not shares(one, other) or shares(one, dy) and shares(other, dy), name
        for dx in first:
            assert not any(shares(dx, kept) for kept in (*arrays, y.data)), name
        assert fetch(dy).tobytes() == before
    assert [fetch(a).tobytes() for a in arrays] == [a.tobytes() for a in hosts]
    assert fetch(y).tobytes() == value


@PROOF
@EVERY
def test_backward_is_linear_in_dy(case, device):
    """Factors that are powers of two do not round, so that equality is exact; a zero dy gives zeros."""
    rng = generator(case)
    hosts = case.inputs(rng)
    arrays, dy = [place(a) for a in hosts], cotangent(case, hosts, rng)
    once, fourfold, nothing = (gradients(case, arrays, place(c * dy)) for c in (1.0, -4.0, 0.0))
    for dx, dx4, dx0 in zip(once, fourfold, nothing):
        np.testing.assert_array_equal(dx4, -4.0 * dx)
        assert not dx0.any()


# -- devices -----------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("device", ["standin"], indirect=True)
def test_stand_in_equals_numpy(case, device, references):
    """So what is proved of these dtypes on NumPy's arrays alone is true on a device's."""
    for dtype in ("float64", "float32", "float16"):
        rng = generator(case)
        hosts = case.inputs(rng, dtype)
        dy = cotangent(case, hosts, rng, dtype)
        results = []
        for name in ("cpu", "standin"):
            with backend.use(name):
                arrays = [place(a) for a in hosts]
                results.append([fetch(applied(case, arrays)[1]), *gradients(case, arrays, place(dy))])
        for on_cpu, on_standin in zip(*results):
            if case.products:
                assert_near(on_standin, on_cpu, tolerance(hosts, dtype))
            else:
                np.testing.assert_array_equal(on_standin, on_cpu, strict=True)


OVERRIDES = versions.load("cpu")
LARGE = {  # more than a block of 2^17 elements, and no multiple of it
    ANY: [((3, 70001),), ((5, 7, 11),)], FILLED: [((701, 301),), ((3, 5, 7),)],
    PAIR: [((701, 301), (701, 301)), ((701, 301), (301,)), ((701, 1), (1, 301))], EQUAL: [((701, 301), (701, 301))],
    PRODUCT: [((65, 70), (70, 33))], AFFINE: [((1001, 64), (48, 64), (48,)), ((3, 5000, 16), (32, 16), (32,))],
    LOW_RANK: [((1001, 64), (48, 64), (48,), (4, 64), (48, 4)), ((3, 5000, 16), (32, 16), (32,), (2, 16), (32, 2))],
}


def check_operation(reference, dtype, monkeypatch):
    rows = [(case, shapes) for case in CASES if case.op is reference
            for shapes in [case.shapes, *LARGE.get(case.drawn, [])]]
    for case, shapes in rows:
        rng = generator(case)
        arrays = case.inputs(rng, dtype, shapes)
        shape = case.call(*map(Tensor, arrays)).shape
        some = np.asarray(rng.standard_normal(shape), dtype)
        cotangents = [some, some.T.copy().T, np.broadcast_to(np.asarray(0.5, dtype), shape)]
        results = []
        for versions_used in (OVERRIDES, {reference: reference}):
            with monkeypatch.context() as patch:
                patch.setattr(backend.cpu, "versions", versions_used)
                _, y = applied(case, arrays)
                used = versions_used[reference]
                assert type(y.node) is (in_single(used) if dtype == "float16" else used)
                results.append([y.data, *(dx for dy in cotangents for dx in gradients(case, arrays, dy))])
        for fast, slow in zip(*results):
            assert fast.dtype == dtype
            assert_near(fast, slow.astype(np.float64), 512 * float(np.finfo(dtype).eps))


@EVERY
def test_kernels_off_gives_the_same_numbers(case):
    """The switch itself, over the whole table: what ran, and what came out."""
    rng = generator(case)
    arrays = case.inputs(rng, "float32")
    dy = cotangent(case, arrays, rng, "float32")
    results = []
    for kernels in (True, False):
        with backend.use("cpu", kernels=kernels):
            _, y = applied(case, arrays)
            assert type(y.node) is (OVERRIDES.get(case.op, case.op) if kernels else case.op)
            assert kernels or not any(row.kernel for row in engine.ledger(y).rows)
            results.append([y.data, *gradients(case, arrays, dy)])
    for fast, slow in zip(*results):
        assert_near(fast, slow.astype(np.float64), 512 * float(np.finfo("float32").eps))


def adam_arguments(rng, n, dtype):
    theta, g, m, v = (rng.standard_normal(n).astype(dtype) for _ in range(4))
    for keep in (1.0, 0.99):
        yield [theta, g, m, v * v], [0.9, 0.999, 1e-2, 1e-8, keep]


FUNCTIONS = {adam_update: adam_arguments}  # reference: what makes its arguments, arrays and numbers
ELSEWHERE = {widened}  # compared in tests/kernels/test_cpu_halves.py, for every number there is


@pytest.mark.parametrize("reference", OVERRIDES.keys() - ELSEWHERE, ids=lambda reference: reference.__name__)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_override_equals_its_reference(reference, dtype, monkeypatch):
    if isinstance(reference, type):
        return check_operation(reference, dtype, monkeypatch)
    assert reference in FUNCTIONS, "a new override: say in FUNCTIONS what it is called with"
    for n in (0, 1, 1000, 2**18 + 3):
        for arrays, numbers in FUNCTIONS[reference](np.random.default_rng(n), n, dtype):
            slow, fast = [a.copy() for a in arrays], [a.copy() for a in arrays]
            reference(*slow, *numbers)
            OVERRIDES[reference](*fast, *numbers)
            for one, other in zip(fast, slow):
                assert one.dtype == dtype
                assert_near(one, other.astype(np.float64), 8 * float(np.finfo(dtype).eps))
