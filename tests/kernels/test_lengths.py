"""DoRA's lengths and factors by their kernel: against float64, exactly 1 at the start, rows without a length, same bits."""
import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora import Parameter, lora, nn, quant
from minilora.kernels.gpu import dora as gpu_dora
from minilora.lora.gradients.dora import dora_scale, initial_magnitude, shortest

S = 1.5
LAYOUTS = {
    "rows": place,
    "columns": lambda a: place(a.T.copy(order="C")).T,
    "backwards": lambda a: place(a[..., ::-1])[..., ::-1],
    "not aligned": lambda a: place(np.concatenate([a.reshape(-1)[:1], a.reshape(-1)]))[1:].reshape(a.shape),
}


def drawn(out, n, r, groups=1, dtype="float32", seed=0):
    """W, A, B and m on the host."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in ((out, n), (groups * r, n), (out, r), (out,))]


def formula(W, A, B, m, groups=1):
    """rho in float64, and how many eps of it rounding may cost: as many as there are terms, where some cancel."""
    W, A, B, m = (a.astype("float64") for a in (W, A, B, m))
    parts = [(a, b) for a, b in zip(np.split(A, groups), np.split(B, groups))]
    V, whole = (f(W) + S * np.concatenate([f(b) @ f(a) for a, b in parts]) for f in (lambda a: a, abs))
    c = np.sqrt((V * V).sum(axis=1))
    return m / c, (W.shape[1] + A.shape[0] + 8) * np.sqrt((whole * whole).sum(axis=1)) / c


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("out", "n", "r", "groups"), [
    (1, 1, 1, 1), (3, 5, 2, 1), (70, 3, 3, 1), (5, 301, 8, 1), (33, 17, 5, 1), (6, 40, 16, 1), (12, 7, 2, 3), (600, 2, 1, 1),
    (4, 6, 17, 1)])
def test_factors(out, n, r, groups, layout, card):
    for dtype in ("float32", "float64") if out < 9 else ("float32",):
        hosts = drawn(out, n, r, groups, dtype)
        W, A, B, m = (LAYOUTS[layout](a) for a in hosts)
        p = Parameter(m)
        rho = dora_scale(W, A, B, p, S, groups)
        rho.backward(place(np.ones(out, dtype)))
        expected, bound = formula(*hosts, groups)
        assert (abs(fetch(rho) - expected) <= np.finfo(dtype).eps * bound * abs(expected)).all()
        np.testing.assert_allclose(fetch(p.grad) * hosts[3], fetch(rho), rtol=8 * np.finfo(dtype).eps)
    if card:
        names = {name.rpartition("_")[0] for name, *_ in card.launches}
        by_columns = layout == "columns" and out > 1 < n
        assert names == (set() if r > 16 else {"dora_columns" if by_columns else "dora_rows"})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("r", [1, 3, 16, 17])
def test_factors_are_exactly_1_at_the_start(layout, r, card):
    """Whoever computes the lengths, in the same way: also with B that is not 0."""
    W, A, B, _ = (LAYOUTS[layout](a) for a in drawn(37, 70, r))
    for some in (B, 0.0 * B):
        assert (fetch(dora_scale(W, A, some, initial_magnitude(W, A, some, S), S)) == 1.0).all()


def test_a_layer_begins_with_the_numbers_of_its_base(card):
    base = nn.Linear(24, 33, rng=0)
    layer = lora.adapt(base, r=3, use_dora=True, rng=1)
    x = place(np.random.default_rng(0).standard_normal((5, 24)), "float32")
    plain = fetch(minilora.ops.linear(x, base.weight, None) + base.bias)
    np.testing.assert_array_equal(fetch(layer(x)), plain)
    before = fetch(layer.weight).tobytes()
    layer.merge()
    assert fetch(layer.weight).tobytes() == before  # rho is exactly 1 there, too


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_without_a_length(layout, dtype, card):
    """1, and no gradient; from the shortest length on a ratio."""
    least = shortest(np.dtype(dtype))
    W = np.zeros((5, 4), dtype)
    W[1, 0], W[2, 1], W[3, :2], W[4, 0] = least, least / 2, (3.0, 4.0), np.nan
    m = Parameter(place(np.full(5, 10.0, dtype)))
    rho = dora_scale(LAYOUTS[layout](W), place(np.ones((2, 4), dtype)), place(np.zeros((5, 2), dtype)), m, 1.0)
    rho.backward(place(np.ones(5, dtype)))
    np.testing.assert_array_equal(fetch(rho), np.array([1.0, 10.0 / least, 1.0, 2.0, np.nan], dtype))
    np.testing.assert_array_equal(fetch(m.grad), np.array([0.0, 1.0 / least, 0.0, 1.0 / dtype_of(5.0, dtype), np.nan], dtype))


def dtype_of(number, dtype):
    return np.dtype(dtype).type(number)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_what_is_not_finite_goes_where_the_reference_lets_it_go(layout, card):
    for i, name in enumerate("WABm"):
        for number in (np.inf, -np.inf, np.nan, 3e38):
            hosts = drawn(4, 5, 3)
            hosts[i].reshape(-1)[1] = number
            results = []
            for kernels in (True, False):
                with pytest.MonkeyPatch.context() as patch:
                    if not kernels:
                        patch.setattr(gpu_dora, "has_kernel", lambda *given: False)
                    p = [Parameter(LAYOUTS[layout](a)) for a in hosts]
                    rho = dora_scale(*p, S, exact=True)
                    rho.backward(place(np.ones(4, "float32")))
                    results.append([fetch(rho), *(fetch(q.grad) for q in p)])
            for one, other in zip(*results):
                for special in (np.isnan, np.isposinf, np.isneginf):
                    np.testing.assert_array_equal(special(one), special(other), f"{number} in {name}")


def test_the_same_bits_again_and_on_any_card(card):
    bits = set()
    for grid in [None, 1, 3, 50] if card else [None] * 3:
        if card:
            card.grid = grid
        for layout in ("rows", "columns"):
            W, A, B, m = (LAYOUTS[layout](a) for a in drawn(70, 40, 5))
            bits.add((layout, fetch(dora_scale(W, A, B, m, S)).tobytes()))
    assert len(bits) == 2


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0, 2), (3, 2, 0)])
def test_empty_arrays_take_the_reference(shape, card):
    W, A, B, m = (place(a) for a in drawn(*shape))
    rho = fetch(dora_scale(W, A, B, m, S))
    assert rho.shape == shape[:1] and (shape[1] or (rho == 1.0).all())
    assert not card or not card.launches


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_a_stored_base_takes_the_reference(kind, card):
    layer = lora.adapt(nn.Linear(64, 6, rng=0), r=2, use_dora=True, rng=1)
    quant.quantize(layer, kind)
    if card:
        card.launches.clear()
    y = layer(Parameter(place(np.ones((3, 64), "float32"))))
    y.backward(place(np.ones((3, 6), "float32")))
    assert np.isfinite(fetch(layer.adapter.magnitude.grad)).all()
    assert not card or not any(name.startswith("dora") for name, *_ in card.launches)


def test_launches(card):
    """One, whatever the size of W; and one behind for m."""
    W, A, B, m = (place(a) for a in drawn(40, 30, 4))
    p = Parameter(m)
    rho = dora_scale(W, A, B, p, S)
    rho.backward(place(np.ones(40, "float32")))
    assert "*" in str(minilora.engine.ledger(dora_scale(W, A, B, p, S)))
    if card:
        assert [name for name, *_ in card.launches] == ["dora_rows_float"] * 2
