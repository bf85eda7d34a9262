"""Attention layers: their formula, their names, and that packed and separate, grouped and repeated are the same."""
import copy
import math

import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora import Parameter, engine, lora, nn, ops
from minilora.errors import ConfigError, DTypeError, ShapeError


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def run(layer, arrays, **settings):
    """Output, gradients of the inputs, gradients of the parameters by name; under one random cotangent."""
    leaves = [Parameter(place(a)) for a in arrays]
    for p in layer.parameters():
        p.grad = None
    y = layer(*leaves, **settings)
    y.backward(place(draw(*y.shape, seed=99)))
    trained = {name: p for name, p in layer.named_parameters() if p.trainable}
    return fetch(y), [fetch(leaf.grad) for leaf in leaves], {name: fetch(p.grad) for name, p in trained.items()}


def assert_close(got, expected, tol=1e-13):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tol * max(1.0, np.abs(expected).max(initial=0.0)))


# -- SimpleAttention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
def test_simple_attention_is_its_formula(lead, device):
    layer = nn.SimpleAttention(6, dtype="float64", rng=1)
    values, keys, query = draw(*lead, 5, 6), draw(*lead, 5, 6, seed=1), draw(*lead, 4, 6, seed=2)
    w = layer.state_dict()
    v, k, q = values @ w["values.weight"].T, keys @ w["keys.weight"].T, query @ w["queries.weight"].T
    y = softmax(q @ np.swapaxes(k, -1, -2) / math.sqrt(6)) @ v
    got = fetch(layer(*map(place, (values, keys, query))))
    assert got.shape == (*lead, 4, 6)
    assert_close(got, y @ w["fc_out.weight"].T + w["fc_out.bias"])


def test_simple_attention_has_the_articles_parameters():
    shapes = {name: p.shape for name, p in nn.SimpleAttention(6).named_parameters()}
    assert shapes == {"values.weight": (6, 6), "keys.weight": (6, 6), "queries.weight": (6, 6), "fc_out.weight": (6, 6),
                      "fc_out.bias": (6,)}


def test_simple_attention_trains_only_what_may_be_trained(device):
    layer = nn.SimpleAttention(6, dtype="float64", rng=1).requires_grad(False)
    layer.keys = lora.adapt(layer.keys, r=2, lora_alpha=2, rng=2)
    x = minilora.Tensor(place(draw(2, 5, 6)))
    y = layer(x, x, x)
    rows = [row.op for row in engine.ledger(y).rows]
    assert "Attention" in rows and rows.count("Linear") == 1  # fc_out; the projections of values and queries keep nothing
    y.sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == [
        "keys.adapters.default.lora_A", "keys.adapters.default.lora_B"]


# -- MultiheadAttention --------------------------------------------------------------------------------------------------


def multihead(w, query, key, value, heads, kv_heads, causal=False):
    def split(x, n):
        return np.moveaxis(x.reshape(*x.shape[:-1], n, -1), -2, -3)

    q, k, v = (split(x @ w[f"{n}_proj.weight"].T + w[f"{n}_proj.bias"], h)
               for x, n, h in ((query, "q", heads), (key, "k", kv_heads), (value, "v", kv_heads)))
    k, v = (np.repeat(x, heads // kv_heads, axis=-3) for x in (k, v))
    z = q @ np.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1])
    if causal:
        z = np.where(np.tri(*z.shape[-2:], z.shape[-1] - z.shape[-2], dtype=bool), z, -np.inf)
    y = np.moveaxis(softmax(z) @ v, -3, -2)
    return y.reshape(*y.shape[:-2], -1) @ w["out_proj.weight"].T + w["out_proj.bias"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (1, 1)])
def test_multihead_is_its_formula(heads, kv_heads, causal, device):
    layer = nn.MultiheadAttention(12, heads, kv_heads, causal=causal, dtype="float64", rng=1)
    w = layer.state_dict()
    x, other, third = draw(2, 5, 12), draw(2, 7, 12, seed=1), draw(2, 7, 12, seed=2)
    assert_close(fetch(layer(place(x))), multihead(w, x, x, x, heads, kv_heads, causal))
    assert_close(fetch(layer(place(x), place(other))), multihead(w, x, other, other, heads, kv_heads, causal))
    assert_close(fetch(layer(place(x), place(other), place(third))),
                 multihead(w, x, other, third, heads, kv_heads, causal))
    assert fetch(layer(place(x[0]))).shape == (5, 12)


