"""Attention on a GPU: masks of every kind, windows, grouped heads, prefixes, caches; emulated, and on a real GPU (-m gpu)."""
import itertools

import numpy as np
import pytest
import standin
from cases import CASES
from conftest import fetch, place
from test_gpu_overrides import compare, machine  # noqa: F401 (a fixture)

import minilora
from minilora import Parameter, Tensor, backend, models, nn, ops
from minilora.kernels.gpu import attention as gpu_attention
from minilora.kernels.gpu import heads as gpu_heads
from minilora.models.decoding import generation
from minilora.ops.attention import ScaledDotProduct, stacked
from minilora.ops.prefix_attention import prefix_attention

INF = np.inf


def draw(*shapes, dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 2 queries, or 8."""
    monkeypatch.setattr(ScaledDotProduct, "block", 2)
    monkeypatch.setattr(gpu_attention, "SCORES", 1)


# -- heads in order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("hd", "size", "first"), [(1, 3, 0), (3, 4, 0), (4, 9, 0), (4, 3, 0), (8, 1, 0), (8, 3, 1)])
def test_heads_are_moved_and_come_back(card, dtype, hd, size, first):  # noqa: F811
    """Also from places where no 16 bytes begin."""
    xp, (H, KV), T = backend.current_device().xp, (4, 2), 7
    (host,) = draw((2, T, (H + 2 * KV) * hd), dtype=dtype)
    packed = place(np.concatenate([np.zeros(first, dtype), host.reshape(-1)]))[first:].reshape(host.shape)
    flat, back = xp.empty(packed.size, dtype=dtype), xp.empty(packed.shape, dtype=dtype)
    gpu_heads.move_packed("split_heads", packed, flat, (H, KV), size)
    gpu_heads.move_packed("join_heads", back, flat, (H, KV), size)
    heads = np.moveaxis(host.reshape(2, T, H + 2 * KV, hd), 1, 2)
    q, k, v = np.split(heads, [H, H + KV], axis=1)
    expected = [q[:, :, start:start + size] for start in range(0, T, size)] + [k, v]
    np.testing.assert_array_equal(fetch(flat), np.concatenate([part.reshape(-1) for part in expected]))
    np.testing.assert_array_equal(fetch(back), host)


ORDERS = {"heads": (0, 1, 2, 3), "tokens": (0, 2, 1, 3), "numbers": (0, 1, 3, 2), "texts last": (1, 2, 3, 0)}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("g", "size"), [(1, 2), (2, 2), (2, 5), (4, 2)])
@pytest.mark.parametrize("shape", [(2, 4, 5, 4), (1, 4, 5, 3), (2, 4, 1, 4)])
def test_blocks_of_queries_from_memory_in_any_order(card, order, g, size, shape):  # noqa: F811
    xp, T = backend.current_device().xp, shape[2]
    blocks = [(slice(s, min(s + size, T)), slice(0, T)) for s in reversed(range(0, T, size))]
    (host,) = draw(shape)
    back = np.argsort(ORDERS[order]).tolist()
    x, y = (place(np.ascontiguousarray(a.transpose(ORDERS[order]))).transpose(back) for a in (host, host * 0.0))
    out = gpu_heads.Rooms(xp, y, blocks, g)
    for part, room, (rows, _) in zip(gpu_heads.queries(xp, x, blocks, g), out.parts, blocks):
        np.testing.assert_array_equal(fetch(part), host[..., rows, :])
        piles = [stacked(a, 4 // g) for a in (part, room)]
        assert all(gpu_heads.even(pile) and xp.may_share_memory(pile, a) for pile, a in zip(piles, (part, room)))
        room[...] = part
    out.done()
    np.testing.assert_array_equal(fetch(y), host)
    np.testing.assert_array_equal(fetch(gpu_heads.in_order(xp, x)), host)
    assert gpu_heads.even(gpu_heads.in_order(xp, x))


# -- masks ---------------------------------------------------------------------------------------------------------------

B, H, KV, T, S, HD = 2, 4, 2, 5, 7, 3
SHAPES = [(), (S,), (1,), (T, 1), (T, S), (H, 1, 1), (H, T, S), (B, 1, T, S), (1, H, 1, S), (B, H, T, S), (B, 1, 1, 1)]


def mask_of(kind, shape, dtype):
    rng = np.random.default_rng(len(shape))
    closed = rng.random(shape) < 0.4
    if kind == "bool":
        return ~closed
    if kind == "numbers":
        return np.asarray(rng.standard_normal(shape), dtype)
    return np.asarray(np.where(closed, {"-inf": -INF, "lowest": np.finfo(dtype).min}[kind], 0.25), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["bool", "numbers", "-inf", "lowest"])
def test_masks(card, dtype, kind, small_blocks):  # noqa: F811
    q, k, v = draw((B, H, T, HD), (B, KV, S, HD), (B, KV, S, HD), dtype=dtype)
    padding = np.random.default_rng(3).random((B, S)) < 0.7
    for i, shape in enumerate(SHAPES):
        mask, causal = place(mask_of(kind, shape, dtype)), i % 4 < 2
        more = dict(key_padding=padding) if i % 2 else {}
        more |= dict(window=3) if causal and i % 3 == 0 else {}
        compare(ops.Attention, lambda *x: ops.attention(*x, causal=causal, mask=mask, **more), [q, k, v], dtype)  # noqa: B023


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_queries_that_see_nothing_get_zeros_and_zero_gradients(card, dtype):  # noqa: F811
    q, k, v = (Parameter(place(a)) for a in draw((B, H, T, HD), (B, KV, S, HD), (B, KV, S, HD), dtype=dtype))
    open_to = np.ones((T, S), bool)
    open_to[[0, 3]] = False
    for mask in (open_to, np.where(open_to, 0.0, -INF).astype(dtype)):
        y = ops.attention(q, k, v, mask=place(mask))
        y.backward(place(np.ones(y.shape, dtype)))
        for a in (y, q.grad):
            assert not fetch(a)[:, :, [0, 3]].any() and fetch(a)[:, :, 1].any()
        assert all(np.isfinite(fetch(p.grad)).all() for p in (q, k, v))
        for p in (q, k, v):
            p.grad = None


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 9), (2, 4), (5, 1), (5, 9), (9, 4)])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_other_numbers_of_queries_than_keys(card, T, S, kv, small_blocks):  # noqa: F811
    hosts = draw((2, 4, T, 3), (2, kv, S, 3), (2, kv, S, 3), dtype="float32")
    for causal, window in ((False, None), (True, None), (True, 3)):
        compare(ops.Attention, lambda *x: ops.attention(*x, causal=causal, window=window), hosts, "float32")  # noqa: B023


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(("texts", "dtype"), [((), "float32"), ((1,), "float64"), ((3,), "float16"), ((2, 1, 2), "float64")])
def test_packed(card, heads, kv, texts, dtype, small_blocks):  # noqa: F811
    (host,) = draw((*texts, 5, (heads + 2 * kv) * 4), dtype=dtype)
    for causal in (True, False):
        compare(ops.PackedAttention, lambda x: ops.packed_attention(x, heads, kv, causal=causal), [host], dtype)  # noqa: B023


# -- prefixes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 2, 4, 6, 9])
@pytest.mark.parametrize(("T", "S", "gap"), [(4, 4, 0), (4, 4, 2), (1, 6, 2), (2, 6, 0), (6, 3, 0)])
def test_windows_that_reach_into_a_prefix(card, window, T, S, gap, small_blocks):  # noqa: F811
    hosts = draw((3, 4, T, 3), (3, 2, S, 3), (3, 2, S, 3), (2, 2, 3, 3), (2, 2, 1, 3), dtype="float32")
    padding = np.arange(S) >= np.array([[gap], [0], [gap]])
    mask = place(draw((3, 1, T, S), dtype="float32", seed=1)[0])
    runs = [(slice(0, 1), 1), (slice(2, 3), 0)]
    for more in (dict(key_padding=padding), dict(mask=mask)) if gap else ({},):
        compare(ops.PrefixAttention, lambda q, k, v, *p: prefix_attention(q, k, v, p, runs, gap, True, window=window, **more),
                hosts, "float32")  # noqa: B023


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_gradients_of_a_prefix_alone(card, needs):  # noqa: F811
    hosts = draw((2, 4, 3, 3), (2, 2, 3, 3), (2, 2, 3, 3), (2, 2, 2, 3), dtype="float32")
    compare(ops.PrefixAttention, lambda q, k, v, p: prefix_attention(q, k, v, [p], causal=True), hosts, "float32", needs)


# -- what is launched, and kept ------------------------------------------------------------------------------------------


def test_no_product_is_left_to_cupy(machine):  # noqa: F811
    """CuPy's own may not be recorded."""
    for case in CASES:
        if "attention" in case.name:
            hosts = case.inputs(np.random.default_rng(0), "float32")
            with standin.counting() as counts:
                y = case.call(*(Parameter(place(a)) for a in hosts))
                y.backward(place(np.ones(y.shape, "float32")))
            assert 0 in y.shape or not counts.calls["matmul"] + counts.calls["dot"], case.name


@pytest.mark.parametrize("kv", [4, 2, 1])
def test_a_token_after_a_cache_is_three_launches(machine, kv):  # noqa: F811
    """Nothing is moved: neither the keys, which have more room than tokens, nor the one row of each head."""
    room = place(draw((2, kv, 64, 8), dtype="float32")[0])
    q = place(draw((2, 1, 4, 8), dtype="float32")[0]).swapaxes(1, 2)
    with minilora.no_grad(), standin.counting() as counts:
        ops.attention(q, room[:, :, :9], room[:, :, :9], causal=True, window=5)
    assert counts.launches == 3 and counts.syncs == counts.h2d == 0


@pytest.mark.parametrize(("texts", "kv", "moves"), [(1, 4, 0), (2, 4, 2), (1, 2, 2), (2, 2, 2)])
def test_what_packed_attention_moves(machine, texts, kv, moves):  # noqa: F811
    x = Parameter(place(draw((texts, 6, (4 + 2 * kv) * 2), dtype="float32")[0]))
    with standin.counting() as counts:
        y = ops.packed_attention(x, 4, kv, causal=True)
    with standin.counting() as behind:
        y.node.backward(place(np.ones(y.shape, "float32")))
    for found in (counts, behind):
        moved = found.calls["split_heads_float"] + found.calls["join_heads_float"]
        assert moved <= moves and found.launches - moved == (3 if found is counts else 7)


def test_packed_attention_keeps_a_copy_and_not_what_it_is_given(machine):  # noqa: F811
    x = Tensor(place(draw((2, 6, 24), dtype="float32")[0]))
    p = Parameter(place(np.ones(24, "float32")))
    with standin.counting():
        y = ops.packed_attention(x * p, 4, causal=True)
    kept = sum(a.nbytes for a in y.node.saved if a is not None)
    assert kept == x.data.nbytes + 2 * 2 * 4 * 6 * 4  # m and n besides
    qkv = Parameter(place(draw((2, 6, 24), dtype="float32")[0]))
    results = []
    for changed in (False, True):
        y = ops.packed_attention(qkv, 4, causal=True)
        if changed:
            qkv.data[...] = 0.0
            qkv.version += 1
        y.sum().backward()
        results.append(fetch(qkv.grad).tobytes())
        qkv.grad = None
    assert results[0] == results[1]


# -- a token at a time ---------------------------------------------------------------------------------------------------


def launches_of_a_token(make, prompts):
    """What the last token of a text costs: launches, copies to the card and back, waits."""
    with standin.card(), pytest.MonkeyPatch.context() as patch:
        read = generation.on_host
        patch.setattr(generation, "on_host", lambda logits: np.nan_to_num(read(logits)))  # counted kernels write nothing
        with standin.counting() as counts:
            after = []
            models.generate(make(), prompts, 5,
                            stream=lambda token: after.append((counts.launches, counts.h2d, counts.d2h, counts.syncs)))
    return tuple(now - before for now, before in zip(after[-1], after[-2]))


def small_gpt2():
    return nn.GPT2(nn.GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2), rng=0)


