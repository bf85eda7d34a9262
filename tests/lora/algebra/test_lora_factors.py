"""One update in factored form, against the dense matrix, exact integers and proven bounds of rounding.

Integer-valued factors give exact oracles: D, <D1, D2> and ||D||^2 are whole numbers that Python computes without rounding,
also where two adapters cancel almost wholly.
"""
import math
import tracemalloc

import numpy as np
import pytest
import standin
from conftest import fetch, place
from hypothesis import given, strategies as st

import minilora
from minilora import lora
from minilora.errors import ConfigError, DeviceError, DTypeError, ShapeError, StateError
from minilora.lora.algebra.factors import core_of

U = 2.0 ** -53
SHAPES = [(5, 7, 3), (7, 5, 3), (6, 6, 1), (4, 3, 8), (1, 5, 2), (5, 1, 2), (3, 3, 3)]  # out, in, r
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
drawn_shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6))


def gamma(n):
    return n * U / (1 - n * U)


def draw(shape, seed=0, s=0.5, dtype="float64"):
    """An update, and A and B on the host."""
    out, n_in, r = shape
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal((r, n_in)).astype(dtype), rng.standard_normal((out, r)).astype(dtype)
    return lora.LowRank(place(A), place(B), s), A, B


def integers(shape, seed=0, s=2.0, high=8, dtype="float64"):
    out, n_in, r = shape
    rng = np.random.default_rng(seed)
    A, B = (rng.integers(-high, high + 1, size).astype(dtype) for size in ((r, n_in), (out, r)))
    return lora.LowRank(place(A), place(B), s), A, B


def dense(A, B, s):
    """D in float64, index by index."""
    return s * np.einsum("kj,ji->ki", B.astype("float64"), A.astype("float64"))


def exact(matrix):
    """A whole-numbered matrix as Python integers, which never round."""
    assert (matrix == np.rint(matrix)).all()
    return matrix.astype("int64").astype(object)


def size_of(A, B, s):
    return abs(s) * (np.linalg.norm(A.astype("float64"), axis=1) * np.linalg.norm(B.astype("float64"), axis=0)).sum()


# -- against the dense matrix ---------------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("s", [0.5, -1.5, 0.0])
def test_everything_is_what_the_dense_matrix_says(device, shape, s):
    update, A, B = draw(shape, s=s)
    other, A2, B2 = draw((shape[0], shape[1], 2), seed=1, s=3.0)
    D, D2 = dense(A, B, s), dense(A2, B2, 3.0)
    tight = dict(rtol=1e-12, atol=1e-12)
    assert (update.shape, update.r, update.s, update.device.name) == (shape[:2], shape[2], s, device)
    np.testing.assert_allclose(fetch(update.dense()), D, **tight)
    np.testing.assert_allclose(update.norm(), np.linalg.norm(D), **tight)
    np.testing.assert_allclose(update.inner(other), (D * D2).sum(), **tight)
    np.testing.assert_allclose(fetch((-update).dense()), -D, **tight)
    np.testing.assert_allclose(fetch(update.scaled(-0.25).dense()), -0.25 * D, **tight)
    if s:
        expected = (D * D2).sum() / np.linalg.norm(D) / np.linalg.norm(D2)
        np.testing.assert_allclose(update.cosine(other), expected, **tight)
    np.testing.assert_allclose(fetch(update.balanced().dense()), D, **tight)
    count = min(*shape)
    sigma = fetch(update.singular_values())
    assert sigma.shape == (count,) and sigma.dtype == "float64"
    np.testing.assert_allclose(sigma, np.linalg.svd(D, compute_uv=False)[:count], **tight)


@shapes
def test_svd(device, shape):
    update, A, B = draw(shape)
    left, S, Vt = map(fetch, update.svd())
    count = min(*shape)
    assert (left.shape, S.shape, Vt.shape) == ((shape[0], count), (count,), (count, shape[1]))
    np.testing.assert_allclose(left * S @ Vt, dense(A, B, 0.5), rtol=0, atol=1e-12)
    np.testing.assert_allclose(left.T @ left, np.eye(count), rtol=0, atol=1e-12)
    np.testing.assert_allclose(Vt @ Vt.T, np.eye(count), rtol=0, atol=1e-12)
    assert (np.diff(S) <= 0).all() and (S >= 0).all()


