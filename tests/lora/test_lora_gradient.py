"""The gradient of a low-rank update, by four independent oracles, and what the derivation implies.

The oracles: finite differences; the same layer composed from plain operations; the gradient of the merged weight,
projected (dA = s B^T G, dB = s G A^T); vectors stored from PEFT. Everywhere B is not 0 unless said: with B = 0 the
gradient of A is 0, and a wrong formula gives 0 as well.

Where a bound is used, it is proven: a sum of n products in any order is off by at most gamma(n) times the sum of the
absolute products. Integer-valued arrays have no rounding at all: there the tolerance is 0.
"""
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from conftest import fetch, place
from hypothesis import given, strategies as st

import minilora
from minilora import engine, lora, nn, ops, optim, testing
from minilora.errors import ConfigError, ShapeError

NAMES = ("x", "W", "b", "A", "B")
SHAPES = [(4, 7, 5, 3), (1, 3, 4, 2), (3, 2, 6, 1), (5, 4, 3, 6), (2, 5, 5, 5), (0, 3, 2, 2)]  # N, in, out, r
EPS = {"float32": 2.0 ** -23, "float64": 2.0 ** -52}


def gamma(n, dtype):
    u = EPS[dtype] / 2
    return n * u / (1 - n * u)


def draw(shape, seed=0, bias=True, dtype="float64"):
    """x, W, b, A, B and dy, B not zero."""
    n, n_in, out, r = shape
    rng = np.random.default_rng(seed)
    shapes = [(n, n_in), (out, n_in), (out,), (r, n_in), (out, r), (n, out)]
    x, W, b, A, B, dy = (rng.standard_normal(s).astype(dtype) for s in shapes)
    return x, W, b if bias else None, A, B, dy


def integers(shape, seed=0, dtype="float32"):
    """As `draw`, with values from -8 to 8: with a power of two as scaling, every sum below is exact."""
    n, n_in, out, r = shape
    rng = np.random.default_rng(seed)
    shapes = [(n, n_in), (out, n_in), (out,), (r, n_in), (out, r), (n, out)]
    return [rng.integers(-8, 9, s).astype(dtype) for s in shapes]


def engine_values(f, arrays, dy, trained=NAMES):
    """y = f(x, W, b, A, B) and the gradients, on the host; None for what is not trained."""
    leaves = [None if a is None else minilora.Parameter(place(a), name in trained) for name, a in zip(NAMES, arrays)]
    y = f(*leaves)
    if trained:
        y.backward(place(dy))
    gradients = [None if p is None or p.grad is None else fetch(p.grad) for p in leaves]
    return fetch(y), dict(zip(NAMES, gradients))


def fused(s):
    return lambda x, W, b, A, B: lora.lora_linear(x, W, b, A, B, s)


def composed(s):
    return lambda x, W, b, A, B: ops.linear(x, W, b) + ops.linear(ops.linear(x, A) * s, B)


def plain(x, W, b, A, B, dy, s):
    """The formulas with explicit sums over letters, and the same with absolute values: what rounding is measured by."""
    def values(x, W, b, A, B, dy, s):
        y = np.einsum("ni,ki->nk", x, W) + s * np.einsum("ni,ji,kj->nk", x, A, B) + (0 if b is None else b)
        return {"y": y, "x": np.einsum("nk,ki->ni", dy, W) + s * np.einsum("nk,kj,ji->ni", dy, B, A),
                "W": np.einsum("nk,ni->ki", dy, x), "b": None if b is None else np.einsum("nk->k", dy),
                "A": s * np.einsum("nk,kj,ni->ji", dy, B, x), "B": s * np.einsum("nk,ni,ji->kj", dy, x, A)}

    wide = [None if a is None else a.astype("float64") for a in (x, W, b, A, B, dy)]
    sizes = [None if a is None else np.abs(a) for a in wide]
    return values(*wide, s), values(*sizes, abs(s))