def test_names_and_shapes():
    separate = {name: p.shape for name, p in nn.MultiheadAttention(12, 4, 2).named_parameters()}
    assert separate == {"q_proj.weight": (12, 12), "q_proj.bias": (12,), "k_proj.weight": (6, 12), "k_proj.bias": (6,),
                        "v_proj.weight": (6, 12), "v_proj.bias": (6,), "out_proj.weight": (12, 12), "out_proj.bias": (12,)}
    packed = {name: p.shape for name, p in nn.MultiheadAttention(12, 4, 2, bias=False, packed=True).named_parameters()}
    assert packed == {"qkv_proj.weight": (24, 12), "out_proj.weight": (12, 12)}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_packed_equals_separate(kv_heads, causal, device):
    separate, packed = (nn.MultiheadAttention(12, 4, kv_heads, causal=causal, packed=p, dtype="float64", rng=1)
                        for p in (False, True))
    state, parts = separate.state_dict(), ("q_proj", "k_proj", "v_proj")
    for kind in ("weight", "bias"):
        state[f"qkv_proj.{kind}"] = np.concatenate([state.pop(f"{p}.{kind}") for p in parts])
    packed.load_state_dict(state)
    keep, mask = np.array([[True] * 5, [True, True, False, True, True]]), draw(5, 5)
    y, (dx,), grads = run(separate, [draw(2, 5, 12)], key_padding=keep, mask=place(mask))
    y2, (dx2,), grads2 = run(packed, [draw(2, 5, 12)], key_padding=keep, mask=place(mask))
    assert_close(y2, y)
    assert_close(dx2, dx)
    for kind in ("weight", "bias"):
        assert_close(grads2[f"qkv_proj.{kind}"], np.concatenate([grads[f"{p}.{kind}"] for p in parts]))
        assert_close(grads2[f"out_proj.{kind}"], grads[f"out_proj.{kind}"])


def test_one_seed_gives_one_layer_on_every_device(device):
    layer = nn.MultiheadAttention(8, 2, rng=np.random.default_rng(7))
    with minilora.use("cpu"):
        other = nn.MultiheadAttention(8, 2, rng=np.random.default_rng(7))
    assert {n: a.tobytes() for n, a in layer.state_dict().items()} == {n: a.tobytes() for n, a in other.state_dict().items()}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("packed", [True, False])
def test_dtype_is_kept(dtype, packed, device):
    rotary = None if packed else nn.RotaryEmbedding(4)
    layer = nn.MultiheadAttention(8, 2, causal=True, packed=packed, rotary=rotary, dtype=dtype, rng=0)
    y = layer(place(draw(2, 5, 8), dtype))
    y.mean().backward()
    assert {y.dtype.name, *(p.grad.dtype.name for p in layer.parameters())} == {dtype}


def test_adapters_go_into_the_projections(device):
    layer = nn.MultiheadAttention(8, 2, packed=True, causal=True, dtype="float64", rng=0).requires_grad(False)
    layer.qkv_proj = lora.adapt(layer.qkv_proj, r=2, lora_alpha=4, rng=1)
    layer.qkv_proj.lora_B.data[...] = place(draw(24, 2))
    x = draw(2, 5, 8)
    y, (dx,), grads = run(layer, [x])
    layer.eval().qkv_proj.merge()
    merged = fetch(layer(place(x)))
    assert_close(merged, y)
    assert all(grads[f"qkv_proj.adapters.default.{name}"].any() for name in ("lora_A", "lora_B")) and dx.any()


# -- rotary ----------------------------------------------------------------------------------------------------------------