@shapes
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_balanced_factors(device, shape, dtype):
    update, A, B = draw(shape, dtype=dtype)
    balanced = update.balanced()
    assert balanced.s == 1.0 and balanced.dtype == dtype and balanced.r == min(shape)
    a, b = fetch(balanced.A).astype("float64"), fetch(balanced.B).astype("float64")
    eps = float(np.finfo(dtype).eps)
    sigma = np.diag(np.linalg.svd(dense(A, B, 0.5), compute_uv=False)[:balanced.r])
    for product in (a @ a.T, b.T @ b):
        np.testing.assert_allclose(product, sigma, rtol=0, atol=20 * eps * sigma.max())


@pytest.mark.parametrize("axes", [(4,), (2, 3), ()], ids=str)
def test_apply(device, axes):
    update, A, B = draw((5, 7, 3))
    x = np.random.default_rng(5).standard_normal((*axes, 7))
    y = update.apply(place(x))
    assert type(y) is type(update.A) and y.shape == (*axes, 5)
    np.testing.assert_allclose(fetch(y), x @ dense(A, B, 0.5).T, rtol=0, atol=1e-12)


def test_dense_is_the_delta_of_a_layer(device):
    layer = lora.Linear(6, 4, r=2, lora_alpha=3, rng=np.random.default_rng(0))
    layer.lora_B.data[...] = place(np.random.default_rng(1).standard_normal((4, 2)), "float32")
    update = lora.LowRank(layer.lora_A, layer.lora_B, layer.scaling)
    assert update.A is layer.lora_A.data and update.B is layer.lora_B.data
    x = place(np.ones((3, 6), "float32"))
    pairs = [(update.dense(), layer.delta()), (update.apply(x), layer.eval().update(minilora.Tensor(x)))]
    if device != "gpu":
        assert all(fetch(one).tobytes() == fetch(other).tobytes() for one, other in pairs)
        return
    # A layer's delta is computed on the host, and cuBLAS chooses the order of a sum by the shapes and the strides: each is off
    # by at most gamma(n) of the same sum of absolute values, n the products and factors on the longest way to a number.
    A, B, s = abs(fetch(update.A)).astype("float64"), abs(fetch(update.B)).astype("float64"), update.s
    u = 2.0 ** -24
    for (one, other), n, bound in zip(pairs, (2 + 1, 6 + 2 + 1), (s * B @ A, s * np.ones((3, 6)) @ A.T @ B.T)):
        assert (abs(fetch(one).astype("float64") - fetch(other)) <= 2 * n * u / (1 - n * u) * bound).all()


def test_factors_are_shared_and_never_changed(device):
    update, A, B = draw((5, 7, 3))
    other, _, _ = draw((5, 7, 2), seed=1)
    for call in (update.norm, update.svd, update.singular_values, update.balanced, update.dense, update.__neg__,
                 lambda: update.inner(other), lambda: update.cosine(other), lambda: update.scaled(2.0)):
        call()
    assert fetch(update.A).tobytes() == A.tobytes() and fetch(update.B).tobytes() == B.tobytes()
    assert update.scaled(3.0).A is update.A and (-update).B is update.B
    with pytest.raises(AttributeError):
        update.s = 2.0


# -- properties -----------------------------------------------------------------------------------------------------


@given(shape=drawn_shapes, r=st.integers(1, 5), seed=st.integers(0, 2 ** 20))
def test_inner_product_is_exact_for_whole_numbers(device, shape, r, seed):
    one, A1, B1 = integers(shape, seed)
    two, A2, B2 = integers((*shape[:2], r), seed + 1, s=-4.0)
    expected = (exact(dense(A1, B1, 2.0)) * exact(dense(A2, B2, -4.0))).sum()
    assert one.inner(two) == two.inner(one) == expected
    assert one.inner(two.scaled(-0.5)) == (-one.scaled(0.5)).inner(two) == -expected / 2


