"""LoRALinear by its kernels: formulas in float64, whole numbers to the bit, any shape and rank, what takes the reference."""
import importlib
import itertools
import math
from pathlib import Path

import emulator
import numpy as np
import pytest
from conftest import fetch, need_gpu, place

import minilora
from minilora import Parameter, Tensor, backend, half, lora, nn, optim, quant
from minilora.kernels.gpu import low_rank as gpu_low_rank
from minilora.lora import lora_linear

S = 0.5  # a power of two: whole numbers stay exact
NAMES = "xWbAB"


def drawn(N, n_in, n_out, r, dtype, whole=False, seed=0):
    """x, W, b, A, B and dy on the host."""
    rng = np.random.default_rng(seed)
    shapes = [(N, n_in), (n_out, n_in), (n_out,), (r, n_in), (n_out, r), (N, n_out)]
    return [(rng.integers(-4, 5, s) if whole else rng.standard_normal(s)).astype(dtype) for s in shapes]


def formulas(x, W, b, A, B, dy, s=S):
    """y and the gradients of x, W, b, A, B in float64, in the same letters as the derivation."""
    x, W, b, A, B, dy = (a.astype("float64") for a in (x, W, b, A, B, dy))
    z, u = np.einsum("ni,ji->nj", x, A), np.einsum("nk,kj->nj", dy, B)
    return [np.einsum("ni,ki->nk", x, W) + b + s * np.einsum("nj,kj->nk", z, B),
            np.einsum("nk,ki->ni", dy, W) + s * np.einsum("nj,ji->ni", u, A), np.einsum("nk,ni->ki", dy, x), dy.sum(axis=0),
            s * np.einsum("nj,ni->ji", u, x), s * np.einsum("nk,nj->kj", dy, z)]


def bounds(hosts, dtype):
    """n eps, for n numbers that are added up on the way to one of them, times the formulas of absolute values."""
    (N, n_in), (n_out, r) = hosts[0].shape, hosts[4].shape
    n = N + n_in + n_out + r + 8
    return [n * np.finfo(dtype).eps * a for a in formulas(*map(abs, hosts))]


def computed(hosts, needs=(True,) * 5, layout=place, s=S):
    """y and the gradients, None where none is wanted."""
    *arrays, dy = (layout(a) for a in hosts)
    y = lora_linear(*(Parameter(a) if n else Tensor(a) for a, n in zip(arrays, needs)), s)
    return [fetch(y), *(None if d is None else fetch(d) for d in (y.node.backward(dy) if any(needs) else [None] * 5))]


SHAPES = [(1, 5, 4, 1), (2, 1, 1, 1), (31, 3, 1, 2), (127, 1, 7, 4), (128, 11, 10, 1), (129, 7, 33, 3), (5, 301, 130, 8),
          (4, 67, 259, 5), (513, 3, 5, 1), (1030, 4, 35, 8), (4097, 2, 3, 2), *((3, 9, 10, r) for r in range(1, 18))]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=[f"{N}x{i}x{o}-r{r}" for N, i, o, r in SHAPES])
def test_the_formulas(shape, dtype, card):
    """Within n eps of float64; whole numbers, whose sums are exact in any order, to the bit."""
    hosts = drawn(*shape, dtype)
    if card and shape[0] > 100:
        card.threads = 32  # a warp to a block: the emulator's time goes with the threads
    for got, expected, bound in zip(computed(hosts), formulas(*hosts), bounds(hosts, dtype)):
        assert (got.dtype, got.shape) == (dtype, expected.shape)
        assert (abs(got - expected) <= bound).all()
    whole = drawn(*shape, dtype, whole=True)
    for got, expected in zip(computed(whole), formulas(*whole)):
        np.testing.assert_array_equal(got, expected)
    if card:
        assert bool(card.launches) == (shape[3] <= 16)


@pytest.mark.parametrize("by_cublas", ["u and dB", "all"])
@pytest.mark.parametrize("shape", [(9, 6, 5, 2), (37, 11, 7, 16), (513, 3, 5, 1)], ids=["r2", "r16", "in chunks"])
def test_products_by_cublas(by_cublas, shape, card, monkeypatch):
    """With many rows: whole numbers to the bit, whoever else is wanted, and no kernel started in vain."""
    monkeypatch.setattr(gpu_low_rank, "U_BY_CUBLAS", 1)
    monkeypatch.setattr(gpu_low_rank, "ALL_BY_CUBLAS", 1 if by_cublas == "all" else 1 << 40)
    if card and shape[0] > 100:
        card.threads = 32
    hosts = drawn(*shape, "float32", whole=True)
    whole = formulas(*hosts)
    for needs in itertools.product([False, True], repeat=5):
        if card:
            card.launches.clear()
        for one, other in zip(computed(hosts, needs), whole):
            if one is not None:
                np.testing.assert_array_equal(one, other, f"{needs}")
        if card and by_cublas == "all":
            assert not card.launches
        elif card:
            x, _, _, A, _ = needs
            names = [name.removesuffix("_float") for name, *_ in card.launches]
            assert names == (["low_rank_forward"] + ["low_rank_dA_dx"] * (x or A) + ["low_rank_sums"] * (A and shape[0] > 512))