def test_rotary_turns_queries_and_keys_but_not_values(device):
    rotary = nn.RotaryEmbedding(6, theta=100.0)
    layer = nn.MultiheadAttention(12, 2, causal=True, rotary=rotary, dtype="float64", rng=1)
    plain = nn.MultiheadAttention(12, 2, causal=True, dtype="float64", rng=1)
    x = draw(2, 5, 12)
    y, before = fetch(layer(place(x))), fetch(plain(place(x)))
    np.testing.assert_array_equal(y[:, 0], before[:, 0])  # the first token sees only itself: values alone
    assert np.abs(y[:, 1:] - before[:, 1:]).max() > 1e-3
    tables = ops.rotary_tables(ops.rotary_frequencies(6, 100.0), 5, "float64")

    def by_heads(projection):
        return ops.transpose(ops.reshape(projection(place(x)), (2, 5, 2, 6)), (0, 2, 1, 3))

    q, k, v = (by_heads(p) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    joined = ops.transpose(ops.attention(ops.rotary(q, *tables), ops.rotary(k, *tables), v, causal=True), (0, 2, 1, 3))
    np.testing.assert_array_equal(y, fetch(layer.out_proj(ops.reshape(joined, (2, 5, 12)))))


def test_rotary_padding_at_the_left_changes_nothing(device):
    """Positions count only by their differences."""
    layer = nn.MultiheadAttention(12, 2, causal=True, rotary=nn.RotaryEmbedding(6), dtype="float64", rng=1)
    x = draw(1, 5, 12)
    padded = np.concatenate([draw(1, 3, 12, seed=1), x], axis=1)
    keep = np.array([[False] * 3 + [True] * 5])
    assert_close(fetch(layer(place(padded), key_padding=keep))[:, 3:], fetch(layer(place(x))))


def test_rotary_tables_grow_and_follow_the_data(device):
    rotary = nn.RotaryEmbedding(4)
    assert not list(rotary.parameters())
    short = rotary(place(draw(2, 5, 4)))
    (first,) = rotary.tables.values()
    rotary(place(draw(2, 100, 4)))
    assert next(iter(rotary.tables.values())) is first
    long = rotary(place(draw(2, 300, 4)), 7)
    assert len(next(iter(rotary.tables.values()))[0]) == 512 and long.device.name == device
    assert fetch(rotary(place(draw(2, 5, 4)))).tobytes() == fetch(short).tobytes()
    rotary(place(draw(2, 5, 4), "float32"))
    assert len(rotary.tables) == 2
    other = copy.deepcopy(rotary)
    assert fetch(other(place(draw(2, 5, 4)))).tobytes() == fetch(short).tobytes()


def test_rotary_can_be_shared_and_is_no_state(device):
    rotary = nn.RotaryEmbedding(4)
    model = nn.Sequential(*(nn.MultiheadAttention(8, 2, rotary=rotary, rng=i) for i in range(2)))
    model(place(draw(2, 5, 8), "float32"))
    assert len(rotary.tables) == 1 and all("rotary" not in name for name in model.state_dict())


# -- mistakes ----------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "heads": (ConfigError, "10 and 4", lambda x: nn.MultiheadAttention(10, 4)),
    "kv heads": (ConfigError, "4 and 3", lambda x: nn.MultiheadAttention(12, 4, 3)),
    "no heads": (ConfigError, "num_heads must be an int >= 1, got 0", lambda x: nn.MultiheadAttention(12, 0)),
    "no kv heads": (ConfigError, "num_kv_heads must be an int >= 1, got 0", lambda x: nn.MultiheadAttention(12, 4, 0)),
    "embed_dim": (ConfigError, "embed_dim must be an int >= 1, got -8", lambda x: nn.MultiheadAttention(-8, 4)),
    "embed_size": (ConfigError, "embed_size must be an int >= 1, got 1.5", lambda x: nn.SimpleAttention(1.5)),
    "rotary and packed": (ConfigError, "packed=False", lambda x: nn.MultiheadAttention(
        12, 2, packed=True, rotary=nn.RotaryEmbedding(6))),
    "rotary of another size": (ConfigError, "6", lambda x: nn.MultiheadAttention(12, 2, rotary=nn.RotaryEmbedding(4))),
    "odd rotary": (ConfigError, "got 5", lambda x: nn.RotaryEmbedding(5)),
    "theta": (ConfigError, "inf", lambda x: nn.RotaryEmbedding(4, math.inf)),
    "keys of a packed layer": (ConfigError, "packed=False", lambda x: nn.MultiheadAttention(12, 2, packed=True)(x, x)),
    "width": (ShapeError, "(2, 5, 12)", lambda x: nn.MultiheadAttention(8, 2)(x)),
    "one token": (ShapeError, "(12,)", lambda x: nn.MultiheadAttention(12, 2)(x[0, 0])),
    "one token, packed": (ShapeError, "(36,)", lambda x: nn.MultiheadAttention(12, 2, packed=True)(x[0, 0])),
    "one token, simple": (ShapeError, "(12,)", lambda x: nn.SimpleAttention(12)(x[0, 0], x, x)),
    "batches": (ShapeError, "(1,) and (2,)", lambda x: nn.MultiheadAttention(12, 2)(x[:1], x)),
    "batches, simple": (ShapeError, "(2,) and (1,)", lambda x: nn.SimpleAttention(12)(x[:1], x[:1], x)),
    "values and keys": (ShapeError, "(2, 1, 4, 12)", lambda x: nn.SimpleAttention(12)(x, x[:, :4], x)),
    "padding": (ShapeError, "(2, 5)", lambda x: nn.MultiheadAttention(12, 2)(x, key_padding=np.ones((2, 4), bool))),
    "rotary shape": (ShapeError, "(2, 5, 12)", lambda x: nn.RotaryEmbedding(4)(x)),
    "rotary offset": (ConfigError, "-1", lambda x: nn.RotaryEmbedding(12)(x, -1)),
    "rotary of integers": (DTypeError, "int64", lambda x: nn.RotaryEmbedding(4)(place([[1, 2, 3, 4]]))),
}