@given(shape=drawn_shapes, r=st.integers(1, 5), seed=st.integers(0, 2 ** 20), scale=st.sampled_from([1.0, 1e-150, 1e60]))
def test_inner_product_is_symmetric_and_below_the_product_of_norms(device, shape, r, seed, scale):
    one, two = draw(shape, seed)[0].scaled(scale), draw((*shape[:2], r), seed + 1)[0]
    product, norms = one.inner(two), one.norm() * two.norm()
    assert product == pytest.approx(two.inner(one), rel=1e-9, abs=1e-12 * norms)
    assert abs(product) <= norms * (1 + 1e-12)
    assert -1 <= one.cosine(two) <= 1 and one.cosine(one) <= 1 and one.cosine(-one) >= -1
    assert one.cosine(one) == pytest.approx(1, abs=1e-12) and one.cosine(-one.scaled(1e-3)) == pytest.approx(-1, abs=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_products_are_taken_in_float64(device, dtype):
    one, A1, B1 = draw((50, 40, 4), dtype=dtype)
    two, A2, B2 = draw((50, 40, 3), seed=1, dtype=dtype)
    D1, D2 = dense(A1, B1, 0.5), dense(A2, B2, 0.5)
    assert one.inner(two) == pytest.approx((D1 * D2).sum(), rel=1e-12)
    assert one.norm() == pytest.approx(np.linalg.norm(D1), rel=1e-13)


@given(shape=drawn_shapes, seed=st.integers(0, 2 ** 20))
def test_gauge_invariance(device, shape, seed):
    """(C A, B C^-1) is the same D, whatever C: nothing that is said about D may notice."""
    out, n_in, r = shape
    update, A, B = draw(shape, seed)
    other = draw((out, n_in, 2), seed + 1)[0]
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((r, r)))[0]
    C = q * rng.uniform(0.25, 4.0, r)
    moved = lora.LowRank(place(C @ A), place(B @ np.linalg.inv(C)), update.s)
    size = size_of(A, B, update.s)
    assert moved.norm() == pytest.approx(update.norm(), abs=1e-12 * size)
    np.testing.assert_allclose(fetch(moved.singular_values()), fetch(update.singular_values()), rtol=0, atol=1e-12 * size)
    assert moved.inner(other) == pytest.approx(update.inner(other), abs=1e-12 * size * other.norm() + 1e-14)
    np.testing.assert_allclose(fetch(moved.balanced().dense()), fetch(update.balanced().dense()), rtol=0, atol=1e-12 * size)


# -- rounding -------------------------------------------------------------------------------------------------------


@given(shape=drawn_shapes, r=st.integers(1, 5), seed=st.integers(0, 2 ** 20))
def test_inner_product_keeps_its_proven_bound(shape, r, seed):
    """Off by at most gamma(out + in + r1 r2) size1 size2, for factors of any scale; long double is the oracle."""
    out, n_in, _ = shape
    rng = np.random.default_rng(seed)

    def spread(size):
        return rng.standard_normal(size) * 10.0 ** rng.integers(-6, 7, size)
    (A1, B1), (A2, B2) = ((spread((k, n_in)), spread((out, k))) for k in (shape[2], r))
    one, two = lora.LowRank(A1, B1, 0.7), lora.LowRank(A2, B2, -1.3)
    L = np.longdouble
    expected = L(0.7) * L(-1.3) * ((B1.astype(L) @ A1.astype(L)) * (B2.astype(L) @ A2.astype(L))).sum()
    bound = gamma(out + n_in + shape[2] * r + 3) * size_of(A1, B1, 0.7) * size_of(A2, B2, 1.3)
    assert abs(L(one.inner(two)) - expected) <= bound