@pytest.mark.parametrize("shape", [(5, 7, 6, 2), (40, 24, 32, 4)], ids=["odd", "aligned"])
def test_an_adapter_that_adds_nothing_leaves_the_bits(shape, device):
    """With B = 0 the layer gives what the bare one gives: both ask for the product and its bias in the same way."""
    x, W, b, A, B, _ = drawn(*shape, "float32")
    adapted = lora_linear(*map(place, (x, W, b, A, 0.0 * B)), S)
    assert fetch(adapted).tobytes() == fetch(minilora.ops.linear(*map(place, (x, W, b)))).tobytes()


ON_A_GPU = [(128, 1001, 1000, 1), (4096, 768, 2304, 8), (1025, 257, 300, 16), (70001, 33, 65, 3), (300000, 5, 4, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ON_A_GPU, ids=[f"{N}x{i}x{o}-r{r}" for N, i, o, r in ON_A_GPU])
def test_the_formulas_on_a_gpu(shape):
    need_gpu()
    with backend.use("gpu"):
        hosts = drawn(*shape, "float32")
        for got, expected, bound in zip(computed(hosts), formulas(*hosts), bounds(hosts, "float32")):
            assert (abs(got - expected) <= bound).all()


@pytest.mark.parametrize("chunk", [512, 4])
def test_all_subsets_of_needs(chunk, card, monkeypatch):
    """Each gradient is right whoever else is wanted, and nothing more is started than it takes."""
    monkeypatch.setattr(gpu_low_rank, "CHUNK", chunk)
    hosts = drawn(9, 6, 5, 2, "float32", whole=True)
    whole = formulas(*hosts)
    for needs in itertools.product([False, True], repeat=5):
        if card:
            card.launches.clear()
        got = computed(hosts, needs)
        assert [d is not None for d in got[1:]] == list(needs)
        for one, other in zip(got, whole):
            if one is not None:
                np.testing.assert_array_equal(one, other, f"{needs}")
        if card:
            x, _, _, A, B = needs
            names = [name.removesuffix("_float") for name, *_ in card.launches]
            expected = ["low_rank_forward"] + ["low_rank_u_dB"] * (x or A or B) + ["low_rank_dA_dx"] * (x or A)
            assert names == expected + ["low_rank_sums"] * ((A or B) and chunk < 9)


LAYOUTS = {
    "columns": lambda a: place(a.T.copy(order="C")).T,
    "backwards": lambda a: place(a[..., ::-1])[..., ::-1],
    "every other": lambda a: place(np.repeat(a, 2, axis=-1))[..., ::2],
    "not aligned": lambda a: place(np.concatenate([a.reshape(-1)[:1], a.reshape(-1)]))[1:].reshape(a.shape),
    "read again": lambda a: backend.current_device().xp.broadcast_to(place(a[:1]), a.shape),
}


@pytest.mark.parametrize("r", [1, 3, 8, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, r, card):
    hosts = drawn(7, 12, 10, r, "float32", whole=True)
    if layout == "read again":
        hosts = [np.broadcast_to(a[:1], a.shape) for a in hosts]
    for got, expected in zip(computed(hosts, layout=LAYOUTS[layout]), formulas(*hosts)):
        np.testing.assert_array_equal(got, expected)
    if card:
        assert len(card.launches) == 3


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_any_axes_with_and_without_a_bias(lead, bias, card):
    x, W, b, A, B, dy = drawn(max(1, math.prod(lead)), 5, 4, 2, "float32", whole=True)
    x, dy = (a[:math.prod(lead)].reshape(*lead, a.shape[1]) for a in (x, dy))
    p = [Parameter(place(a)) for a in (x, W, b, A, B)]
    y = lora_linear(p[0], p[1], p[2] if bias else None, p[3], p[4], S)
    y.backward(place(dy))
    expected = formulas(x.reshape(-1, 5), W, b if bias else 0 * b, A, B, dy.reshape(-1, 4))
    np.testing.assert_array_equal(fetch(y), expected[0].reshape(*lead, 4))
    for parameter, gradient, name in zip(p, expected[1:], NAMES):
        if bias or name != "b":
            np.testing.assert_array_equal(fetch(parameter.grad), gradient.reshape(parameter.shape), name)
    if card:
        assert bool(card.launches) == (math.prod(lead) > 0)


@pytest.mark.parametrize("s", [2, -1, np.float32(0.5), np.float64(0.5), 0.0])
def test_any_number_as_scaling(s, card):
    for dtype in ("float32", "float64"):
        hosts = drawn(3, 4, 5, 2, dtype, whole=True)
        for got, expected in zip(computed(hosts, s=s), formulas(*hosts, float(s))):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0, 2), (3, 2, 0)])
