"""Every override of the GPU equals its reference: emulated with the text of its kernels, and on a real GPU (-m gpu)."""
import itertools

import emulator
import numpy as np
import pytest
import standin
from cases import CASES, one_of_each
from conftest import fetch, place
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora
from minilora import Parameter, Tensor, backend, engine, ops, versions
from minilora.collective import links
from minilora.graphs import played
from minilora.kernels import launch
from minilora.kernels.gpu import attention as gpu_attention
from minilora.lora.gradient import LoRALinear, LoRAUpdate, lora_linear, lora_update
from minilora.lora.gradients import dora
from minilora.lora.gradients.convolution import LoRAConv, lora_conv1d
from minilora.lora.gradients.fused import LoRAMergedLinear, LoRAMergedUpdate, lora_merged_linear, lora_merged_update
from minilora.ops.attention import ScaledDotProduct
from minilora.ops.conv import Conv
from minilora.ops.embedding import planned
from minilora.optim.adam import adam_update
from minilora.optim.sgd import sgd_update
from minilora.quant.halves import narrowed

OVERRIDES = versions.load("gpu")
OPERATIONS = [pytest.param(op, id=op.__name__) for op in OVERRIDES if isinstance(op, type)]
BY_PRODUCTS = {ops.Linear}  # no kernel of their own
LONG = {  # many threads, and rows that no power of two divides
    ops.LayerNorm: ((7, 301), (301,), (301,)), ops.RMSNorm: ((7, 301), (301,)), ops.Softmax: ((7, 301),),
    ops.MSE: ((7, 301), (7, 301)), ops.CrossEntropy: ((7, 301),), ops.LinearCrossEntropy: ((7, 5), (301, 5), (301,)),
    LoRALinear: ((7, 131), (70, 131), (70,), (6, 131), (70, 6)), LoRAUpdate: ((7, 131), (6, 131), (70, 6)),
    LoRAMergedLinear: ((7, 131), (111, 131), (111,), (10, 131), (74, 5)), LoRAMergedUpdate: ((7, 131), (10, 131), (74, 5)),
    dora.DoRAScale: ((37, 131), (6, 131), (37, 6), (37,)),
}
ON_A_GPU = {  # sizes that only a GPU does in a moment: more rows than blocks, more columns than threads
    ops.LayerNorm: ((4999, 771), (771,), (771,)), ops.RMSNorm: ((4999, 771), (771,)), ops.Softmax: ((4999, 513),),
    ops.CrossEntropy: ((999, 50257),), ops.LinearCrossEntropy: ((99, 64), (50257, 64), (50257,)),
    ops.MSE: ((4999, 771), (4999, 771)), ops.GELU: ((4096, 3072),), ops.ExactGELU: ((4096, 3072),), ops.SiLU: ((4096, 3072),),
    ops.Dropout: ((4096, 3072),), ops.Linear: ((999, 771), (513, 771), (513,)),
    LoRALinear: ((4097, 771), (1001, 771), (1001,), (8, 771), (1001, 8)),
    LoRAUpdate: ((4097, 771), (8, 771), (1001, 8)), LoRAMergedUpdate: ((1097, 771), (16, 771), (1002, 8)),
    LoRAMergedLinear: ((4097, 771), (1503, 771), (1503,), (16, 771), (1002, 8)),
    dora.DoRAScale: ((4097, 771), (8, 771), (4097, 8), (4097,)),
}


def test_the_registry():
    assert set(OVERRIDES) == {
        backend.array_module, adam_update, sgd_update, narrowed, planned, played, links, LoRALinear, LoRAUpdate,
        LoRAMergedLinear, LoRAMergedUpdate, dora.DoRAScale, dora.lengths, Conv, LoRAConv,
        ops.Attention, ops.CrossEntropy, ops.Dropout, ops.ExactGELU, ops.GELU, ops.GroupNorm, ops.LayerNorm, ops.Linear,
        ops.LinearCrossEntropy, ops.MSE, ops.PackedAttention, ops.PackedPrefixAttention, ops.PrefixAttention,
        ops.RMSNorm, ops.Rotary, ops.SiLU, ops.Softmax,
    }
    assert {op for op in OVERRIDES if isinstance(op, type)} <= {case.op for case in CASES}


