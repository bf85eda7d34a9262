"""What attention with a prefix promises beyond the table: two independent oracles, nothing copied a text, extremes, errors."""
import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora import Parameter, engine, ops
from minilora.errors import ConfigError, DTypeError, ShapeError


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def drawn(batch=3, H=4, KV=2, T=6, S=6, N=3, hd=5):
    """q, k, v and a prefix on the host."""
    shapes = (batch, H, T, hd), (batch, KV, S, hd), (batch, KV, S, hd), (2, KV, N, hd)
    return [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def gradients(call, arrays):
    parameters = [Parameter(place(a)) for a in arrays]
    y = call(*parameters)
    y.backward(place(draw(*y.shape, seed=99), y.dtype))
    return [fetch(y), *(fetch(p.grad) for p in parameters)]


def joined(q, k, v, prefix, **settings):
    """The prefix copied for every text and put in front of k and v, by operations that know nothing of it."""
    batch, (KV, N, hd) = q.shape[0], prefix.shape[1:]
    K, V = (ops.concatenate([ops.reshape(prefix[i], (1, KV, N, hd))] * batch) for i in (0, 1))
    return ops.attention(q, ops.concatenate([K, k], -2), ops.concatenate([V, v], -2), **settings)


@pytest.mark.parametrize("settings", [{}, {"causal": True}, {"causal": True, "window": 4}, {"causal": True, "window": 8}])
@pytest.mark.parametrize("sizes", [{}, dict(batch=2, T=130, S=130, N=20), dict(T=40, S=70), dict(batch=1, H=2, KV=2, N=1)])
def test_equals_the_prefix_joined_to_the_keys(settings, sizes, device):
    arrays = drawn(**sizes)
    got = gradients(lambda q, k, v, prefix: ops.prefix_attention(q, k, v, [prefix], **settings), arrays)
    for one, other in zip(got, gradients(lambda *x: joined(*x, **settings), arrays)):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-13 * max(1.0, np.abs(other).max()))


def test_is_a_mean_of_two_attentions(device):
    """y = (1 - lambda) Attn(x) + lambda Attn(prefix), with lambda from the exponentials themselves."""
    q, k, v, prefix = drawn(H=2)
    K, V = (np.broadcast_to(part, (3, *part.shape)) for part in prefix)
    own, other = (np.exp(q @ keys.swapaxes(-1, -2) / 5 ** 0.5).sum(-1, keepdims=True) for keys in (k, K))
    y, y_p = (fetch(ops.attention(*map(place, (q, np.ascontiguousarray(keys), np.ascontiguousarray(values)))))
              for keys, values in ((k, v), (K, V)))
    lam = other / (own + other)
    got = fetch(ops.prefix_attention(*map(place, (q, k, v)), [place(prefix)]))
    np.testing.assert_allclose(got, (1 - lam) * y + lam * y_p, rtol=0, atol=1e-13)


def test_packed_equals_split(device):
    q, k, v, prefix = drawn(batch=2, H=4, KV=2, T=70, S=70)

    def by_token(x):
        return ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (2, 70, -1))

    qkv = np.concatenate([x.swapaxes(1, 2).reshape(2, 70, -1) for x in (q, k, v)], -1)
    y, dqkv, dprefix = gradients(lambda x, p: ops.packed_prefix_attention(x, 4, [p], None, 2, causal=True), [qkv, prefix])
    z, *parts, other = gradients(lambda q, k, v, p: by_token(ops.prefix_attention(q, k, v, [p], causal=True)),
                                 [q, k, v, prefix])
    np.testing.assert_allclose(y, z, rtol=0, atol=1e-13)
    dx = np.concatenate([x.swapaxes(1, 2).reshape(2, 70, -1) for x in parts], -1)
    np.testing.assert_allclose(dqkv, dx, rtol=0, atol=1e-12)
    np.testing.assert_allclose(dprefix, other, rtol=0, atol=1e-12)


def test_a_run_of_texts_computes_as_if_alone(device):
    """Other texts, and other prefixes, have no effect on it: to the last bit where the arithmetic is the same."""
    q, k, v, prefix = drawn(batch=4)
    other = draw(2, 2, 7, 5, seed=9) * np.inf  # something is wrong with it
    with np.errstate(invalid="ignore"):
        y = fetch(ops.prefix_attention(*map(place, (q, k, v)), [place(prefix), place(other)],
                                       [(slice(1, 3), 0), (slice(3, 4), 1)], causal=True))
    alone = fetch(ops.prefix_attention(*(place(x[1:3]) for x in (q, k, v)), [place(prefix)], causal=True))
    without = fetch(ops.attention(*(place(x[:1]) for x in (q, k, v)), causal=True))
    np.testing.assert_allclose(y[1:3], alone, rtol=0, atol=1e-14)
    np.testing.assert_allclose(y[:1], without, rtol=0, atol=1e-14)
    assert np.isnan(y[3:]).any()


def test_the_prefix_is_kept_once():
    """Whatever the batch: 2 KV N hd numbers, and the gradient as many."""
    for batch in (1, 8):
        q, k, v, prefix = drawn(batch=batch, N=10)
        P = Parameter(prefix)
        y = ops.prefix_attention(*map(minilora.tensor, (q, k, v)), [P * 1.0])
        assert engine.ledger(y).nbytes == 8 * (2 * q.size + prefix.size + 2 * q.size // 5)  # q, y, the prefix, m, n; no k, no v


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_extreme_scores(dtype, device):
    """Of one set 1e4 times those of the other, and a text that sees nothing of its own: finite, and no warning."""
    q, k, v, prefix = (x.astype(dtype) for x in drawn(batch=2))
    for factor in (100.0, 1e-3):
        padding = np.array([[True] * 6, [False] * 6])
        y = fetch(ops.prefix_attention(place(q * factor), place(k * factor), place(v), [place(prefix)],
                                       key_padding=place(padding)))
        alone = fetch(ops.attention(place(q[1:] * factor), place(prefix[:1]), place(prefix[1:])))
        assert np.isfinite(y).all()
        np.testing.assert_allclose(y[1:], alone, rtol=0, atol=4 * float(np.finfo(dtype).eps) * np.abs(alone).max())


def test_errors():
    q, k, v, prefix = map(minilora.tensor, drawn())
    for wrong in (prefix[:, :1], prefix[..., :4], prefix[0], prefix[:, :, :0]):
        with pytest.raises(ShapeError, match=r"expected prefixes \(2, 2, N, 5\)"):
            ops.prefix_attention(q, k, v, [wrong])
    with pytest.raises(ShapeError, match="runs must say"):
        ops.prefix_attention(q, k, v, [prefix, prefix])
    for runs in ([(slice(0, 2), 0), (slice(1, 3), 0)], [(slice(0, 4), 0)], [(slice(0, 1), 1)], [(slice(2, 2), 0)]):
        with pytest.raises(ShapeError, match="none of which meet"):
            ops.prefix_attention(q, k, v, [prefix], runs)
    with pytest.raises(DTypeError, match="two dtypes"):
        ops.prefix_attention(q, k, v, [minilora.tensor(prefix.data.astype("float32"))])
    with pytest.raises(ConfigError, match="causal=True"):
        ops.prefix_attention(q, k, v, [prefix], window=2)
    with pytest.raises(ConfigError, match="window"):
        ops.prefix_attention(q, k, v, [prefix], causal=True, window=0)
    with pytest.raises(ShapeError, match="packed_attention"):
        ops.packed_prefix_attention(q, 4, [prefix])