@pytest.mark.parametrize(("error", "named", "call"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(error, named, call, device):
    with pytest.raises(error) as caught:
        call(minilora.Tensor(place(draw(2, 5, 12), "float32")))
    assert named in str(caught.value)


def test_the_error_names_the_layer(device):
    model = nn.Sequential(nn.MultiheadAttention(12, 2), nn.MultiheadAttention(12, 2, packed=True))
    x = place(draw(2, 5, 12), "float32")
    assert model(x).shape == (2, 5, 12)
    with pytest.raises(ShapeError) as caught:
        model(place(draw(2, 5, 10), "float32"))
    assert caught.value.path == "0.q_proj"


def test_repr():
    assert "num_heads=4, num_kv_heads=2, causal=True" in repr(nn.MultiheadAttention(12, 4, 2, causal=True))
    assert repr(nn.RotaryEmbedding(4)) == "RotaryEmbedding(head_dim=4, theta=10000.0)"


# -- positions of rows --------------------------------------------------------------------------------------------


def test_every_row_at_its_own_position(device):
    rotary, rng = nn.RotaryEmbedding(6), np.random.default_rng(0)
    x, positions = rng.standard_normal((2, 3, 4, 6)), np.array([[[0, 5, 5, 300]], [[7, 1, 0, 2]]])
    y = fetch(rotary(minilora.tensor(x), positions=positions))
    for b in range(2):
        for t in range(4):
            alone = fetch(rotary(minilora.tensor(x[b, :, t:t + 1]), offset=int(positions[b, 0, t])))
            np.testing.assert_array_equal(y[b, :, t:t + 1], alone)
    report = minilora.testing.gradcheck(lambda x: rotary(x, positions=positions), x)
    assert report.passed, str(report)


@pytest.mark.parametrize("positions, error", [([0, 1, 2], ShapeError), ([[[[[0]]]]], ShapeError), ([0.0] * 4, DTypeError),
                                              ([-1] * 4, minilora.errors.OutOfRangeError),
                                              ([2 ** 24] * 4, minilora.errors.OutOfRangeError)])
def test_positions_that_do_not_fit(positions, error):
    with pytest.raises(error, match="position"):
        nn.RotaryEmbedding(6)(minilora.tensor(np.ones((2, 3, 4, 6))), positions=positions)
