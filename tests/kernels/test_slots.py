"""Low-rank updates of fused projections by their kernels: whole numbers to the bit, any slots, rank, size; bits that stay."""
import itertools

import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora import Parameter, Tensor, lora, optim, quant
from minilora.kernels.gpu import low_rank as gpu_low_rank
from minilora.kernels.gpu import merged as gpu_merged
from minilora.lora.gradients.fused import block_diagonal, lora_merged_linear, lora_merged_update

S = 0.5  # a power of two: whole numbers stay exact
SLOTS = {"qv": (True, False, True), "qkv": (True, True, True), "v": (False, False, True), "uneven": (True, True, False, True),
         "one": (True,), "q": (True, False)}
ROUTES = {"kernels": (1 << 40, 1 << 40), "u and dB by cuBLAS": (1, 1 << 40), "all by cuBLAS": (1, 1)}
slots = pytest.mark.parametrize("enable", SLOTS.values(), ids=SLOTS)


def drawn(enable, N=7, n_in=9, o=5, r=2, dtype="float32", seed=0, whole=True):
    """x, W, b, A, B and dy on the host."""
    L, m, rng = len(enable), sum(enable), np.random.default_rng(seed)
    shapes = [(N, n_in), (L * o, n_in), (L * o,), (m * r, n_in), (m * o, r), (N, L * o)]
    return [(rng.integers(-4, 5, s) if whole else rng.standard_normal(s)).astype(dtype) for s in shapes]


def formulas(enable, x, W, b, A, B, dy, s=S):
    """y and all gradients in float64, by the block-diagonal factor."""
    x, W, b, A, B, dy = (a.astype("float64") for a in (x, W, b, A, B, dy))
    _, whole, _ = block_diagonal(A, B, s, enable, len(W))
    z, u, o, r = x @ A.T, dy @ whole, len(W) // len(enable), B.shape[1]
    dwhole = s * dy.T @ z
    dB = [dwhole[i * o:(i + 1) * o, e * r:(e + 1) * r] for e, i in enumerate(np.flatnonzero(enable))]
    return [x @ W.T + b + s * z @ whole.T, dy @ W + s * u @ A, dy.T @ x, dy.sum(axis=0), s * u.T @ x, np.concatenate(dB)]


def computed(enable, hosts, needs=(True,) * 5, layout=place, s=S):
    """y and the gradients, None where none is wanted."""
    *arrays, dy = (layout(a) for a in hosts)
    y = lora_merged_linear(*(Parameter(a) if n else Tensor(a) for a, n in zip(arrays, needs)), s, enable)
    return [fetch(y), *(None if d is None else fetch(d) for d in (y.node.backward(dy) if any(needs) else [None] * 5))]


def assert_same(got, expected, what=""):
    for one, other in zip(got, expected):
        if one is not None:
            np.testing.assert_array_equal(one, other, str(what))


@pytest.fixture
def few(card):
    """Warps for blocks: the emulator's time goes with the threads."""
    if card:
        card.threads = 32
    return card


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch):
    u, everything = ROUTES[request.param]
    monkeypatch.setattr(gpu_low_rank, "U_BY_CUBLAS", u), monkeypatch.setattr(gpu_low_rank, "ALL_BY_CUBLAS", everything)
    return request.param


@slots
def test_all_subsets_of_needs(enable, route, few):
    """Whole numbers to the bit, whoever else is wanted, and no kernel started in vain."""
    hosts = drawn(enable)
    whole = formulas(enable, *hosts)
    subsets = itertools.product([False, True], repeat=5)
    for needs in subsets if enable == SLOTS["qv"] else [(True,) * 5, (False, False, True, False, True)]:
        if few:
            few.launches.clear()
        x, _, _, A, B = needs
        assert_same(computed(enable, hosts, needs), whole, needs)
        if few:
            expected = {"kernels": ["low_rank_forward"] + ["low_rank_u_dB"] * (x or A or B) + ["low_rank_dA_dx"] * (x or A),
                        "u and dB by cuBLAS": ["low_rank_forward"] + ["low_rank_dA_dx"] * (x or A), "all by cuBLAS": []}[route]
            assert [name.removesuffix("_float") for name, *_ in few.launches] == expected


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 4, 3), (2, 37, 40, 8), (17, 5, 35, 5), (3, 4, 2, 16), (3, 4, 2, 17),
                                   (513, 3, 5, 1), (1030, 2, 3, 3)], ids="{0[0]}x{0[1]}x{0[2]}-r{0[3]}".format)