def small_llama():
    return nn.Llama(nn.LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
                                   num_attention_heads=4, num_key_value_heads=2), rng=0)


@pytest.mark.parametrize(("make", "prompts", "most"), [
    pytest.param(small_gpt2, [[1, 2, 3]], (33, 0, 1, 1), id="GPT-2"),
    pytest.param(small_gpt2, [[1, 2, 3], [4]], (39, 3, 1, 1), id="GPT-2, padded"),
    pytest.param(small_llama, [[1, 2, 3]], (43, 0, 1, 1), id="Llama"),
    pytest.param(small_llama, [[1, 2, 3], [4]], (55, 3, 1, 1), id="Llama, padded"),
])
def test_what_a_token_costs(make, prompts, most):
    """Two layers. The one wait is that for the logits, from which the host chooses the token (`generation.on_host`)."""
    found = launches_of_a_token(make, prompts)
    assert all(n <= limit for n, limit in zip(found, most)), found


# -- rotary positions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(5,), (3, 1, 5), (1, 4, 5), (3, 4, 5), (3, 4, 1), None])
def test_rotary_positions_of_texts_and_heads(card, order, dtype, shape):  # noqa: F811
    positions = None if shape is None else np.random.default_rng(0).integers(0, 9, shape)
    (host,) = draw((3, 4, 5, 6), dtype=dtype)
    back = np.argsort(ORDERS[order]).tolist()
    tables = ops.rotary_tables((1.0, 0.5, 0.1), 16, dtype)

    def layout(a):
        return place(np.ascontiguousarray(a.transpose(ORDERS[order]))).transpose(back)

    compare(ops.Rotary, lambda x: ops.rotary(x, *tables, 2, positions), [host], dtype, layout=layout, dys=[place, layout])