@pytest.mark.parametrize("apart", [1, 2 ** 10])
def test_difference_of_nearly_equal_adapters(device, apart):
    """X - Y with Y a little away in a few entries: the norm is known exactly, and size / ||X - Y|| is 1e5 or 1e8.

    The norm is off by c u size with c below 10. The root of <D, D> keeps its own bound, and by that loses twice the digits.
    """
    out, n_in, r = 40, 30, 3
    norms, roots = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        A, B = (rng.integers(-2 ** 26, 2 ** 26, shape).astype(float) for shape in ((r, n_in), (out, r)))
        A2 = A.copy()
        A2[0, :3] += apart
        D = lora.LowRank(place(np.concatenate([A, -A2])), place(np.concatenate([B, B], axis=1)))
        integer = exact(B) @ exact(A) - exact(B) @ exact(A2)
        square = int((integer * integer).sum())
        true = math.sqrt(square)
        size = size_of(np.concatenate([A, A2]), np.concatenate([B, B], axis=1), 1.0)
        assert size / true > 1e8 / apart
        assert abs(D.norm() - true) <= 10 * U * size
        assert abs(D.inner(D) - square) <= gamma(out + n_in + 4 * r * r) * size ** 2
        sigma = fetch(D.singular_values())
        assert abs(sigma[0] - true) <= 10 * U * size and sigma[1:].max() <= 10 * U * size  # the difference has rank 1
        norms.append(abs(D.norm() - true) / true)
        roots.append(abs(math.sqrt(abs(D.inner(D))) - true) / true)
    assert max(roots) > 100 * max(norms)


def test_float32_adapters_that_differ_in_the_last_bit(device):
    """Widening to float64 leaves half of its digits for the smallest difference that float32 can hold."""
    _, A, B = draw((50, 40, 4), dtype="float32")
    A2 = A.copy()
    A2[2, 5] = np.nextafter(A2[2, 5], np.float32(np.inf))
    D = lora.LowRank(place(np.concatenate([A, -A2])), place(np.concatenate([B, B], axis=1)))
    true = float(A2[2, 5]) - float(A[2, 5])
    true *= float(np.linalg.norm(B[:, 2].astype("float64")))
    assert D.dtype == "float32" and D.norm() == pytest.approx(true, rel=1e-6)


@pytest.mark.parametrize("spread", [1.0, 1e8])
def test_a_diagonal_gauge_costs_no_digits(device, spread):
    """(B C, C^-1 A) with C from 1/spread to spread: size is the same, and so is the bound."""
    out, n_in, r = 20, 25, 4
    update, A, B = draw((out, n_in, r), s=1.0)
    C = np.geomspace(1 / spread, spread, r)
    moved = lora.LowRank(place(A / C[:, None]), place(B * C), 1.0)
    sigma = np.linalg.svd(B @ A, compute_uv=False)[:r]
    np.testing.assert_allclose(fetch(moved.singular_values()), sigma, rtol=0, atol=20 * U * size_of(A, B, 1.0))
    assert float(core_of(moved)[1]) == pytest.approx(size_of(A, B, 1.0), rel=1e-12)


def test_balancing_is_the_gauge_of_least_size(device):
    update, A, B = draw((20, 25, 4), s=1.0)
    balanced = update.balanced()
    nuclear = fetch(update.singular_values()).sum()
    assert float(core_of(balanced)[1]) == pytest.approx(nuclear, rel=1e-12) and nuclear <= size_of(A, B, 1.0)


# -- edges ----------------------------------------------------------------------------------------------------------


def test_zero_and_rank_deficient_updates(device):
    zero = lora.LowRank(place(np.ones((2, 4))), place(np.zeros((3, 2))))
    one = lora.LowRank(place(np.ones((2, 4))), place(np.ones((3, 2))))
    assert zero.norm() == 0 and zero.inner(one) == 0 and math.isnan(zero.cosine(one)) and math.isnan(one.cosine(zero))
    assert not fetch(zero.singular_values()).any() and not fetch(zero.balanced().dense()).any()
    assert (zero.scaled(0.0).norm(), one.scaled(0.0).norm()) == (0, 0)
    sigma = fetch(one.singular_values())
    np.testing.assert_allclose(sigma, [2 * math.sqrt(12), 0], atol=1e-14)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["A", "B"])