def layer_of(arrays, r, lora_alpha, adapted, dtype="float64", **options):
    """A layer, or a base that has been adapted, holding these values."""
    _, W, b, A, B = arrays
    rng = np.random.default_rng(0)
    settings = dict(r=r, lora_alpha=lora_alpha, rng=rng, **options)
    if adapted:
        layer = lora.adapt(nn.Linear(W.shape[1], W.shape[0], b is not None, dtype=dtype, rng=rng), **settings)
    else:
        layer = lora.Linear(W.shape[1], W.shape[0], bias=b is not None, dtype=dtype, **settings)
    state = {"weight": W, "adapters.default.lora_A": A, "adapters.default.lora_B": B}
    layer.load_state_dict(dict(layer.named_state()) | state | ({} if b is None else {"bias": b}))
    return layer


layers = pytest.mark.parametrize("adapted", [False, True], ids=["Linear", "adapt"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


# -- first oracle: finite differences -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["complex", "central"])
@shapes
@biases
def test_numerical_gradient_of_the_op(device, shape, bias, mode):
    *arrays, _ = draw(shape, bias=bias)
    if bias:
        report = testing.gradcheck(lambda x, W, b, A, B: lora.lora_linear(x, W, b, A, B, 1.7), *arrays, mode=mode)
    else:
        x, W, _, A, B = arrays
        report = testing.gradcheck(lambda x, W, A, B: lora.lora_linear(x, W, None, A, B, 1.7), x, W, A, B, mode=mode)
    assert report.passed, str(report)
    assert len(report.rows) == 4 + bias


@layers
@pytest.mark.parametrize("axes", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
def test_numerical_gradient_of_the_layer(device, adapted, axes):
    *arrays, _ = draw((1, 6, 4, 2), seed=1)
    layer = layer_of(arrays, 2, 3.0, adapted)
    x = np.random.default_rng(2).standard_normal(axes + (6,))
    for trained in (False, True):  # frozen as it comes, and with W and b trained beside
        layer.weight.trainable = layer.bias.trainable = trained
        report = testing.gradcheck(lambda x: ops.tanh(layer(x)), x, parameters=layer.named_parameters())
        assert report.passed, str(report)
        assert len(report.rows) == (5 if trained else 3)


def test_numerical_gradient_with_dropout(device):
    *arrays, _ = draw((1, 6, 4, 2), seed=1)
    layer = layer_of(arrays, 2, 3.0, True, lora_dropout=0.4)

    def f(x):
        layer.lora_dropout.step = 7  # the same mask at every evaluation
        return layer(x)

    x = np.random.default_rng(2).standard_normal((5, 6))
    report = testing.gradcheck(f, x, parameters=layer.named_parameters())
    assert report.passed, str(report)


def test_taylor_after_training(device):
    """A layer that has moved away from where it started."""
    rng = np.random.default_rng(4)
    layer = lora.Linear(6, 4, r=2, lora_alpha=3, dtype="float64", rng=rng)
    x, target = rng.standard_normal((8, 6)), rng.standard_normal((8, 4))
    optimizer = optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        ops.mse(layer(minilora.tensor(x)), minilora.tensor(target)).backward()
        optimizer.step()
    report = testing.taylor_test(lambda x: ops.tanh(layer(x)), x, parameters=layer.named_parameters())
    assert report.passed and report.slope > 1.9, str(report)
    report = testing.gradcheck(lambda x: ops.tanh(layer(x)), x, parameters=layer.named_parameters())
    assert report.passed, str(report)


# -- second oracle: plain operations, and sums over letters -------------------------------------------------


@given(st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)), st.booleans(),
       st.sampled_from(["float32", "float64"]), st.floats(-8, 8, allow_subnormal=False), st.integers(0, 2 ** 32 - 1))
def test_formulas_within_the_proven_bound(device, shape, bias, dtype, s, seed):
    n, n_in, out, r = shape
    *arrays, dy = draw(shape, seed, bias, dtype)
    s = float(np.float32(s))  # one number in both precisions
    y, gradients = engine_values(fused(s), arrays, dy)
    exact, sizes = plain(*arrays, dy, s)
    terms = {"y": n_in + r + 4, "x": out + r + 4, "W": n, "b": n, "A": out + n + 2, "B": n_in + n + 2}
    for name, got in [("y", y), *gradients.items()]:
        if exact[name] is None:
            assert got is None
            continue
        assert got.dtype == dtype and got.shape == exact[name].shape
        # gamma for what is tested, and some float64 rounding for the reference itself; tiny sums may underflow.
        bound = (gamma(terms[name], dtype) + gamma(60, "float64")) * sizes[name] + 1e-36
        assert (np.abs(got - exact[name]) <= bound).all(), name


@shapes
@biases
def test_the_same_layer_from_plain_operations(device, shape, bias):
    *arrays, dy = draw(shape, seed=3, bias=bias)
    y, gradients = engine_values(fused(0.75), arrays, dy)
    y_plain, gradients_plain = engine_values(composed(0.75), arrays, dy)
    np.testing.assert_allclose(y, y_plain, rtol=1e-12, atol=1e-13)
    for name, got in gradients.items():
        if got is None:
            assert gradients_plain[name] is None
        else:
            np.testing.assert_allclose(got, gradients_plain[name], rtol=1e-12, atol=1e-13)


@layers
@biases
def test_frozen_branch_plus_update(device, adapted, bias):
    """`update`, for callers who have the frozen output already."""
    *arrays, dy = draw((5, 6, 4, 3), seed=3, bias=bias)
    layer = layer_of(arrays, 3, 2.0, adapted)

    def run(f):
        x = minilora.Parameter(place(arrays[0]))
        y = f(x)
        y.backward(place(dy))
        values = [fetch(y), fetch(x.grad), fetch(layer.lora_A.grad), fetch(layer.lora_B.grad)]
        layer.lora_A.grad = layer.lora_B.grad = None
        return values

    whole = run(layer)
    for got, expected in zip(run(lambda x: ops.linear(x, layer.weight, layer.bias) + layer.update(x)), whole):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("s", [1.0, 2.0, 0.25, -4.0])
@shapes
def test_integers_are_exact(device, shape, s, dtype):
    *arrays, dy = integers(shape, seed=5, dtype=dtype)
    exact, _ = plain(*arrays, dy, s)
    for f in (fused(s), composed(s)):
        y, gradients = engine_values(f, arrays, dy)
        assert np.array_equal(y, exact["y"])
        for name, got in gradients.items():
            assert np.array_equal(got, exact[name]), name


# -- third oracle: the gradient of the merged weight, projected ---------------------------------------------


def merged_gradients(arrays, dy, s):
    """What nn.Linear gives for W + sBA, and its projections dA = s B^T G, dB = s G A^T."""
    x, W, b, A, B = arrays
    merged = minilora.Parameter(place(W + s * (B @ A)))
    x, b = minilora.Parameter(place(x)), minilora.Parameter(place(b))
    y = ops.linear(x, merged, b)
    y.backward(place(dy))
    G = fetch(merged.grad)
    return fetch(y), {"x": fetch(x.grad), "W": G, "b": fetch(b.grad), "A": s * (B.T @ G), "B": s * (G @ A.T)}


@shapes
def test_projected_gradient_of_the_merged_weight(device, shape):
    *arrays, dy = draw(shape, seed=6)
    y, gradients = engine_values(fused(1.25), arrays, dy)
    y_merged, expected = merged_gradients(arrays, dy, 1.25)
    np.testing.assert_allclose(y, y_merged, rtol=1e-12, atol=1e-13)
    for name in NAMES:
        np.testing.assert_allclose(gradients[name], expected[name], rtol=1e-12, atol=1e-13)


@shapes
def test_projected_gradient_is_exact_for_integers(device, shape):
    *arrays, dy = integers(shape, seed=7, dtype="float64")
    y, gradients = engine_values(fused(0.5), arrays, dy)
    y_merged, expected = merged_gradients(arrays, dy, 0.5)
    assert np.array_equal(y, y_merged)
    assert all(np.array_equal(gradients[name], expected[name]) for name in NAMES)


# -- fourth oracle: vectors stored from PEFT ----------------------------------------------------------------


def stored_cases():
    with np.load(Path(__file__).parent.parent / "data" / "lora_linear_torch.npz", allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        for name, case in about["cases"].items():
            arrays, start = {}, 0
            for key, shape in case["shapes"].items():
                stop = start + int(np.prod(shape))
                arrays[key] = file[name][start:stop].reshape(shape)
                start = stop
            assert start == file[name].size
            yield pytest.param(case["r"], case["lora_alpha"], arrays, id=name)


stored = pytest.mark.parametrize("r, lora_alpha, case", list(stored_cases()))


@layers
@stored
@pytest.mark.parametrize("dtype, rtol", [("float64", 1e-12), ("float32", 2e-5)])
def test_stored_vectors(device, adapted, r, lora_alpha, case, dtype, rtol):
    arrays = [case[name].astype(dtype) if name in case else None for name in NAMES]
    layer = layer_of(arrays, r, lora_alpha, adapted, dtype)
    layer.requires_grad()
    x = minilora.Parameter(place(arrays[0]))
    y = layer(x)
    y.backward(place(case["dy"].astype(dtype)))
    got = {"y": y, "dx": x.grad, "dA": layer.lora_A.grad, "dB": layer.lora_B.grad, "dW": layer.weight.grad}
    if layer.bias is not None:
        got["db"] = layer.bias.grad
    for name, array in got.items():
        np.testing.assert_allclose(fetch(array), case[name], rtol=rtol, atol=rtol, err_msg=name)


@stored
def test_stored_training(device, r, lora_alpha, case):
    """Five steps of AdamW by PyTorch."""
    layer = layer_of([case.get(name) for name in NAMES], r, lora_alpha, True)
    optimizer = optim.AdamW(layer.parameters(), lr=0.05, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (layer(minilora.tensor(case["x"])) ** 2).mean().backward()
        optimizer.step()
    np.testing.assert_allclose(fetch(layer.lora_A), case["A_trained"], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(fetch(layer.lora_B), case["B_trained"], rtol=1e-9, atol=1e-10)
    assert np.array_equal(fetch(layer.weight), case["W"])


# -- which gradients are wanted, and what is kept for them --------------------------------------------------


@pytest.mark.parametrize("trained", [set(c) - {""} for c in product(*(("", name) for name in NAMES))],
                         ids=lambda names: "".join(name for name in NAMES if name in names) or "none")
def test_every_subset_of_wanted_gradients(device, trained):
    shape = n, n_in, out, r = 5, 4, 3, 2
    *arrays, dy = draw(shape, seed=8)
    _, everything = engine_values(fused(0.5), arrays, dy)
    y, gradients = engine_values(fused(0.5), arrays, dy, trained)
    for name in NAMES:
        if name in trained:
            assert gradients[name].tobytes() == everything[name].tobytes()
        else:
            assert gradients[name] is None
    # Kept: x once for W and A, z for B; parameters' own arrays are free. x is a parameter here, so it is free too.
    tensors = [minilora.Parameter(place(a), name in trained) for name, a in zip(NAMES, arrays)]
    rows = engine.ledger(lora.lora_linear(*tensors, 0.5)).rows
    assert [row.nbytes for row in rows] == ([8 * n * r if "B" in trained else 0] if trained else [])
    if "x" not in trained:  # a batch of data, in place of a parameter
        tensors[0] = minilora.tensor(arrays[0])
        rows = engine.ledger(lora.lora_linear(*tensors, 0.5)).rows
        kept = (8 * n * n_in if trained & {"W", "A"} else 0) + (8 * n * r if "B" in trained else 0)
        assert [row.nbytes for row in rows] == ([kept] if trained else [])


@layers
@pytest.mark.parametrize("axes", [(6,), (2, 3), (2, 1, 3)], ids=str)
def test_layer_keeps_its_input_and_z(device, adapted, axes):
    *arrays, _ = draw((1, 8, 5, 2))
    layer = layer_of(arrays, 2, 2.0, adapted)
    loss = layer(minilora.tensor(np.ones(axes + (8,)))).sum()
    table = engine.ledger(loss)
    assert [row.op for row in table.rows] == ["LoRALinear", "Sum"]
    assert table.nbytes == 8 * 6 * (8 + 2)


def test_kept_for_two_layers_above_a_frozen_one(device):
    rng = np.random.default_rng(0)
    n = 6
    model = nn.Sequential(
        nn.Linear(8, 8, rng=rng).requires_grad(False), nn.Tanh(),  # below the first trained layer: nothing
        lora.Linear(8, 5, r=2, lora_alpha=2, rng=rng),  # x and z
        lora.Linear(5, 4, r=3, lora_alpha=3, rng=rng),
    )
    table = engine.ledger(model(minilora.tensor(np.ones((n, 8), "float32"))).sum())
    assert [(row.op, row.nbytes) for row in table.rows] == [
        ("LoRALinear", 4 * n * (8 + 2)), ("LoRALinear", 4 * n * (5 + 3)), ("Sum", 0)]


def test_input_that_the_layer_below_keeps_counts_once(device):
    rng = np.random.default_rng(0)
    model = nn.Sequential(lora.Linear(8, 5, r=2, lora_alpha=2, rng=rng), nn.ReLU(),
                          lora.Linear(5, 4, r=3, lora_alpha=3, rng=rng))
    table = engine.ledger(model(minilora.tensor(np.ones((6, 8), "float32"))).sum())
    assert [row.nbytes for row in table.rows] == [4 * 6 * (8 + 2), 4 * 6 * 5, 4 * 6 * 3, 0]


def test_nothing_is_kept_without_gradients(device):
    layer = lora.Linear(8, 5, r=2, lora_alpha=2, rng=np.random.default_rng(0))
    x = minilora.tensor(np.ones((6, 8), "float32"))
    with minilora.no_grad():
        assert layer(x).node is None
    layer.requires_grad(False)
    assert layer(x).node is None


def test_inputs_are_not_changed(device):
    *arrays, dy = draw((5, 4, 3, 2), seed=9)
    leaves = [minilora.Parameter(place(a)) for a in arrays]
    cotangent = place(dy)
    lora.lora_linear(*leaves, 0.5).backward(cotangent)
    assert [fetch(p).tobytes() for p in leaves] == [a.tobytes() for a in arrays]
    assert fetch(cotangent).tobytes() == dy.tobytes()


# -- what the formulas imply --------------------------------------------------------------------------------


@given(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)), st.booleans(),
       st.sampled_from(["float32", "float64"]), st.integers(0, 2 ** 32 - 1))
def test_at_the_start(device, shape, bias, dtype, seed):
    """B = 0: the base's output bit for bit, dA exactly 0, dB not."""
    *arrays, dy = draw(shape, seed, bias, dtype)
    arrays[4] = np.zeros_like(arrays[4])
    y, gradients = engine_values(fused(1.5), arrays, dy)
    base, _ = engine_values(lambda x, W, b, A, B: ops.linear(x, W, b), arrays, dy)
    assert y.tobytes() == base.tobytes()
    assert not gradients["A"].any()
    exact, sizes = plain(*arrays, dy, 1.5)
    n, n_in, *_ = shape
    assert (np.abs(gradients["B"] - exact["B"]) <= (gamma(n + n_in + 2, dtype) + 1e-14) * sizes["B"]).all()
    assert gradients["B"].any()


@layers
def test_first_step_moves_B_alone(device, adapted):
    rng = np.random.default_rng(1)
    base = nn.Linear(6, 4, rng=rng)
    layer = (lora.adapt(base, r=2, lora_alpha=4, rng=rng) if adapted else
             lora.Linear(6, 4, r=2, lora_alpha=4, rng=rng))
    before = {name: fetch(p) for name, p in layer.named_parameters()}
    optimizer = optim.SGD(layer.parameters(), lr=0.1)
    (layer(minilora.tensor(rng.standard_normal((5, 6)).astype("float32"))) ** 2).mean().backward()
    assert not fetch(layer.lora_A.grad).any() and fetch(layer.lora_B.grad).all()
    optimizer.step()
    moved = {name for name, p in layer.named_parameters() if fetch(p).tobytes() != before[name].tobytes()}
    assert moved == {"adapters.default.lora_B"}


def test_base_gradient_does_not_see_the_update_while_B_is_0(device):
    *arrays, dy = draw((5, 4, 3, 2), seed=10)
    arrays[4] = np.zeros_like(arrays[4])
    results = set()
    for s, factor in product((0.5, -3.0), (1.0, 100.0)):
        x, W, b, A, B = arrays
        _, gradients = engine_values(fused(s), (x, W, b, factor * A, B), dy)
        results.add((gradients["W"].tobytes(), gradients["b"].tobytes()))
    assert len(results) == 1


@given(st.integers(-12, 12), st.sampled_from(SHAPES[:5]), st.sampled_from(["float32", "float64"]))
def test_scale_moved_from_B_to_A(device, k, shape, dtype):
    """(cA, B/c) is the same update; dA becomes dA/c and dB becomes c dB. Exact for a power of two."""
    *arrays, dy = draw(shape, seed=11, dtype=dtype)
    c = 2.0 ** k
    x, W, b, A, B = arrays
    y, gradients = engine_values(fused(0.7), arrays, dy)
    y_scaled, scaled = engine_values(fused(0.7), (x, W, b, A * c, B / c), dy)
    assert y_scaled.tobytes() == y.tobytes()
    assert np.array_equal(scaled["A"] * c, gradients["A"]) and np.array_equal(scaled["B"] / c, gradients["B"])
    assert np.array_equal(scaled["x"], gradients["x"])


@given(st.integers(-8, 8), st.floats(0.125, 64), st.integers(1, 6))
def test_alpha_and_B_trade(device, k, alpha, r):
    """Doubling lora_alpha while halving B leaves the output. Exact for a power of two."""
    c = 2.0 ** k
    x, W, b, A, B, dy = draw((4, 5, 3, r), seed=12)
    y, gradients = engine_values(fused(lora.scaling(alpha, r)), (x, W, b, A, B), dy)
    y_traded, traded = engine_values(fused(lora.scaling(alpha * c, r)), (x, W, b, A, B / c), dy)
    assert y_traded.tobytes() == y.tobytes()
    assert np.array_equal(traded["A"], gradients["A"]) and np.array_equal(traded["B"] / c, gradients["B"])


@given(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)), st.integers(0, 99))
def test_rank_components_have_no_order(device, shape, seed):
    order = np.random.default_rng(seed).permutation(shape[3])
    *arrays, dy = integers(shape, seed=13)
    x, W, b, A, B = arrays
    y, gradients = engine_values(fused(2.0), arrays, dy)
    y_permuted, permuted = engine_values(fused(2.0), (x, W, b, A[order], B[:, order]), dy)
    assert np.array_equal(y_permuted, y) and np.array_equal(permuted["x"], gradients["x"])
    assert np.array_equal(permuted["A"], gradients["A"][order])
    assert np.array_equal(permuted["B"], gradients["B"][:, order])