def test_any_shape_and_rank(shape, route, few):
    """From rank 17 on by cuBLAS; with more than 16 ranks in all slots together, dA and dx."""
    for enable in (SLOTS["qv"], SLOTS["uneven"]):
        hosts = drawn(enable, *shape, "float64" if shape[3] == 5 else "float32")
        assert_same(computed(enable, hosts), formulas(enable, *hosts))
        if few and route == "kernels":
            names = {name.rpartition("_")[0] for name, *_ in few.launches}
            assert ("low_rank_forward" in names) == (shape[3] <= 16)
            few.launches.clear()


@slots
def test_the_update_alone(enable, few):
    """What the layer gives without a weight, with exact zeros in the slots that have no update."""
    x, W, b, A, B, dy = drawn(enable, seed=1)
    expected = formulas(enable, x, 0 * W, 0 * b, A, B, dy)
    for needs in itertools.product([False, True], repeat=3):
        y = lora_merged_update(*(Parameter(place(a)) if n else Tensor(place(a)) for a, n in zip((x, A, B), needs)), S, enable,
                               len(W))
        got = [fetch(y), *(None if d is None else fetch(d) for d in (y.node.backward(place(dy)) if any(needs) else [None] * 3))]
        assert_same(got, [expected[0], expected[1], *expected[4:]], needs)
        off = np.repeat(~np.array(enable), 5)
        assert not fetch(y)[:, off].any()


@pytest.mark.parametrize("chunk", [512, 4])
def test_the_same_bits_again_and_on_any_card(chunk, card, monkeypatch):
    monkeypatch.setattr(gpu_low_rank, "CHUNK", chunk)
    hosts, bits = drawn(SLOTS["qv"], 21, 37, 40, 5, whole=False), set()
    for grid in [None, 1, 3, 50] if card else [None] * 3:
        if card:
            card.grid = grid
        bits.add(b"".join(a.tobytes() for a in computed(SLOTS["qv"], hosts)))
    assert len(bits) == 1


def test_one_slot_has_the_bits_of_the_plain_layer(card):
    """It is that layer, also where rounding shows."""
    x, W, b, A, B, dy = drawn((True,), 21, 37, 40, 5, whole=False)
    leaves = [Parameter(place(a)) for a in (x, W, b, A, B)]
    y = lora.lora_linear(*leaves, 1.5)
    plain = [fetch(y), *(fetch(d) for d in y.node.backward(place(dy)))]
    for one, other in zip(computed((True,), [x, W, b, A, B, dy], s=1.5), plain):
        assert one.tobytes() == other.tobytes()


def test_without_an_update_the_bits_of_the_base(card):
    """With B = 0 everywhere, and in a slot that has none always."""
    x, W, b, A, B, dy = drawn(SLOTS["qv"], 40, 24, 32, 4, whole=False)
    base = fetch(minilora.ops.linear(*map(place, (x, W, b))))
    assert computed(SLOTS["qv"], [x, W, b, A, 0 * B, dy])[0].tobytes() == base.tobytes()
    assert computed(SLOTS["qv"], [x, W, b, A, B, dy])[0][:, 32:64].tobytes() == base[:, 32:64].tobytes()


