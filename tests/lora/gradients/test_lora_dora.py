"""DoRA's lengths and factors: other formulas, other oracles for the exact gradient, rows without a length, range, memory.

The table of operations (cases_dora.py) has the values and the complex-step gradients for small shapes.
"""
import tracemalloc

import numpy as np
import pytest
import standin
from conftest import PROOF, fetch, place
from hypothesis import given, strategies as st

import minilora
from minilora import Parameter, engine, ops, testing
from minilora.errors import ConfigError, DeviceError, DTypeError, ShapeError
from minilora.lora import lora_linear
from minilora.lora.gradients import dora

SHORTEST = {"float16": 2.0 ** -14, "float32": 2.0 ** -63, "float64": 2.0 ** -511}
EPS = {"float16": 2.0 ** -10, "float32": 2.0 ** -23, "float64": 2.0 ** -52}
dtypes = pytest.mark.parametrize("dtype", EPS)
both = pytest.mark.parametrize("exact", [False, True], ids=["detached", "exact"])
COUNTS = st.integers(1, 4)
SIZES = st.tuples(COUNTS, COUNTS, COUNTS, st.integers(1, 3))  # out / groups, n, r / groups, groups


def draw(out=4, n=6, r=2, groups=1, seed=0, dtype="float64"):
    """W, A, B and m."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in ((out, n), (r, n), (out, r // groups), (out,))]


def dense(W, A, B, s, groups=1):
    """V = W + s B A, part by part."""
    parts = zip(*(np.split(matrix, groups) for matrix in (W, A, B)))
    return np.concatenate([W_g + s * np.einsum("kj,ji->ki", B_g, A_g) for W_g, A_g, B_g in parts])


def placed(*arrays):
    return [place(a) for a in arrays]


def trained(*arrays):
    return [Parameter(a) for a in placed(*arrays)]


def composed(W, A, B, m, s):
    """The same from plain operations, with V as an array."""
    V = W + ops.matmul(B, A) * s
    return m / ops.sqrt((V * V).sum(axis=1))


def close(got, expected, rtol=1e-12):
    np.testing.assert_allclose(fetch(got), expected, rtol=0, atol=rtol * max(1.0, np.abs(expected).max(initial=0.0)))


# -- lengths and factors ------------------------------------------------------------------------------------------------


def transposed(array):
    return place(array.T.copy()).T


@pytest.mark.parametrize("layout", [place, transposed, lambda a: place(a[:, ::-1])[:, ::-1],
                                    lambda a: place(np.repeat(a, 2, 1))[:, ::2]], ids=["C", "transposed", "reversed", "gaps"])
@pytest.mark.parametrize("block", [1, 7, 1 << 17])
@PROOF
@given(sizes=SIZES, s=st.sampled_from([2.0, -0.5]), seed=st.integers(0, 99))
def test_lengths_by_blocks(device, layout, block, sizes, s, seed):
    """Every layout of W, every split into blocks, more than one group in a block or more than one block in a group."""
    out, n, r, groups = sizes
    W, A, B, m = draw(groups * out, n, groups * r, groups, seed)
    c = np.linalg.norm(dense(W, A, B, s, groups), axis=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dora, "BLOCK", block)
        close(dora.initial_magnitude(layout(W), place(A), place(B), s, groups), c)
        rho = dora.dora_scale(layout(W), *placed(A, B, m), s, groups)
    assert (np.abs(fetch(rho) - m / c) <= 1e-12 * np.abs(m / c) * (1 + 1 / c)).all()


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0, 2), (3, 2, 0), (0, 0, 0)])
@both
def test_nothing_of_something(device, shape, exact):
    W, A, B, m = draw(*shape)
    leaves = trained(W, A, B, m)
    rho = dora.dora_scale(*leaves, 0.5, exact=exact)
    expected = m / np.linalg.norm(W, axis=1) if shape[1] else np.ones(len(W))
    close(rho, expected)
    rho.sum().backward()
    for p in leaves[0 if exact else 3:]:
        assert p.grad.shape == p.shape


@pytest.mark.parametrize("layout", [place, transposed], ids=["C", "transposed"])
@dtypes
@pytest.mark.parametrize("s", [1.0, 0.3])
def test_factors_are_exactly_1_at_the_start(device, layout, dtype, s):
    for groups, (W, A, B, _) in [(1, draw(64, 48, 3, dtype=dtype)), (2, draw(6, 40, 4, 2, dtype=dtype))]:
        for update in (np.zeros_like(B), B):  # as adapters start, and loaded
            arrays = [layout(W), place(A), place(update)]
            m = dora.initial_magnitude(*arrays, s, groups)
            assert m.dtype == dtype and m.shape == (len(W),)
            np.testing.assert_array_equal(fetch(dora.dora_scale(*arrays, m, s, groups)), 1.0)


def test_initial_magnitude_is_an_array_of_its_own(device):
    W, A, B, _ = placed(*draw())
    one, two = dora.initial_magnitude(W, A, B, 1.0), dora.initial_magnitude(W, A, B, 1.0)
    two += 1.0
    assert (fetch(two) == fetch(one) + 1).all()


def test_digits_are_kept_where_the_update_nearly_cancels_the_weight(device):
    """D = -(1 - 2^-14) W: expanding the square would subtract numbers 2^28 times larger than what is left."""
    W, A, _, m = draw(8, 64, 8, dtype="float32")
    W, A = np.round(W * 16) / 16, np.eye(8, 64, dtype="float32")  # B A is exact
    W[:, 8:] = 0.0
    B = -(W[:, :8] * np.float32(1 - 2.0 ** -14))
    c = fetch(dora.initial_magnitude(*placed(W, A, B), 1.0))
    np.testing.assert_allclose(c, np.linalg.norm(W.astype(float), axis=1) * 2.0 ** -14, rtol=4 * EPS["float32"])


# -- the two readings of the gradient -----------------------------------------------------------------------------------


def test_detached_only_m_gets_a_gradient(device):
    W, A, B, m = draw(groups=2)
    leaves = trained(W, A, B, m)
    rho = dora.dora_scale(*leaves, 0.7, groups=2)
    drho = np.arange(1.0, 5.0)
    rho.backward(place(drho))
    assert [p.grad is None for p in leaves] == [True, True, True, False]
    close(leaves[3].grad, drho / np.linalg.norm(dense(W, A, B, 0.7, 2), axis=1))


def test_detached_nothing_is_remembered_but_for_m(device):
    W, A, B, m = trained(*draw())
    assert dora.dora_scale(W, A, B, m.detach(), 0.7).node is None
    assert dora.dora_scale(W, A, B, m.detach(), 0.7, exact=True).node is not None
    leaves = (W * 1.0, A * 1.0, B * 1.0)  # made by operations
    dora.dora_scale(*leaves, m, 0.7).sum().backward()
    assert W.grad is A.grad is B.grad is None and m.grad is not None


@pytest.mark.parametrize("frozen", [(), (0,), (0, 1), (0, 2), (0, 3), (0, 1, 2), (0, 2, 3)], ids=str)
def test_exact_gradient_as_composed_from_plain_operations(device, frozen):
    arrays = draw(seed=1)
    results = []
    for f in (lambda *leaves: dora.dora_scale(*leaves, 0.7, exact=True), lambda *leaves: composed(*leaves, 0.7)):
        leaves = [Parameter(a, trainable=i not in frozen) for i, a in enumerate(placed(*arrays))]
        rho = f(*leaves)
        rho.backward(place([0.5, -2.0, 1.0, 3.0]))
        results.append([fetch(a) for a in (rho, *(p.grad for p in leaves if p.grad is not None))])
        assert len(results[-1]) == 5 - len(frozen)
    for fused, plain in zip(*results):
        close(fused, plain)


@pytest.mark.parametrize("groups", [1, 2])
def test_exact_gradient_by_central_differences(device, groups):
    report = testing.gradcheck(lambda *xs: dora.dora_scale(*xs, 0.7, groups, exact=True), *placed(*draw(4, 5, 4, groups, 2)),
                               mode="central")
    assert report.passed, str(report)


def test_exact_gradient_of_groups_is_that_of_their_parts(device):
    arrays, drho = draw(6, 5, 6, groups=3, seed=3), np.arange(1.0, 7.0)
    whole = trained(*arrays)
    dora.dora_scale(*whole, 0.7, groups=3, exact=True).backward(place(drho))
    parts = [trained(*part) for part in zip(*(np.split(a, 3) for a in arrays))]
    for part, some in zip(parts, np.split(drho, 3)):
        dora.dora_scale(*part, 0.7, exact=True).backward(place(some))
    for p, *ps in zip(whole, *parts):
        close(p.grad, np.concatenate([fetch(one.grad) for one in ps]))


def layer(x, W, b, A, B, m, s, exact):
    return dora.dora_scale(W, A, B, m, s, exact=exact) * lora_linear(x, W, None, A, B, s) + b


@both
def test_the_whole_layer_against_the_gradient_of_the_merged_weight(device, exact):
    """The paper's eq. 6: V gets rho G; exact, without the part along V. The layer's A and B project that."""
    (W, A, B, m), s = draw(seed=4), 0.7
    rng = np.random.default_rng(5)
    x, b, dy = rng.standard_normal((5, 6)), rng.standard_normal(4), rng.standard_normal((5, 4))
    leaves = trained(W, b, A, B, m)
    y = layer(place(x), *leaves, s, exact)
    y.backward(place(dy))
    V = dense(W, A, B, s)
    c = np.linalg.norm(V, axis=1)
    close(y, x @ ((m / c)[:, None] * V).T + b)
    G = dy.T @ x
    dV = (m / c)[:, None] * (G - exact * (G * V).sum(1, keepdims=True) * V / (c * c)[:, None])
    for p, expected in zip(leaves, (dV, dy.sum(0), s * B.T @ dV, s * dV @ A.T, (G * V).sum(1) / c)):
        close(p.grad, expected)
    if exact:
        assert np.abs((fetch(leaves[0].grad) * V).sum(1)).max() < 1e-12


@dtypes
def test_exact_in_every_dtype(device, dtype, monkeypatch):
    monkeypatch.setattr(dora, "BLOCK", 16)
    arrays, drho = draw(6, 8, 4, 2, 6, dtype), np.linspace(-1, 1, 6).astype(dtype)
    results = []
    for kind in (dtype, "float64"):
        leaves = trained(*(a.astype(kind) for a in arrays))
        rho = dora.dora_scale(*leaves, 0.7, 2, exact=True)
        rho.backward(place(drho.astype(kind)))
        assert {str(a.dtype) for a in (rho.data, *(p.grad for p in leaves))} == {kind}
        results.append([fetch(a).astype("float64") for a in (rho, *(p.grad for p in leaves))])
    for narrow, wide in zip(*results):
        close(narrow, wide, 20 * EPS[dtype])


def test_gradient_of_the_weight_goes_where_it_is_waited_for(device):
    returned = []

    class Watched(dora.DoRAScale):
        def backward(self, drho):
            gradients = super().backward(drho)
            returned.append(gradients[0])
            return gradients

    waiting, free = trained(*draw()), trained(*draw())
    waiting[0].room = place(np.full((4, 6), 9.0))
    for leaves in (waiting, free):
        engine.apply(Watched, *leaves, s=0.7, groups=1).sum().backward()
    assert returned[0] is waiting[0].room and waiting[0].gathered is waiting[0].room
    np.testing.assert_array_equal(fetch(waiting[0].grad), fetch(free[0].grad))


# -- rows without a length, and range -----------------------------------------------------------------------------------


@dtypes
@both
def test_rows_of_zeros(device, dtype, exact):
    """The factor is 1, nothing is NaN, no gradient passes, and the other rows do not notice."""
    W, A, B, m = draw(5, dtype=dtype)
    W[[1, 4]], B[[1, 4]] = 0.0, 0.0
    m[4] = 0.0
    some = [0, 2, 3]
    whole, rest = trained(W, A, B, m), trained(W[some], A, B[some], m[some])
    rho = dora.dora_scale(*whole, 0.5, exact=exact)
    alone = dora.dora_scale(*rest, 0.5, exact=exact)
    assert (fetch(rho)[[1, 4]] == 1.0).all()
    for y in (rho, alone):
        y.sum().backward()
    tol = 8 * EPS[dtype]
    close(fetch(rho)[some], fetch(alone), tol)
    assert (fetch(dora.initial_magnitude(*placed(W, A, B), 0.5))[[1, 4]] == 0).all()
    assert not fetch(whole[3].grad)[[1, 4]].any()
    close(fetch(whole[3].grad)[some], fetch(rest[3].grad), tol)
    if exact:
        assert not any(fetch(p.grad)[[1, 4]].any() for p in (whole[0], whole[2]))
        close(whole[1].grad, fetch(rest[1].grad), tol)


def test_rows_of_zeros_in_a_layer(device):
    """The output is the bias before the row moves and after, and m and B can move it."""
    (W, A, B, _), s = draw(), 0.5
    W[1], B[:] = 0.0, 0.0
    x, b = np.random.default_rng(7).standard_normal((3, 6)), np.arange(4.0)
    m = fetch(dora.initial_magnitude(*placed(W, A, B), s))
    y = fetch(layer(*placed(x, W, b, A, B, m), s, False))
    close(y, x @ W.T + b)
    parameters = trained(A, B, m)
    layer(*placed(x, W, b), *parameters, s, False).sum().backward()
    assert fetch(parameters[1].grad)[1].all() and fetch(parameters[2].grad)[1] == 0
    B[1] = 1e-3
    parameters = trained(A, B, m)
    y = layer(*placed(x, W, b), *parameters, s, False)
    assert (fetch(y)[:, 1] == b[1]).all()
    y.sum().backward()
    assert np.isfinite(fetch(parameters[2].grad)).all() and fetch(parameters[2].grad)[1] != 0


@dtypes
def test_shortest_length(device, dtype):
    """From the bound on, gradients are finite; below it there are none."""
    assert dora.shortest(np.dtype(dtype)) == SHORTEST[dtype]
    W = np.array([[SHORTEST[dtype]], [SHORTEST[dtype] / 2]], dtype)
    zeros = [np.zeros(shape, dtype) for shape in ((1, 1), (2, 1))]
    leaves = trained(W, *zeros, W[:, 0] * 2)
    rho = dora.dora_scale(*leaves, 1.0, exact=True)
    np.testing.assert_array_equal(fetch(rho), [2.0, 1.0])
    rho.backward(place(np.full(2, 0.5, dtype)))
    np.testing.assert_array_equal(fetch(leaves[3].grad), [0.5 / SHORTEST[dtype], 0.0])
    expected = -1.0 / SHORTEST[dtype]  # -drho m / c^2
    np.testing.assert_array_equal(fetch(leaves[0].grad), [[expected], [0.0]])


def test_complex_rows_of_zeros(device):
    W, A, B, m = draw(2)
    W[1], B[1] = 0.0, 0.0
    rho = dora.dora_scale(*placed(*(a + 1e-30j * (i == 3) for i, a in enumerate((W, A, B, m)))), 0.5)
    close(fetch(rho).imag * 1e30, [1 / np.linalg.norm(dense(W, A, B, 0.5)[0]), 0.0])


@both
def test_nan_stays_nan(device, exact):
    W, A, B, m = draw()
    W[2, 3] = np.nan
    rho = fetch(dora.dora_scale(*placed(W, A, B, m), 0.5, exact=exact))
    assert np.isnan(rho).tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype, low, high", [("float16", 1e-3, 2000.0), ("float32", 2.0 ** -50, 2.0 ** 60),
                                              ("float64", 2.0 ** -498, 2.0 ** 508)])
def test_range(device, dtype, low, high):
    """Lengths of 16 equal elements (in float16 their squares neither overflow nor vanish), factors and gradients of m."""
    for size in (low, 1.0, high):
        W = np.full((1, 16), size, dtype)
        m = Parameter(place(np.full(1, 2.0 * size, dtype)))
        c = dora.initial_magnitude(*placed(W, np.ones((1, 16), dtype), np.zeros((1, 1), dtype)), 1.0)
        np.testing.assert_array_equal(fetch(c), 4 * W[0, :1])
        rho = dora.dora_scale(*placed(W, np.ones((1, 16), dtype), np.zeros((1, 1), dtype)), m, 1.0)
        rho.backward(place(np.ones(1, dtype)))
        assert fetch(rho) == 0.5
        np.testing.assert_allclose(fetch(m.grad).astype(float), 1 / (4 * W[0, :1].astype(float)), rtol=EPS[dtype])


def test_update_of_float16_is_computed_in_float32(device):
    """B A overflows float16, and s B is too small for it; s B A is neither."""
    W, A, B = np.zeros((1, 2), "float16"), np.full((1, 2), 6e4, "float16"), np.full((1, 1), 2.0 ** -8, "float16")
    s = 2.0 ** -18
    c = fetch(dora.initial_magnitude(*placed(W, A, B), s))
    np.testing.assert_allclose(c.astype(float), np.sqrt(2) * s * 2.0 ** -8 * A[0, 0].astype(float), rtol=EPS["float16"])


# -- memory and devices -------------------------------------------------------------------------------------------------


def peak(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype, groups", [("float32", 1), ("float16", 1), ("float32", 2)])
def test_no_array_as_large_as_the_weight(dtype, groups):
    out = n = 1024
    W, A, B, m = draw(out, n, 4, groups, dtype=dtype)
    leaves = [Parameter(W, trainable=False), *map(Parameter, (A, B, m))]
    block, weight = 4 * dora.BLOCK, 4 * out * n  # as float32

    def step(exact):
        dora.dora_scale(*leaves, 0.5, groups, exact=exact).sum().backward()

    for leaves[0].data in (W, W.T):
        for exact in (False, True):
            assert peak(lambda: step(exact)) < 1.3 * block + 8 * 4 * 4 * (n + out) < weight / 4
    if (dtype, groups) == ("float32", 1):
        assert peak(lambda: composed(*leaves, 0.5)) > weight


@both
@pytest.mark.parametrize("device", ["standin"], indirect=True)
def test_nothing_waits_for_the_device(device, exact):
    leaves, drho = trained(*draw()), place(np.ones(4))
    with standin.counting() as counts:
        dora.dora_scale(*leaves, 0.5, exact=exact).backward(drho)
    assert (counts.syncs, counts.h2d, counts.d2h) == (0, 0, 0)


@pytest.mark.parametrize("view, walked", [(lambda W: W, (1, 4, 6)), (lambda W: W[::-1], (1, 4, 6)),
                                          (lambda W: W.T, (1, 6, 4)), (lambda W: W.T[:, ::-1], (1, 6, 4))],
                         ids=["as it is", "upside down", "transposed", "transposed backwards"])
def test_weight_is_walked_along_its_memory(device, view, walked, monkeypatch):
    shapes, blocks = [], dora.blocks
    monkeypatch.setattr(dora, "blocks", lambda shape, at_once: (shapes.append(shape), blocks(shape, at_once))[1])
    W = view(place(np.ones(walked[1:])))  # with so many rows in memory
    c = dora.initial_magnitude(W, *placed(np.ones((1, W.shape[1])), np.ones((W.shape[0], 1))), 1.0)
    close(c, np.full(len(W), 2 * np.sqrt(W.shape[1])))
    assert shapes == [walked]


@pytest.mark.parametrize("device", ["standin"], indirect=True)
def test_no_work_for_nobody(device, monkeypatch):
    def launches(*needs):
        """Of the forward pass, and of both together."""
        leaves, drho = [Parameter(a, trainable=n) for a, n in zip(placed(*draw(8)), needs)], place(np.ones(8))
        with standin.counting() as counts:
            rho = dora.dora_scale(*leaves, 0.5, exact=True)
            forward = counts.launches
            if any(needs):
                rho.node.backward(drho)
        return forward, counts.launches

    nothing, m, A, both = (launches(0, *needs) for needs in ((0, 0, 0), (0, 0, 1), (1, 0, 1), (1, 1, 1)))
    assert nothing[0] < m[0] == A[0] == both[0]
    assert m[1] < A[1] < both[1]
    monkeypatch.setattr(dora, "BLOCK", 8)
    forward, total = launches(0, 1, 1, 1)
    assert forward > both[0] and total - forward == both[1] - both[0]  # float64 needs no conversion: one block


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong, groups, match", [
    ({"W": (4,)}, 1, r"expected a weight \(out, n\), got shape \(4,\)"),
    ({"W": (4, 6, 1)}, 1, r"got shape \(4, 6, 1\).*reshape"),
    ({"A": (6, 2)}, 1, r"weight \(4, 6\) expected A \(r, 6\), got \(6, 2\).*transposed"),
    ({"A": (2, 6, 1)}, 1, r"got \(2, 6, 1\)"), ({"A": (12,)}, 1, r"got \(12,\)"),
    ({"B": (2, 4)}, 1, r"expected B \(4, 2\), got \(2, 4\)"), ({"B": (4, 3)}, 1, r"got \(4, 3\)"),
    ({}, 2, r"expected B \(4, 1\) \(2 ranks in 2 groups\), got \(4, 2\)"),
    ({"m": (4, 1)}, 1, r"m of shape \(4,\), got \(4, 1\).*reshape\(-1\)"), ({"m": (1, 4, 1, 1)}, 1, r"got \(1, 4, 1, 1\)"),
    ({"m": ()}, 1, r"got \(\)"),
], ids=str)
def test_shapes_that_do_not_fit(device, wrong, groups, match):
    arrays = [place(np.ones(shape)) for shape in ({"W": (4, 6), "A": (2, 6), "B": (4, 2), "m": (4,)} | wrong).values()]
    with pytest.raises(ShapeError, match=match):
        dora.dora_scale(*arrays, 1.0, groups)
    if "m" not in wrong:
        with pytest.raises(ShapeError, match=match):
            dora.initial_magnitude(*arrays[:3], 1.0, groups)


@pytest.mark.parametrize("groups, match", [(0, "int >= 1, got 0"), (1.0, "got 1.0"), (True, "got True"), ("2", "got '2'"),
                                           (3, "groups=3 does not divide the 4 rows of W"),
                                           (4, "groups=4 does not divide the 2 rows of A")])
def test_groups_that_do_not_fit(device, groups, match):
    arrays = placed(*draw())
    with pytest.raises(ConfigError, match=match):
        dora.dora_scale(*arrays, 1.0, groups)
    with pytest.raises(ConfigError, match=match):
        dora.initial_magnitude(*arrays[:3], 1.0, groups)


def test_dtypes_and_devices_that_do_not_fit(device):
    W, A, B, m = draw()
    integers = [place(np.ones(a.shape, "int64")) for a in (W, A, B, m)]
    with pytest.raises(DTypeError, match="floating-point.*int64"):
        dora.dora_scale(*integers, 1.0)
    with pytest.raises(DTypeError, match="floating-point.*int64"):
        dora.initial_magnitude(*integers[:3], 1.0)
    with pytest.raises(DTypeError, match="two dtypes"):
        dora.dora_scale(*placed(W, A, B), place(m, "float32"), 1.0)
    if device == "standin":
        with minilora.use("cpu"):
            host = Parameter(m)
        with pytest.raises(DeviceError, match="two devices"):
            dora.dora_scale(*placed(W, A, B), host, 1.0)