@shapes
def test_rotated_rank_space_leaves_the_delta(device, shape):
    _, _, _, A, B, _ = draw(shape, seed=14)
    r = shape[3]
    R, _ = np.linalg.qr(np.random.default_rng(15).standard_normal((r, r)))
    D = fetch(lora.delta(place(A), place(B), 1.5))
    rotated = fetch(lora.delta(place(R @ A), place(B @ R.T), 1.5))
    bound = 1.5 * 16 * r * EPS["float64"] * np.linalg.norm(A) * np.linalg.norm(B)
    assert np.abs(rotated - D).max() <= bound


@given(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4)))
def test_permuting_the_batch_permutes_the_output(device, shape):
    *arrays, dy = integers(shape, seed=16)
    order = np.random.default_rng(17).permutation(shape[0])
    y, gradients = engine_values(fused(2.0), arrays, dy)
    y_permuted, permuted = engine_values(fused(2.0), [arrays[0][order], *arrays[1:]], dy[order])
    assert np.array_equal(y_permuted, y[order]) and np.array_equal(permuted["x"], gradients["x"][order])
    assert all(np.array_equal(permuted[name], gradients[name]) for name in NAMES[1:])


# -- scaling and delta --------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha, r, s", [(8, 8, 1.0), (16, 8, 2.0), (1, 4, 0.25), (-3.0, 2, -1.5), (0.1, 3, 0.1 / 3)])
def test_scaling(alpha, r, s):
    assert lora.scaling(alpha, r) == s
    assert type(lora.scaling(np.float64(alpha), r)) is float  # an array scalar would promote float32 arrays