def test_empty_arrays_take_the_reference(shape, card):
    hosts = drawn(*shape, 1, "float32", whole=True)
    for got, expected in zip(computed(hosts), formulas(*hosts)):
        np.testing.assert_array_equal(got, expected)
    assert not card or not card.launches


def test_the_same_bits_again_and_on_any_card(card, monkeypatch):
    """Whatever number of blocks a card runs, and however often."""
    monkeypatch.setattr(gpu_low_rank, "CHUNK", 8)
    hosts, bits = drawn(21, 37, 70, 5, "float32"), set()
    for grid in [None, 1, 3, 50] if card else [None] * 3:
        if card:
            card.grid = grid
        bits.add(b"".join(a.tobytes() for a in computed(hosts)))
    assert len(bits) == 1


def test_what_is_not_finite_goes_where_the_reference_lets_it_go(card):
    for i, name in enumerate("xWbAB"):
        # cuBLAS rounds a product and a sum at once, so that a sum may stay below the largest number where ours does not
        for number in (np.inf, -np.inf, np.nan, *[3e38] * (card is not None)):
            hosts = drawn(3, 5, 4, 3, "float32")
            hosts[i].reshape(-1)[1] = number
            fast = computed(hosts)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(gpu_low_rank, "has_kernel", lambda *given: False)
                slow = computed(hosts)
            for one, other in zip(fast, slow):
                for special in (np.isnan, np.isposinf, np.isneginf):
                    np.testing.assert_array_equal(special(one), special(other), f"{number} in {name}")


@pytest.mark.parametrize("chunk", [512, 4])
def test_gradients_are_written_where_the_optimizer_wants_them(chunk, card, monkeypatch):
    monkeypatch.setattr(gpu_low_rank, "CHUNK", chunk)
    hosts = drawn(9, 6, 5, 2, "float32", whole=True)
    x, W, b, *factors = (place(a) for a in hosts[:5])
    A, B = (Parameter(f) for f in factors)
    optimizer = optim.SGD([A, B], lr=0.0)
    lora_linear(x, W, b, A, B, S).backward(place(hosts[5]))
    assert all(p.gathered is p.room is not None for p in (A, B))
    for p, expected in zip((A, B), formulas(*hosts)[4:]):
        np.testing.assert_array_equal(fetch(p.gathered), expected)
    lora_linear(x, W, b, A, B, S).backward(place(hosts[5]))  # a second one is added
    for p, expected in zip((A, B), formulas(*hosts)[4:]):
        np.testing.assert_array_equal(fetch(p.gathered), 2 * expected)
    optimizer.zero_grad()


def test_factors_that_are_one_parameter(card):
    """A and B tied, and a gradient for each of the two places."""
    x, W, b, A, _, dy = drawn(3, 4, 4, 4, "float32", whole=True)
    p = Parameter(place(A))
    lora_linear(place(x), place(W), None, p, p, S).backward(place(dy))
    *_, dA, dB = formulas(x, W, 0 * b, A, A, dy)
    np.testing.assert_array_equal(fetch(p.grad), dA + dB)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "int8", "nf4"])
def test_a_stored_base_keeps_its_products(kind, card):
    layers = []
    for r in (2, 17):  # 17: the reference
        layer = lora.adapt(nn.Linear(64, 6, rng=0), r=r, lora_alpha=2 * r, rng=1)
        A, B = (place(np.pad(a, widths)) for a, widths in zip(
            drawn(1, 64, 6, 2, "float32")[3:5], ([(0, r - 2), (0, 0)], [(0, 0), (0, r - 2)])))
        layer.lora_A.data[...], layer.lora_B.data[...] = A, B
        quant.quantize(layer, kind)
        layers.append(layer)
    x, dy = (place(np.random.default_rng(i).standard_normal(shape), "float32") for i, shape in enumerate([(9, 64), (9, 6)]))
    results = []
    for layer in layers:
        if card:
            card.launches.clear()
        given = Parameter(x)
        layer(given).backward(dy)
        results.append([fetch(given.grad), fetch(layer.lora_A.grad)[:2], fetch(layer.lora_B.grad)[:, :2]])
        if card:
            assert len(card.launches) == (3 if layer is layers[0] else 0)
    for one, other in zip(*results):
        np.testing.assert_allclose(one, other, rtol=0, atol=64 * np.finfo("float32").eps * abs(other).max())