LAYOUTS = {
    "columns": lambda a: place(a.T.copy(order="C")).T,
    "backwards": lambda a: place(a[..., ::-1])[..., ::-1],
    "every other": lambda a: place(np.repeat(a, 2, axis=-1))[..., ::2],
    "not aligned": lambda a: place(np.concatenate([a.reshape(-1)[:1], a.reshape(-1)]))[1:].reshape(a.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, route, few):
    for enable in (SLOTS["qv"], SLOTS["uneven"]):
        hosts = drawn(enable, 7, 12, 8, 3)
        assert_same(computed(enable, hosts, layout=LAYOUTS[layout]), formulas(enable, *hosts))


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_any_axes_with_and_without_a_bias(lead, bias, few):
    enable, N = SLOTS["qv"], int(np.prod(lead))
    x, W, b, A, B, dy = drawn(enable, max(1, N))
    x, dy = (a[:N].reshape(*lead, a.shape[1]) for a in (x, dy))
    p = [Parameter(place(a)) for a in (x, W, b, A, B)]
    y = lora_merged_linear(p[0], p[1], p[2] if bias else None, p[3], p[4], S, enable)
    y.backward(place(dy))
    expected = formulas(enable, x.reshape(-1, 9), W, b if bias else 0 * b, A, B, dy.reshape(-1, 15))
    np.testing.assert_array_equal(fetch(y), expected[0].reshape(*lead, 15))
    for parameter, gradient, name in zip(p, expected[1:], "xWbAB"):
        if bias or name != "b":
            np.testing.assert_array_equal(fetch(parameter.grad), gradient.reshape(parameter.shape), name)


@pytest.mark.parametrize("shape", [(0, 3, 2, 1), (3, 0, 2, 1), (3, 2, 0, 1), (3, 2, 2, 0)])
def test_empty_arrays_take_the_reference(shape, card):
    hosts = drawn(SLOTS["qv"], *shape)
    assert_same(computed(SLOTS["qv"], hosts), formulas(SLOTS["qv"], *hosts))
    assert not card or not card.launches


@pytest.mark.parametrize(("L", "kernel"), [(62, True), (63, False), (70, False)])
def test_many_slots(L, kernel, few):
    """As many as a mask has bits; more take the reference."""
    enable = tuple(i in (0, 7, L - 1) for i in range(L))
    hosts = drawn(enable, 3, 4, 2, 2)
    assert_same(computed(enable, hosts), formulas(enable, *hosts))
    if few:
        assert bool(few.launches) is kernel
    y = lora_merged_linear(*(Parameter(place(a)) for a in hosts[:5]), S, enable)
    assert ("*" in str(minilora.engine.ledger(y))) is kernel


def test_what_is_not_finite_goes_where_the_reference_lets_it_go(few):
    for i, name in enumerate("xWbAB"):
        for number in (np.inf, -np.inf, np.nan):
            hosts = drawn(SLOTS["qv"], 3, 5, 4, 3, whole=False)
            hosts[i].reshape(-1)[1] = number
            fast = computed(SLOTS["qv"], hosts)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(gpu_merged, "has_kernel", lambda *given: False)
                slow = computed(SLOTS["qv"], hosts)
            for one, other in zip(fast, slow):
                for special in (np.isnan, np.isposinf, np.isneginf):
                    np.testing.assert_array_equal(special(one), special(other), f"{number} in {name}")


@pytest.mark.parametrize("chunk", [512, 4])
def test_gradients_are_written_where_the_optimizer_wants_them(chunk, card, monkeypatch):
    monkeypatch.setattr(gpu_low_rank, "CHUNK", chunk)
    hosts = drawn(SLOTS["qv"])
    x, W, b, *factors = (place(a) for a in hosts[:5])
    A, B = (Parameter(f) for f in factors)
    optimizer = optim.SGD([A, B], lr=0.0)
    for times in (1, 2):  # a second gradient is added
        lora_merged_linear(x, W, b, A, B, S, SLOTS["qv"]).backward(place(hosts[5]))
        assert all(p.gathered is p.room is not None for p in (A, B))
        for p, expected in zip((A, B), formulas(SLOTS["qv"], *hosts)[4:]):
            np.testing.assert_array_equal(fetch(p.gathered), times * expected)
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "int8", "nf4"])
def test_a_stored_base_keeps_its_products(kind, card):
    """The same as the update beside the frozen layer."""
    layer = lora.MergedLinear(64, 12, r=2, enable_lora=SLOTS["qv"], rng=0)
    rng = np.random.default_rng(0)
    layer.lora_B.data[...] = place(rng.standard_normal((8, 2)), "float32")
    quant.quantize(layer, kind)
    x, dy = place(rng.standard_normal((9, 64)), "float32"), place(rng.standard_normal((9, 12)), "float32")
    given, beside = Parameter(x), Parameter(x)
    y = layer(given)
    y.backward(dy)
    grads = [fetch(p.grad) for p in (given, layer.lora_A, layer.lora_B)]
    for p in (layer.lora_A, layer.lora_B):
        p.grad = None
    apart = layer.frozen(beside) + layer.update(beside)
    apart.backward(dy)
    for one, other in zip([fetch(y), *grads], [fetch(apart), *(fetch(p.grad) for p in (beside, layer.lora_A, layer.lora_B))]):
        np.testing.assert_allclose(one, other, rtol=0, atol=64 * np.finfo("float32").eps * abs(other).max())


def test_a_cotangent_of_another_dtype_takes_the_reference(card):
    *arrays, dy = (place(a) for a in drawn(SLOTS["qv"]))
    y = lora_merged_linear(*map(Parameter, arrays), S, SLOTS["qv"])
    for one, other in zip(*(y.node.backward(dy.astype(dtype)) for dtype in ("float32", "float64"))):
        np.testing.assert_array_equal(fetch(one), fetch(other))