@pytest.mark.parametrize("r", [0, -1, 2.0, 2.5, True, "8", None, np.float64(2)])
def test_scaling_rank(r):
    with pytest.raises(ConfigError, match="r must be an int >= 1, got "):
        lora.scaling(1.0, r)


@pytest.mark.parametrize("alpha", [np.nan, np.inf, -np.inf, "8", None, True, 1j, 10 ** 400], ids=lambda a: str(a)[:5])
def test_scaling_alpha(alpha):
    with pytest.raises(ConfigError, match="lora_alpha must be a finite number, got "):
        lora.scaling(alpha, 4)


@pytest.mark.parametrize("alpha", [0, 0.0, -0.0])
def test_scaling_alpha_0(alpha):
    with pytest.raises(ConfigError, match="nothing would ever train"):
        lora.scaling(alpha, 4)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@shapes
def test_delta(device, shape, dtype):
    _, _, _, A, B, _ = integers(shape, seed=18, dtype=dtype)
    D = fetch(lora.delta(place(A), place(B), 0.5))
    assert D.dtype == dtype and np.array_equal(D, 0.5 * (B.astype("float64") @ A))


@shapes
def test_delta_has_rank_r_at_most(device, shape):
    _, n_in, out, r = shape
    _, _, _, A, B, _ = draw(shape, seed=19)
    sigma = np.linalg.svd(fetch(lora.delta(place(A), place(B), 1.5)), compute_uv=False)
    assert (sigma[r:] < EPS["float64"] * max(n_in, out) * sigma[0]).all()
    assert (sigma[:r] > 1e-3).all()