def test_float16_and_mixed_precision_compute_in_float32(card):
    hosts = drawn(5, 6, 7, 3, "float16", whole=True)
    for got, expected in zip(computed(hosts), formulas(*hosts)):
        assert got.dtype == "float16"
        np.testing.assert_array_equal(got, expected)
    single = [a.astype("float32") for a in hosts]
    with half.mixed():
        *given, dy = (place(a) for a in single)
        given[0] = given[0].astype("float16")
        parameters = [Parameter(a) for a in given]
        y = lora_linear(*parameters, S)
        y.backward(dy.astype("float16"))
    for p, expected in zip(parameters, formulas(*single)[1:]):
        np.testing.assert_array_equal(fetch(p.grad), expected)
    if card:
        assert {name for name, *_ in card.launches} == {f"low_rank_{n}_float" for n in ("forward", "u_dB", "dA_dx")}


def test_a_cotangent_of_another_dtype_takes_the_reference(card):
    x, W, b, A, B, dy = (place(a) for a in drawn(3, 4, 5, 2, "float32", whole=True))
    y = lora_linear(*map(Parameter, (x, W, b, A, B)), S)
    for one, other in zip(*(y.node.backward(dy.astype(dtype)) for dtype in ("float32", "float64"))):
        np.testing.assert_array_equal(fetch(one), fetch(other))


def test_what_is_kept_and_what_a_ledger_says(card):
    """As much as the reference keeps; the star of a kernel where there is one."""
    for r, star in ((2, True), (17, False)):
        hosts = [place(a) for a in drawn(5, 6, 7, r, "float32")[:5]]
        x, W, b, A, B = (Parameter(a, trainable=name in "AB") for a, name in zip(hosts, NAMES))
        ledger = minilora.engine.ledger(lora_linear(x, W, b, A, B, S))
        assert ledger.nbytes == 4 * 5 * r and ("*" in str(ledger)) == star


def test_what_the_benchmark_compares_is_the_same(monkeypatch):
    """bench_gpu_low_rank.py, without its times."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    bench = importlib.import_module("bench_gpu_low_rank")
    monkeypatch.setattr(bench, "REPEATS", 1), monkeypatch.setattr(bench, "TURNS", 1)
    monkeypatch.setattr(gpu_low_rank, "CHUNK", 4)
    with emulator.emulated_device() as machine:
        rows = bench.measured(backend.current_device().xp, (9, 6, 5), 2)
        assert [row["part"] for row in rows] == ["z, y += b + s z B^T", "u, dB", "dA, dx += s u A", "LoRAUpdate, both ways"]
        assert len({name for name, *_ in machine.launches}) == 4
        times = {key: 1234.56 for key in rows[0] if "," in key}
        assert {len(line) for line in bench.table([{**rows[0], **times, "shape": (4096, 4096, 4096)}])} <= set(range(81))
        for part, name in (("z, y += b + s z B^T", "y"), ("dA, dx += s u A", "dx")):
            sides = []
            for make in (bench.kernels, bench.chain):
                arrays = bench.drawn(9, 6, 5, 2)
                make(backend.current_device().xp, **arrays)[part]()
                sides.append(fetch(arrays[name]))
            np.testing.assert_allclose(*sides, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("N", "together"), [(1, 1), (128, 1), (511, 1), (512, 2), (2047, 4), (2048, 8), (10 ** 6, 8)])
def test_rows_of_a_block(N, together):
    assert gpu_low_rank.rows_together(N) == together


@pytest.mark.parametrize(("N", "chunk"), [(1, 1), (128, 128), (512, 512), (513, 512), (2 ** 18, 512), (2 ** 18 + 1, 1024)])
def test_rows_of_a_chunk(N, chunk):
    assert gpu_low_rank.chunk_of(N) == chunk
    assert -(-N // chunk) <= gpu_low_rank.MANY


def test_the_numbers_of_the_text():
    """gpu/low_rank.py counts blocks as the text does."""
    text = gpu_low_rank.__file__.replace("gpu/low_rank.py", "cuda/low_rank.cu")
    with open(text, encoding="utf-8") as file:
        lines = file.read()
    for name, number in (("THREADS", gpu_low_rank.THREADS), ("ROWS", gpu_low_rank.ROWS), ("WIDE", gpu_low_rank.COLUMNS)):
        assert f"#define {name} {number} " in " ".join(lines.split()), name