def test_rotary_positions_that_some_texts_share(card):  # noqa: F811
    (host,) = draw((2, 3, 4, 5, 6))
    tables = ops.rotary_tables((1.0, 0.5, 0.1), 16, "float64")
    for shape in ((3, 1, 5), (2, 1, 1, 5), (1, 3, 4, 5), (2, 3, 4, 5)):
        positions = np.random.default_rng(0).integers(0, 9, shape)
        compare(ops.Rotary, lambda x: ops.rotary(x, *tables, 0, positions), [host], "float64")  # noqa: B023


def test_positions_are_moved_once_and_seen_when_they_change(card):  # noqa: F811
    """The same array with other numbers in it is not taken for the same positions."""
    rotary, positions = nn.RotaryEmbedding(6), np.array([[0, 1, 2], [4, 5, 6]])[:, None]
    x = place(draw((2, 4, 3, 6), dtype="float32")[0])
    first = fetch(rotary(x, positions=positions))
    if card:
        with standin.counting() as counts:
            rotary(x, positions=positions)
        assert counts.h2d == 0
    positions += 1
    second = fetch(rotary(x, positions=positions))
    expected = nn.RotaryEmbedding(6)(x, positions=positions.copy())
    assert second.tobytes() == fetch(expected).tobytes() != first.tobytes()


# -- constants -----------------------------------------------------------------------------------------------------------


def test_equal_constants_are_one_array(card, monkeypatch):  # noqa: F811
    device = backend.current_device()
    one, other = (backend.constant(np.array([1, 2], dtype), device) for dtype in ("int64", "int32"))
    assert backend.constant(np.array([1, 2]), device) is one and fetch(other).dtype == "int32"
    assert backend.constant(np.array([[1, 2]]), device).shape == (1, 2) and fetch(one).tolist() == [1, 2]
    monkeypatch.setattr(minilora.device, "CONSTANTS", 1)
    assert fetch(backend.constant(np.array([3]), device)).tolist() == [3] and fetch(one).tolist() == [1, 2]
    host = np.ones(3)
    assert backend.constant(host, backend.cpu) is host is backend.keep(host, "cpu")