def test_full_rank_expresses_every_delta(device):
    target = np.random.default_rng(20).standard_normal((4, 6))
    U, sigma, V = np.linalg.svd(target, full_matrices=False)
    s = lora.scaling(3, 4)
    D = fetch(lora.delta(place(V), place(U * sigma / s), s))
    assert np.linalg.norm(D - target) <= 1e-13 * np.linalg.norm(target)


# -- shapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong, match", [
    ({"x": (5, 3)}, r"last axis 4 .*got \(5, 3\)"), ({"x": ()}, r"last axis 4 .*got \(\)"),
    ({"b": (4,)}, r"bias of shape \(3,\).*got \(4,\)"), ({"b": (1, 3)}, r"got \(1, 3\)"),
    ({"A": (4, 2)}, r"A \(4, 2\) and B \(3, 2\)"), ({"A": (3, 4)}, r"A \(3, 4\) and B \(3, 2\)"),
    ({"B": (2, 3)}, r"A \(2, 4\) and B \(2, 3\).*transpose"), ({"B": (3, 1)}, r"B \(3, 1\)"),
    ({"A": (4,)}, r"A \(4,\)"), ({"A": ()}, r"A \(\)"), ({"W": (4,)}, r"\(4,\)"),
], ids=str)
def test_shapes_that_do_not_fit(device, wrong, match):
    right = {"x": (5, 4), "W": (3, 4), "b": (3,), "A": (2, 4), "B": (3, 2)}
    arrays = {name: minilora.tensor(np.zeros(shape)) for name, shape in (right | wrong).items()}
    with pytest.raises(ShapeError, match=match):
        lora.lora_linear(*arrays.values(), 1.0)