def test_not_finite(device, name, value):
    arrays = {"A": np.ones((2, 4)), "B": np.ones((3, 2))}
    arrays[name][1, 1] = value
    update = lora.LowRank(place(arrays["A"]), place(arrays["B"]))
    for call in (update.norm, update.svd, update.singular_values, update.balanced):
        with np.errstate(all="ignore"), pytest.raises(StateError, match=f"found in: {name}"):
            call()


def test_overflow_is_named(device):
    update = lora.LowRank(place(np.full((1, 2), 1e200)), place(np.full((2, 1), 1e200)))
    with np.errstate(over="ignore"), pytest.raises(StateError, match="overflows"):
        update.norm()


@pytest.mark.parametrize(("a", "b", "text"), [
    ((3, 4), (5, 2), r"A \(3, 4\) and B \(5, 2\)"), ((3,), (5, 3), r"A \(3,\)"), ((3, 4), (5, 3, 1), r"B \(5, 3, 1\)"),
    ((0, 4), (5, 0), r"none of them empty"), ((3, 0), (5, 3), "empty"), ((4, 2), (5, 2), "transpose"),
])
def test_shapes_that_do_not_fit(device, a, b, text):
    with pytest.raises(ShapeError, match=text):
        lora.LowRank(place(np.ones(a)), place(np.ones(b)))


def test_other_bad_input(device):
    A, B = np.ones((2, 4)), np.ones((3, 2))
    with pytest.raises(DTypeError, match="A is float32, B is float64"):
        lora.LowRank(place(A, "float32"), place(B))
    with pytest.raises(DTypeError, match="A is int64"):
        lora.LowRank(place(A, "int64"), place(B, "int64"))
    with pytest.raises(DTypeError, match="complex128"):
        lora.LowRank(place(A, "complex128"), place(B, "complex128"))
    with pytest.raises(DTypeError, match="list"):
        lora.LowRank([[1.0]], [[1.0]])
    for s in (np.nan, np.inf, "2", None):
        with pytest.raises(ConfigError, match="s must be a finite number"):
            lora.LowRank(place(A), place(B), s)
    update = lora.LowRank(place(A), place(B))
    with pytest.raises(ConfigError, match="weight must be a finite number, got nan"):
        update.scaled(np.nan)
    with pytest.raises(ShapeError, match=r"\(3, 4\) and \(3, 5\)"):
        update.inner(lora.LowRank(place(np.ones((2, 5))), place(B)))
    with pytest.raises(ShapeError):
        update.apply(place(np.ones((2, 5))))
    if device != "cpu":
        with pytest.raises(DeviceError, match="A is on the"):
            lora.LowRank(A, place(B))
        with pytest.raises(DeviceError, match="inner"):
            update.inner(lora.LowRank(A, B))


def test_nothing_of_the_size_of_the_weight_is_formed():
    """2000 x 3000 of rank 4: D would be 48 MB, the factors are 160 kB."""
    update, _, _ = draw((2000, 3000, 4))
    other, _, _ = draw((2000, 3000, 2), seed=1)
    tracemalloc.start()
    for call in (update.norm, update.svd, update.singular_values, update.balanced, lambda: update.inner(other)):
        call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 8 * 5000 * 4  # a dozen pairs of factors


def test_synchronisations_are_the_documented_ones():
    standin.register()
    with minilora.use("standin"):
        update, other = draw((5, 7, 3))[0], draw((5, 7, 2), seed=1)[0]
        with standin.counting() as counts:
            update.inner(other)
        assert (counts.syncs, counts.d2h, counts.h2d) == (1, 1, 0)
        with standin.counting() as counts:
            update.svd()
        assert counts.h2d == 0 and counts.d2h == 1  # is the core finite?
        with standin.capturing():  # no synchronisation at all
            update.apply(place_on(update, (4, 7)))
            update.scaled(2.0)
            update.dense()
    minilora.backend.unregister_device("standin")


def place_on(update, shape):
    return update.device.xp.ones(shape)