# -- against the references --------------------------------------------------------------------------------------------


def assert_near(got, expected, tol):
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    scale = max(1.0, float(abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(got, expected, rtol=0, atol=tol * scale)


def rounding(arrays, dtype):
    """Of a sum of so many numbers of size 1, and of a few function values."""
    return 8 * (4 + max(a.size for a in arrays)) ** 0.5 * float(np.finfo(dtype).eps)


def run(reference, overridden, call, arrays, dys, needs):
    """The value, the bytes kept, and the gradients for each dy."""
    # Parameters' own arrays are free, so the inputs are outputs of an operation that keeps nothing.
    inputs = [ops.reshape(Parameter(a), a.shape) if n else Tensor(a) for a, n in zip(arrays, needs)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.current_device(), "versions", OVERRIDES if overridden else {reference: reference})
        y = call(*inputs)
        results = [fetch(y)]
        for dy in dys if any(needs) else []:
            dxs = y.node.backward(dy)
            assert sum(dx is not None for dx in dxs) == sum(needs)
            results += [fetch(dx) for dx in dxs if dx is not None]
        return results, engine.ledger(y).nbytes


def compare(reference, call, hosts, dtype, needs=None, layout=lambda a: place(a), dys=(lambda dy: place(dy),)):
    rng = np.random.default_rng(sum(a.size for a in hosts))
    arrays = [layout(a) for a in hosts]
    before = [fetch(a).tobytes() for a in arrays]
    with minilora.no_grad():
        shape = call(*map(Tensor, arrays)).shape
    dy = np.asarray(rng.standard_normal(shape), dtype)
    dys = [layout(dy) for layout in dys]
    needs = needs or [True] * len(hosts)
    (fast, fast_bytes), (slow, slow_bytes) = (run(reference, o, call, arrays, dys, needs) for o in (True, False))
    for one, other in zip(fast, slow):
        assert_near(one, other, rounding([*hosts, dy], dtype))
    copies = sum(arrays[i].nbytes for i in OVERRIDES[reference].rearranged.values())  # the inputs are parameters: they are free
    assert fast_bytes <= slow_bytes + copies  # attention needs no y: the kernel of softmax takes D from P and dP
    assert [fetch(a).tobytes() for a in arrays] == before


COTANGENTS = (lambda dy: place(dy), lambda dy: place(dy.T.copy(order="C")).T,
              lambda dy: backend.current_device().xp.broadcast_to(place(0.5, dy.dtype), dy.shape))


@pytest.mark.parametrize("reference", OPERATIONS)
def test_override_equals_its_reference(reference, card):
    for i, case in enumerate(case for case in CASES if case.op is reference):
        dtype, rng = ("float64", "float32")[i % 2], np.random.default_rng(i)
        compare(reference, case.call, case.inputs(rng, dtype), dtype, dys=COTANGENTS[i % 3:])
        if case.drawn is not None:
            for shapes in [LONG.get(reference, case.shapes)] + [ON_A_GPU.get(reference, case.shapes)] * (card is None):
                for dtype in ("float64", "float32"):
                    compare(reference, case.call, case.inputs(rng, dtype, shapes[:len(case.shapes)]), dtype)
    if card:
        assert bool(card.launches) == (reference not in BY_PRODUCTS)


@pytest.mark.parametrize("number", [-np.inf, np.nan])
def test_ignored_rows_are_never_read(card, number):
    x, W = np.random.default_rng(0).standard_normal((4, 40), "float32"), np.ones((40, 40), "float32")
    x[1::2], labels = number, np.array([1, -100, 39, -100])
    calls = [(ops.CrossEntropy, lambda x: ops.cross_entropy(x, labels), [x]),
             (ops.CrossEntropy, lambda x: ops.cross_entropy(x, labels, label_smoothing=0.1), [x]),
             (ops.LinearCrossEntropy, lambda h, W: ops.linear_cross_entropy(h, W, labels), [x, W])]
    for reference, call, hosts in calls:
        compare(reference, call, hosts, "float32")
        parameters = [Parameter(place(a)) for a in hosts]
        call(*parameters).backward()
        assert all(np.isfinite(fetch(p.grad)).all() for p in parameters) and not fetch(parameters[0].grad)[1::2].any()


@pytest.mark.parametrize("reference", OPERATIONS)
def test_only_what_is_needed_is_computed(reference, card):
    for case in [case for case in CASES if case.op is reference and len(case.shapes) > 1 and case.drawn is not None]:
        for needs in itertools.product([True, False], repeat=len(case.shapes)):
            compare(reference, case.call, case.inputs(np.random.default_rng(0), "float32"), "float32", needs)


@pytest.mark.parametrize("reference", OPERATIONS)
def test_other_dtypes_take_the_reference(reference, card):
    case = next(case for case in CASES if case.op is reference)
    hosts = [a.astype("complex128") for a in case.inputs(np.random.default_rng(0))]
    device = backend.current_device()
    if case.analytic and not (case.products and card is None):
        assert fetch(case.call(*(Tensor(place(a)) for a in hosts))).dtype == "complex128"
    assert device.name == "gpu" or not card.launches


@pytest.mark.parametrize("case", one_of_each([case for case in CASES if case.op in OVERRIDES and case.op.widens]))
def test_float16_takes_the_kernels_of_float32(case, card):
    launched = []
    for dtype in ("float32", "float16"):
        compare(case.op, case.call, case.inputs(np.random.default_rng(0), dtype), dtype)
        launched.append([name for name, *_ in card.launches] if card else [])
        if card:
            card.launches.clear()
    assert launched[0] == launched[1]


LAYOUTS = [
    lambda a: place(a),
    lambda a: place(a.T.copy(order="C")).T,
    lambda a: place(a[..., ::-1])[..., ::-1],
    lambda a: place(np.repeat(a, 2, axis=-1))[..., ::2],
    lambda a: place(np.stack([a, a]))[1:].reshape(a.shape),
]
HEADS = dict(num_heads=4, num_kv_heads=2, causal=True)
GRIDS, THREADS = st.sampled_from([None, 1, 2, 3]), st.sampled_from([None, 32, 64, 128])


def drawn_call(reference, data, R, D):
    """A way to call the operation, and the shapes of its inputs."""
    e = data.draw(st.sampled_from([0.0, 0.1, 1.0]))
    labels = np.array(data.draw(st.lists(st.sampled_from([-100, *range(D)]), min_size=R - 1, max_size=R - 1)) + [0])
    slots = data.draw(st.sampled_from([(True, False, True), (False, True, True, False, True), (True, True)]))
    m = sum(slots)
    return {
        ops.LayerNorm: (ops.layer_norm, [(R, D), (D,), (D,)]), ops.RMSNorm: (ops.rms_norm, [(R, D), (D,)]),
        ops.GroupNorm: (lambda *arrays: ops.group_norm(arrays[0], 2, *arrays[1:]), [(R, 4, D), (4,), (4,)]),
        ops.Softmax: (ops.softmax, [(R, D)]), ops.GELU: (ops.gelu, [(R, D)]), ops.SiLU: (ops.silu, [(R, D)]),
        ops.ExactGELU: (lambda x: ops.gelu(x, "none"), [(R, D)]), ops.Dropout: (lambda x: ops.dropout(x, 0.3, 5), [(R, D)]),
        ops.MSE: (ops.mse, [(R, D), (R, D)]), ops.Linear: (ops.linear, [(R, D), (5, D), (5,)]),
        ops.CrossEntropy: (lambda x: ops.cross_entropy(x, labels, label_smoothing=e), [(R, D)]),
        ops.LinearCrossEntropy: (lambda h, W, b: ops.linear_cross_entropy(h, W, labels, b, label_smoothing=e, chunk_rows=3),
                                 [(R, 2), (D, 2), (D,)]),
        ops.Attention: (lambda q, k, v: ops.attention(q, k, v, causal=True), [(2, 4, R, 3), (2, 2, 9, 3), (2, 2, 9, 3)]),
        ops.Rotary: (lambda x: ops.rotary(x, *ops.rotary_tables((1.0, 0.5), R + 3, x.dtype, x.device), 2), [(2, 3, R, 4)]),
        ops.PackedAttention: (lambda qkv: ops.packed_attention(qkv, **HEADS), [(2, R, 16)]),
        ops.PrefixAttention: (lambda q, k, v, *p: ops.prefix_attention(q, k, v, p, [(slice(0, 1), 1), (slice(1, 2), 0)],
                                                                       causal=True, window=4),
                              [(3, 4, R, 3), (3, 2, 9, 3), (3, 2, 9, 3), (2, 2, 2, 3), (2, 2, 1, 3)]),
        ops.PackedPrefixAttention: (lambda qkv, p: ops.packed_prefix_attention(qkv, 4, [p], num_kv_heads=2, causal=True),
                                    [(2, R, 16), (2, 2, 3, 2)]),
        LoRALinear: (lambda *arrays: lora_linear(*arrays, 1.5), [(R, D), (7, D), (7,), (R, D), (7, R)]),
        LoRAUpdate: (lambda *arrays: lora_update(*arrays, 1.5), [(R, D), (R, D), (7, R)]),
        Conv: (lambda *arrays: ops.conv2d(*arrays, stride=(2, 1), padding=(1, 2), groups=2),
               [(R, 4, 5, D), (6, 2, 3, 2), (6,)]),
        LoRAConv: (lambda *arrays: lora_conv1d(*arrays, 1.5, padding=2, dilation=2, groups=2),
                   [(R, 4, D), (6, 2, 2), (6,), (4, 2, 2), (6, 2, 1)]),
        dora.DoRAScale: (lambda *arrays: dora.dora_scale(*arrays, 1.5, exact=True), [(R, D), (3, D), (R, 3), (R,)]),
        LoRAMergedLinear: (lambda *arrays: lora_merged_linear(*arrays, 1.5, slots),
                           [(R, D), (5 * len(slots), D), (5 * len(slots),), (m * R, D), (5 * m, R)]),
        LoRAMergedUpdate: (lambda *arrays: lora_merged_update(*arrays, 1.5, slots, 5 * len(slots)),
                           [(R, D), (m * R, D), (5 * m, R)]),
    }[reference]


@pytest.mark.parametrize("reference", OPERATIONS)
@settings(max_examples=settings.default.max_examples // 3)
@given(data=st.data())
def test_any_shape_layout_and_launch(reference, card, data):
    R, D = data.draw(st.integers(1, 9)), data.draw(st.one_of(st.integers(1, 9), st.integers(10, 140)))
    call, shapes = drawn_call(reference, data, R, D)
    if card:
        card.grid, card.threads = data.draw(GRIDS), data.draw(THREADS)
        if "LoRA" in reference.__name__ and card.threads in (1, 2):
            card.threads = 4  # who share the ranks of a row
    dtype = data.draw(st.sampled_from(["float32", "float64"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2 ** 32 - 1)))
    hosts = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    compare(reference, call, hosts, dtype, layout=data.draw(st.sampled_from(LAYOUTS)),
            dys=[data.draw(st.sampled_from(COTANGENTS))])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scores", [1, 200, 1000, 10 ** 6])
def test_attention_in_other_blocks_is_the_same(scores, causal, card, monkeypatch):
    monkeypatch.setattr(ScaledDotProduct, "block", 2)
    monkeypatch.setattr(gpu_attention, "SCORES", scores)
    rng = np.random.default_rng(scores)
    q, k, v, qkv = (rng.standard_normal(shape) for shape in [(2, 4, 9, 3), (2, 2, 11, 3), (2, 2, 11, 3), (2, 9, 24)])
    compare(ops.Attention, lambda *x: ops.attention(*x, causal=causal), [q, k, v], "float64")
    compare(ops.PackedAttention, lambda x: ops.packed_attention(x, **{**HEADS, "causal": causal}), [qkv], "float64")
    for window in (1, 3) if causal else ():
        compare(ops.Attention, lambda *x: ops.attention(*x, causal=True, window=window), [q, k, v], "float64")


@pytest.mark.parametrize(("B", "T", "block"), [(8, 512, 256), (1, 512, 512), (8, 2048, 128), (64, 2048, 64), (1, 1, 64)])
def test_attention_takes_blocks_of_about_equal_size(B, T, block):
    """GPT-2's 12 heads. Multiples of the reference's 64, which suit matrix products."""
    op, q = OVERRIDES[ops.Attention](), (B, 12, T, 64)
    op.causal = True
    assert op.chosen(q, q)[-1][0] == slice(0, min(block, T)) and op.block == block


@pytest.mark.parametrize("n", [1, 4, 255, 1001])
@pytest.mark.parametrize("keep", [1.0, 0.99])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_adam_equals_its_reference(n, keep, dtype, card):
    rng = np.random.default_rng(n)
    theta, g, m, v = (rng.standard_normal(n).astype(dtype) for _ in range(4))
    results = []
    for update in (adam_update, OVERRIDES[adam_update]):
        arrays = [place(a) for a in (theta, g, m, v * v)]
        update(*arrays, 0.9, 0.999, 1e-2, 1e-3, keep)
        results.append([fetch(a) for a in arrays])
    for one, other in zip(*results):
        assert_near(one, other, 8 * float(np.finfo(dtype).eps))


@pytest.mark.parametrize("n", [1, 255, 1001])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_sgd_equals_its_reference(n, momentum, decay, dtype, card):
    rng = np.random.default_rng(n)
    theta, g, v = (rng.standard_normal(n).astype(dtype) for _ in range(3))
    theta[0] = np.inf  # which a decay of 0 leaves alone
    results = []
    for update in (sgd_update, OVERRIDES[sgd_update]):
        arrays = [place(a) for a in (theta, g, v)]
        update(*arrays[:2], arrays[2] if momentum else None, 1e-2, momentum, decay)
        results.append([fetch(a) for a in arrays])
    for one, other in zip(*results):
        np.testing.assert_allclose(one, other, rtol=8 * float(np.finfo(dtype).eps), atol=8 * float(np.finfo(dtype).eps))


# -- values at the edge -----------------------------------------------------------------------------------------------

INF, NAN = np.inf, np.nan
ROWS = [[1.0, 2.0, 3.0], [-INF, 0.0, 1.0], [-INF, -INF, 2.0], [-INF, -INF, -INF], [1e4, -1e4, 0.0], [NAN, 0.0, 1.0],
        [0.0, NAN, -INF], [INF, 0.0, 1.0], [INF, INF, -INF], [NAN, NAN, NAN], [3.25, 3.25, 3.25], [0.0, -0.0, 0.0],
        [1e6, 1e6 + 1, 1e6 + 2], [-1e4, -1e4 - 1, -1e4 - 2], [1e30, -1e30, 1e30], [-3e38, 3e38, 0.0]]
BY_ROW = [(ops.Softmax, ops.softmax), (ops.GroupNorm, lambda x: ops.group_norm(x, 1)),
          (ops.LayerNorm, ops.layer_norm), (ops.RMSNorm, ops.rms_norm), (ops.GELU, ops.gelu),
          (ops.ExactGELU, lambda x: ops.gelu(x, "none")), (ops.SiLU, ops.silu)]
LOSSES = [(ops.CrossEntropy, lambda x, e=e: ops.cross_entropy(x, [2], label_smoothing=e)) for e in (0.0, 0.1, 1.0)]
EDGES = [(ROWS, *row) for row in BY_ROW] + [([row], *loss) for row in ROWS for loss in LOSSES]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_infinite_huge_equal_and_no_numbers(dtype, card):
    """Where the reference gives infinity, NaN or zero, so does the override."""
    for rows, reference, call in EDGES:
        x, dy = np.array(rows, dtype), np.full(() if reference is ops.CrossEntropy else (len(rows), 3), 0.75, dtype)
        fast, slow = (run(reference, o, call, [place(x)], [place(dy)], [True])[0] for o in (True, False))
        for one, other in zip(fast, slow):
            for special in (np.isnan, np.isposinf, np.isneginf):
                np.testing.assert_array_equal(special(one), special(other), f"{reference.__name__} of {rows}")
            eps, finite = np.finfo(dtype).eps, np.isfinite(other)
            np.testing.assert_allclose(one[finite], other[finite], rtol=256 * eps, atol=64 * eps, err_msg=reference.__name__)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_squares_of_infinite_huge_and_no_numbers(dtype, card):
    """For a cotangent of 1 to the last bit, for others within 2 eps; also where 2 d, but not d / 2, is more than any number."""
    eps, huge = np.finfo(dtype).eps, float(np.finfo(dtype).max) * 0.75
    for values in ([INF, 1.0], [NAN, 1.0], [huge, 1e-30], [huge], [1.5], [-INF, INF], [0.0, -0.0], [3.25, 1e3, -7.5]):
        p, t = np.array(values, dtype), np.zeros(len(values), dtype)
        for cotangent in (None, 0.25, 65536.0, 0.0):
            results = []
            for overridden in (True, False):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(backend.current_device(), "versions", OVERRIDES if overridden else {ops.MSE: ops.MSE})
                    parameters = [Parameter(place(a)) for a in (p, t)]
                    loss = ops.mse(*parameters)
                    loss.backward(None if cotangent is None else place(cotangent, dtype))
                    results.append([fetch(loss), *(fetch(q.grad) for q in parameters)])
            for one, other in zip(*results):
                np.testing.assert_allclose(one, other, rtol=4 * eps if cotangent or one.ndim == 0 else 0)


def test_exact_gelu_keeps_its_relative_precision_on_the_left(card):
    x = np.linspace(-37, 0, 400)
    results = [run(ops.ExactGELU, o, lambda x: ops.gelu(x, "none"), [place(x)], [place(np.ones(400))], [True])[0]
               for o in (True, False)]
    for one, other in zip(*results):
        np.testing.assert_allclose(one, other, rtol=64 * np.finfo(float).eps)


def test_a_large_mean_does_not_spoil_the_variance(card):
    """The sum of (x - mean) x is the same on paper, and would lose eight digits here."""
    x = np.random.default_rng(0).standard_normal((1, 64)) + 1e8
    y = fetch(ops.layer_norm(place(x), eps=0.0))
    assert abs(y.std() - 1.0) < 1e-12


@pytest.mark.parametrize("labels", [[-1, 0], [0, -1], [3, 0], [0, 3], [2 ** 40, 0]])
def test_labels_on_the_device_that_name_no_class_give_nan(labels, card):
    """Nothing outside the logits is read, where CuPy's own indexing would wrap around."""
    p = Parameter(place(np.zeros((2, 3), "float32")))
    loss = ops.cross_entropy(p, place(labels, "int64"))
    loss.backward()
    assert np.isnan(loss.item())
    assert np.isfinite(fetch(p.grad)).all()


# -- what a launch is ---------------------------------------------------------------------------------------------------


@pytest.fixture
def machine():
    with emulator.emulated_device() as machine:
        yield machine


def launched(call, *arrays, frozen=0):
    """The launches of our kernels, and of all, forward and backward; with nothing else, as in the capture of a graph."""
    parameters = [Parameter(a, trainable=i < len(arrays) - frozen) for i, a in enumerate(arrays)]
    with standin.capturing(), standin.counting() as forward:
        y = call(*parameters)
    dy = place(np.ones(y.shape, "float32"))
    with standin.capturing(), standin.counting() as backward:
        y.node.backward(dy)
    named = [{name: n for name, n in counts.calls.items() if name.endswith("_float")} for counts in (forward, backward)]
    return named, [counts.launches for counts in (forward, backward)]


def test_launches_of_an_operation(machine):
    x, w, labels = place(np.ones((4, 8), "float32")), place(np.ones(8, "float32")), place([1, 2, -100, 0])
    norm = {"norm_float": 1}
    assert launched(ops.layer_norm, x, w, w) == ([norm, {"norm_backward_float": 1, "column_sums_float": 3}], [1, 4])
    assert launched(ops.layer_norm, x, w, w, frozen=2) == ([norm, {"norm_backward_float": 1}], [1, 1])
    assert launched(ops.rms_norm, x, w) == ([norm, {"norm_backward_float": 1, "column_sums_float": 2}], [1, 3])
    assert launched(ops.rms_norm, x, w, frozen=1) == ([norm, {"norm_backward_float": 1}], [1, 1])
    image, scale = place(np.ones((2, 4, 3, 3), "float32")), place(np.ones(4, "float32"))
    group_norm = lambda x, w, b: ops.group_norm(x, 2, w, b)  # noqa: E731
    assert launched(group_norm, image, scale, scale, frozen=2) == ([norm, {"norm_backward_float": 1}], [3, 2])
    for axis in (1, -1):
        assert launched(lambda x: ops.softmax(x, axis), x) == ([{"softmax_float": 1}, {"softmax_backward_float": 1}], [1, 1])
    assert launched(ops.silu, x) == ([{"silu_float": 1}, {"silu_backward_float": 1}], [1, 1])
    assert launched(ops.mse, x, x, frozen=1) == ([{"mse_float": 1}, {}], [1, 1])
    large = place(np.ones((9, 200), "float32"))
    assert launched(ops.mse, large, large, frozen=1) == ([{"mse_float": 1, "mean_float": 1}, {}], [2, 1])
    names, launches = launched(lambda x: ops.cross_entropy(x, labels), x)
    assert names == [{"cross_entropy_float": 1}, {"cross_entropy_backward_float": 1}]
    assert launches[0] <= 9 and launches[1] <= 8  # the weights of the rows, small arrays, are made as the reference makes them
    W, A, B = (place(np.ones(shape, "float32")) for shape in [(5, 8), (2, 8), (5, 2)])
    forward, (u_dB, dA_dx) = {"low_rank_forward_float": 1}, [{f"low_rank_{name}_float": 1} for name in ("u_dB", "dA_dx")]
    lora = lambda x, A, B: lora_linear(x, W, None, A, B, 2.0)  # noqa: E731
    assert launched(lora, x, A, B) == ([forward, u_dB | dA_dx], [2, 3])
    assert launched(lambda A, B: lora(x, A, B), A, B) == ([forward, u_dB | dA_dx], [2, 2])
    assert launched(lambda B: lora(x, A, B), B) == ([forward, u_dB], [2, 1])
    update = lambda *arrays: lora_update(*arrays, 2.0)  # noqa: E731
    assert launched(update, x, A, B) == ([forward, u_dB | dA_dx], [1, 2])
    assert launched(lambda B: update(x, A, B), B) == ([forward, u_dB], [1, 1])
    W, A, B = (place(np.ones(shape, "float32")) for shape in [(6, 8), (4, 8), (4, 2)])
    merged = lambda x, A, B: lora_merged_linear(x, W, None, A, B, 2.0, (True, False, True))  # noqa: E731
    assert launched(merged, x, A, B) == ([forward, u_dB | dA_dx], [2, 3])
    update = lambda *arrays: lora_merged_update(*arrays, 2.0, (True, False, True), 6)  # noqa: E731
    assert launched(update, x, A, B) == ([forward, u_dB | dA_dx], [2, 2])
    names, _ = launched(lambda h: ops.linear_cross_entropy(h, x, labels, chunk_rows=2), x)
    assert names == [{"cross_entropy_float": 2}, {}]


@pytest.mark.parametrize(("needs", "launches"), [([True, False], 0), ([False, True], 0), ([True, True], 1)])
def test_a_loss_that_backward_begins_with_has_its_gradient(needs, launches, machine):
    """The cotangent is there, and so is the gradient; of two, the other has its sign."""
    x = np.random.default_rng(0).standard_normal((2, 9, 200)).astype("float32")
    p, t = (ops.reshape(Parameter(place(a), trainable=n), (200, 9)) for a, n in zip(x, needs))
    with standin.capturing(), standin.counting() as counts:
        dp, dt = backward_of(ops.mse(p, t))
    assert counts.launches == 2 + launches
    scale = np.float32(2.0 / x[0].size)
    for need, gradient, expected in zip(needs, (dp, dt), ((x[0] - x[1]) * scale, (x[1] - x[0]) * scale)):
        assert (gradient is not None) is need
        if need:
            assert fetch(gradient).tobytes() == expected.reshape(200, 9).tobytes()


def backward_of(loss):
    """What the walk would get for the inputs of the last operation."""
    return loss.node.backward(loss.device.one(loss.dtype))


def test_blocks_and_threads(monkeypatch):
    """The threads of a row depend on its length alone."""
    shapes = []
    monkeypatch.setattr(launch, "kernel", lambda *name: lambda grid, block, arguments: shapes.append((*grid, *block)))
    for n in (0, 1, 256, 257, 10 ** 9):
        launch.by_element("elementwise", "gelu", n, np.dtype("float32"))
    assert shapes == [(1, 256), (1, 256), (2, 256), (4096, 256)]
    shapes.clear()
    for D in (1, 128, 129, 768, 1024, 4096, 50257):
        for R in (0, 3, 10 ** 9):
            launch.by_row("mean", R, D, np.dtype("float32"))
            launch.by_kept_row("softmax", "softmax", R, D, np.dtype("float32"))
    pairs = (32, 32), (32, 32), (64, 32), (256, 64), (256, 64), (1024, 256), (1024, 256)
    assert shapes == [(blocks, threads) for pair in pairs for blocks in (3, 4096) for threads in pair]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_no_rows_start_nothing(shape, machine):
    w = Parameter(place(np.ones(4, "float32")))
    for call in (lambda x: ops.layer_norm(x, w, w * 1.0), lambda x: ops.rms_norm(x, w), ops.softmax, ops.gelu, ops.silu):
        p = Parameter(place(np.zeros(shape, "float32")))
        call(p).sum().backward()
        assert p.grad.shape == shape
    assert not fetch(w.grad).any() and not machine.launches


def test_the_number_of_blocks_changes_no_bit(machine):
    rng = np.random.default_rng(0)
    x, w, dy = (place(rng.standard_normal(s).astype("float32")) for s in ((9, 70), (70,), (9, 70)))
    bits = set()
    for machine.grid in (None, 1, 4, 7):
        parameters = [Parameter(a) for a in (x, w, w)]
        y = ops.layer_norm(*parameters)
        bits.add(b"".join(fetch(a).tobytes() for a in (y, *y.node.backward(dy))))
        loss = ops.cross_entropy(parameters[0], [3] * 9, label_smoothing=0.1)
        bits.add(b"".join(fetch(a).tobytes() for a in (loss, *loss.node.backward(place(1.0, "float32")))))
    assert len(bits) == 2


def test_gradients_of_parameters_are_written_where_the_optimizer_wants_them(machine):
    x = place(np.random.default_rng(0).standard_normal((5, 3)))
    for call, n in ((ops.layer_norm, 2), (ops.rms_norm, 1)):
        parameters = [Parameter(place(np.ones(3))) for _ in range(n)]
        rooms = [place(np.full(3, np.nan)) for _ in range(n)]
        for p, room in zip(parameters, rooms):
            p.room = room
        with standin.counting() as counts:
            call(x, *parameters).backward(place(np.ones((5, 3))))
        assert all(p.gathered is room for p, room in zip(parameters, rooms)) and counts.calls["setitem"] == 0  # nothing copied
        assert np.isfinite([fetch(room) for room in rooms]).all()


def test_rounding_of_sums_over_many_rows(machine):
    """One sum of a million numbers, one by one, would be wrong by a hundredth."""
    op = OVERRIDES[ops.LayerNorm]()
    op.xp, op.needs = standin.xp, [False, False, True]
    *_, db = op.backward(place(np.full((10 ** 6, 1), 0.1, "float32")))
    assert abs(fetch(db) / 1e5 - 1.0) < 1e-5


@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_logits_in_place(needs, layout, card):
    """They become their gradient only if it is wanted; logits that are not contiguous are left to the reference."""
    z, labels, weights = np.random.default_rng(0).standard_normal((5, 9)), np.arange(5), np.full((5, 1), 0.2)
    results = []
    for op in (OVERRIDES[ops.LinearCrossEntropy](), ops.LinearCrossEntropy()):
        op.xp, op.needs, op.label_smoothing = backend.current_device().xp, [needs, False, False], 0.1
        logits = layout(z)
        results.append((fetch(op.finish(logits, place(labels), place(weights))), fetch(logits)))
    (loss, after), (expected_loss, expected) = results
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-14)
    if needs:
        np.testing.assert_allclose(after, expected, rtol=1e-13, atol=1e-16)
    elif layout is LAYOUTS[0]:
        np.testing.assert_array_equal(after, z)


def test_a_gradient_of_another_dtype_takes_the_reference(card):
    """An operation with a wrong constant gave float64: a kernel for float32 would read it as pairs of numbers."""
    x, labels = place(np.ones((2, 3), "float32")), [0, 1]
    for call in (ops.layer_norm, ops.rms_norm, ops.softmax, ops.gelu, ops.silu, lambda x: ops.gelu(x, "none"),
                 lambda x: ops.cross_entropy(x, labels)):
        y = call(Parameter(x))
        (expected, *_), (got, *_) = (y.node.backward(place(np.full(y.shape, 0.5), dtype)) for dtype in ("float32", "float64"))
        np.testing.assert_allclose(fetch(got), fetch(expected), rtol=1e-5, atol=1e-6)
