"""Rows of the table of operations for attention and rotary embeddings; cases.py adds them to its own."""
from __future__ import annotations

import math

import numpy as np
from cases import LEADING, SIDE, Case
from hypothesis import strategies as st

from minilora import backend, engine, ops
from minilora.ops.masks import prepare_masks

CASES: list[Case] = []


def case(name, op, call, formula, *shapes, **settings):
    CASES.append(Case(name, op, call, formula, shapes, **settings))


# -- masks: what a row says about the key s of the query t, and how the call gets it -------------------------------------


def may_attend(T, S, causal=False, key_padding=None, mask=None, window=None):
    """Numbers to add to the scores, broadcasting to (..., H, T, S): -inf where a key may not be attended."""
    M = np.zeros((T, S))
    if causal:
        for t in range(T):
            M[t, max(0, S - T + t + 1):] = -np.inf
            M[t, :max(0, S - T + t + 1 - (window or S))] = -np.inf
    if key_padding is not None:
        M = M + np.where(key_padding, 0.0, -np.inf)[..., None, None, :]
    if mask is not None:
        M = M + (np.where(mask, 0.0, -np.inf) if mask.dtype == bool else mask)
    return M


def placed(x, masks, on_host):
    """The masks as arguments: numbers in the dtype of x, on its device unless the row leaves them on the host."""
    place = np.asarray if on_host else backend.asarray
    real = "float64" if x.dtype.kind == "c" else x.dtype
    return {name: place(a if a.dtype == bool else a.astype(real)) for name, a in masks.items()}


# -- formulas ------------------------------------------------------------------------------------------------------------


def attention(scale=None, causal=False, **masks):
    """Query by query, key by key: a key's probability is 1 / sum_s e^(z_s - z_this)."""
    def formula(q, k, v):
        q, k, v = (np.asarray(x, float) for x in (q, k, v))
        *lead, H, T, hd = q.shape
        KV, S = k.shape[-3:-1]
        M = np.broadcast_to(may_attend(T, S, causal, **masks), (*lead, H, T, S))
        y = np.zeros(q.shape)
        for *batch, h, t in np.ndindex(*lead, H, T):
            kv = (*batch, h * KV // H)
            seen = [s for s in range(S) if M[(*batch, h, t, s)] > -np.inf]
            z = [math.fsum(q[(*batch, h, t)] * k[(*kv, s)]) * (scale or hd ** -0.5) + M[(*batch, h, t, s)] for s in seen]
            for s, own in zip(seen, z):
                y[(*batch, h, t)] += v[(*kv, s)] / math.fsum(math.exp(min(other - own, 700.0)) for other in z)
        return y
    return formula


def packed(H, KV, **settings):
    def formula(qkv):
        *lead, T, width = qkv.shape
        hd = width // (H + 2 * KV)
        heads = np.moveaxis(qkv.reshape(*lead, T, H + 2 * KV, hd), -2, -3)
        q, k, v = np.split(heads, [H, H + KV], axis=-3)
        return np.moveaxis(attention(**settings)(q, k, v), -3, -2).reshape(*lead, T, H * hd)
    return formula


def prefixed(runs=None, window=None, causal=False, **settings):
    """Each text by itself, with the keys of its prefix joined to its own; both stand at places from 0 on."""
    def formula(q, k, v, *prefixes):
        lead, T, S, y = q.shape[:-3], q.shape[-2], k.shape[-2], np.zeros(q.shape)
        for b in np.ndindex(*lead):
            which = 0 if runs is None else next((i for (start, stop), i in runs if start <= b[0] < stop), None)
            K, V = (np.zeros((k.shape[-3], 0, k.shape[-1])),) * 2 if which is None else prefixes[which]
            N = K.shape[-2]
            M = np.zeros((T, N + S))
            for t in range(T if window else 0):
                M[t, :max(0, N + S - T + t + 1 - window)][:N] = -np.inf
            M[:, N:] += may_attend(T, S, causal, window=window, **{
                name: a[b] if name == "key_padding" else a for name, a in settings.items() if name != "scale"}).reshape(T, S)
            y[b] = attention(settings.get("scale"), mask=M)(q[b], np.concatenate([K, k[b]], 1), np.concatenate([V, v[b]], 1))
        return y
    return formula


def packed_prefixed(H, KV, **settings):
    def formula(qkv, *prefixes):
        *lead, T, width = qkv.shape
        hd = width // (H + 2 * KV)
        heads = np.moveaxis(qkv.reshape(*lead, T, H + 2 * KV, hd), -2, -3)
        y = prefixed(**settings)(*np.split(heads, [H, H + KV], axis=-3), *prefixes)
        return np.moveaxis(y, -3, -2).reshape(*lead, T, H * hd)
    return formula


def rotary(theta, offset):
    """Each pair of halves as one complex number, times e^(i angle)."""
    def formula(x):
        half = x.shape[-1] // 2
        turned = np.zeros(x.shape)
        for t in range(x.shape[-2]):
            for i in range(half):
                angle = (t + offset) / theta ** (2 * i / x.shape[-1])
                point = (x[..., t, i] + 1j * x[..., t, i + half]) * complex(math.cos(angle), math.sin(angle))
                turned[..., t, i], turned[..., t, i + half] = point.real, point.imag
        return turned
    return formula


def disentangled(buckets, scale=None, **masks):
    """Pair by pair: the score of t and s from three products, the last two with the rows of their bucket."""
    def formula(q, k, v, *tables, by_query=True, by_key=True):
        q, k, v = (np.asarray(x, float) for x in (q, k, v))
        *lead, H, T, hd = q.shape
        every = [np.broadcast_to(row, (*lead, *row.shape[-3:])) for row in tables]
        rk, rq = every.pop(0) if by_query else None, every.pop(0) if by_key else None
        c = scale or (hd * (1 + by_query + by_key)) ** -0.5
        M = np.broadcast_to(may_attend(T, T, **masks), (*lead, H, T, T))
        y = np.zeros(q.shape)
        for *batch, h, t in np.ndindex(*lead, H, T):
            z = {}
            for s in range(T):
                if M[(*batch, h, t, s)] > -np.inf:
                    b, one, other = buckets[t - s + T - 1], q[(*batch, h, t)], k[(*batch, h, s)]
                    products = one * other + (one * rk[(*batch, h, b)] if by_query else 0) + (
                        other * rq[(*batch, h, b)] if by_key else 0)
                    z[s] = c * math.fsum(products)
            for s, own in z.items():
                y[(*batch, h, t)] += v[(*batch, h, s)] / math.fsum(math.exp(min(other - own, 700.0)) for other in z.values())
        return y
    return formula


# -- rows ----------------------------------------------------------------------------------------------------------------


def attention_kept(needs, q, k, v, y):
    return q.size + k.size + (needs[0] or needs[1]) * (v.size + y.size) + 2 * math.prod(q.shape[:-1])


def packed_kept(H):
    def kept(needs, qkv, y):
        return qkv.size + y.size + 2 * H * math.prod(qkv.shape[:-1])
    return kept


HEADS = st.tuples(LEADING, st.integers(1, 3), st.integers(1, 3), SIDE, SIDE, SIDE).map(
    lambda d: ((*d[0], d[1] * d[2], d[3], d[5]), (*d[0], d[1], d[4], d[5]), (*d[0], d[1], d[4], d[5])))
TOKENS = st.tuples(LEADING, SIDE, SIDE).map(lambda d: ((*d[0], d[1], 8 * d[2]),))
PLACES = st.tuples(LEADING, st.integers(0, 4), SIDE).map(lambda d: ((*d[0], d[1], 2 * d[2]),))

PADDING = np.array([[True, True, False, True], [False, True, True, False]])
NOBODY = np.array([[True, False, True, True], [False, False, False, False]])  # a batch entry with no key at all
BIAS = np.array([[0.5, -1.0, 2.0, 0.25], [0.0, 3.0, -0.5, 1.0], [-2.0, 0.0, 0.0, 1.5]])
HOLES = np.where(np.arange(12).reshape(3, 4) % 5 == 1, -np.inf, BIAS)
CLOSED = np.array([[True, False, True, False], [False] * 4, [False, True, True, True]])  # query 1 sees nothing
TALL, WIDE, SQUARE = ((2, 2, 3, 5), (2, 2, 4, 5)), ((2, 4, 3, 5), (2, 2, 4, 5)), ((2, 2, 4, 5), (2, 2, 4, 5))

ATTENTION = {
    "more keys": (*TALL, {}),
    "more queries": ((2, 3, 5, 2), (2, 3, 2, 2), {}),
    "no batch axis": ((2, 3, 4), (2, 3, 4), {}),
    "two batch axes": ((2, 1, 2, 3, 2), (2, 1, 2, 2, 2), {}),
    "grouped": (*WIDE, {}),
    "one key head": ((2, 3, 3, 4), (2, 1, 2, 4), {}),
    "one query": ((2, 2, 1, 5), (2, 2, 4, 5), {}),
    "one key": ((2, 2, 3, 5), (2, 2, 1, 5), {}),
    "one number a head": ((2, 2, 3, 1), (2, 2, 4, 1), {}),
    "all ones": ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    "empty batch": ((0, 2, 3, 5), (0, 2, 4, 5), {}),
    "no query": ((2, 2, 0, 5), (2, 2, 4, 5), {}),
    "scale": (*TALL, dict(scale=0.7)),
    "causal": (*SQUARE, dict(causal=True)),
    "causal, more keys": (*WIDE, dict(causal=True)),
    "causal, more queries": ((2, 2, 5, 4), (2, 1, 3, 4), dict(causal=True)),
    "causal, one query": ((2, 2, 1, 4), (2, 1, 3, 4), dict(causal=True)),
    "causal, empty batch": ((0, 2, 3, 5), (0, 1, 3, 5), dict(causal=True)),
    "padded": (*TALL, dict(key_padding=PADDING)),
    "padded, nobody": (*WIDE, dict(key_padding=NOBODY)),
    "padded, causal": (*WIDE, dict(key_padding=PADDING, causal=True)),
    "added": (*TALL, dict(mask=BIAS)),
    "added to each head": (*TALL, dict(mask=np.stack([BIAS, 2 * BIAS]))),
    "added to one head of each batch": (*WIDE, dict(mask=np.stack([BIAS, -BIAS])[:, None])),
    "added to all keys of a query": (*TALL, dict(mask=BIAS[:, :1])),
    "added, grouped": (*WIDE, dict(mask=np.stack([BIAS, 2 * BIAS, -BIAS, HOLES]))),
    "added, with -inf": (*TALL, dict(mask=HOLES)),
    "added, large": (*TALL, dict(mask=np.where(np.isinf(HOLES), -1e4, HOLES))),
    "booleans": (*TALL, dict(mask=np.isfinite(HOLES))),
    "a query that sees nothing": (*WIDE, dict(mask=CLOSED)),
    "nothing at all": (*TALL, dict(mask=np.zeros((3, 4), bool))),
    "every mask": (*WIDE, dict(key_padding=PADDING, causal=True, mask=HOLES)),
    "window": (*SQUARE, dict(causal=True, window=2)),
    "window of one": (*WIDE, dict(causal=True, window=1)),
    "window, more queries": ((2, 2, 5, 4), (2, 1, 3, 4), dict(causal=True, window=2)),
    "window, one query": ((2, 2, 1, 4), (2, 1, 3, 4), dict(causal=True, window=2)),
    "window as long as the keys": (*SQUARE, dict(causal=True, window=4)),
    "window, no query": ((2, 2, 0, 5), (2, 2, 4, 5), dict(causal=True, window=1)),
    "window, every mask": (*WIDE, dict(key_padding=PADDING, causal=True, mask=HOLES, window=2)),
}
for number, (name, (q, kv, settings)) in enumerate(ATTENTION.items()):
    masks = {key: value for key, value in settings.items() if isinstance(value, np.ndarray)}
    numbers = {key: value for key, value in settings.items() if key not in masks}
    case(f"attention {name}", ops.Attention,
         lambda q, k, v, m=masks, n=numbers, host=number % 2: ops.attention(q, k, v, **n, **placed(q, m, host)),
         attention(**settings), q, kv, kv, kept=attention_kept, products=True,
         drawn=HEADS if name in ("more keys", "causal, more keys") else None)

PACKED = {
    "two heads": ((2, 4, 18), 2, 2, {}),
    "one head": ((2, 3, 6), 1, 1, {}),
    "no batch axis": ((4, 12), 2, 2, {}),
    "two batch axes": ((1, 2, 3, 12), 2, 2, {}),
    "grouped": ((2, 4, 24), 4, 2, {}),
    "one token": ((3, 1, 12), 2, 2, dict(causal=True)),
    "empty batch": ((0, 3, 12), 2, 2, dict(causal=True)),
    "causal": ((2, 4, 18), 2, 2, dict(causal=True)),
    "causal, grouped": ((2, 4, 16), 4, 2, dict(causal=True)),
    "padded, causal": ((2, 4, 18), 2, 2, dict(key_padding=NOBODY, causal=True)),
    "added": ((2, 4, 24), 4, 2, dict(mask=np.stack([np.vstack([HOLES, BIAS[:1]])] * 2)[:, None], scale=0.3)),
}

# The operations work on blocks of 64 queries, or 256 if not causal: here of 2, or 4, with a shorter one at the end.
for name, (q, kv, settings) in {
    "plain": ((2, 2, 5, 3), (2, 2, 4, 3), {}),
    "causal": ((2, 4, 5, 3), (2, 2, 5, 3), dict(causal=True)),
    "causal, more keys": ((2, 2, 5, 3), (2, 2, 7, 3), dict(causal=True)),
    "causal, more queries": ((2, 2, 7, 3), (2, 1, 3, 3), dict(causal=True)),
    "window": ((2, 4, 7, 3), (2, 2, 7, 3), dict(causal=True, window=3)),
    "window of one": ((2, 2, 5, 3), (2, 2, 5, 3), dict(causal=True, window=1)),
    "window, more keys": ((2, 2, 5, 3), (2, 2, 9, 3), dict(causal=True, window=2)),
    "window, more queries": ((2, 2, 7, 3), (2, 1, 4, 3), dict(causal=True, window=2)),
    "every mask": ((2, 4, 3, 5), (2, 2, 4, 5), dict(key_padding=PADDING, causal=True, mask=HOLES)),
    "a query that sees nothing": ((2, 4, 3, 5), (2, 2, 4, 5), dict(mask=CLOSED, causal=True)),
    "mask of columns": ((2, 2, 3, 5), (2, 2, 4, 5), dict(mask=BIAS[:, :1], causal=True)),
    "mask of keys": ((2, 2, 3, 5), (2, 2, 4, 5), dict(mask=BIAS[0], causal=True)),
    "mask of one number": ((2, 2, 3, 5), (2, 2, 4, 5), dict(mask=np.array(1.5), causal=True)),
}.items():
    masks = {key: value for key, value in settings.items() if isinstance(value, np.ndarray)}
    case(f"attention in blocks {name}", ops.Attention,
         lambda q, k, v, m=masks, causal="causal" in settings, window=settings.get("window"): engine.apply(
             ops.Attention, q, k, v, scale=q.shape[-1] ** -0.5, causal=causal, block=2 if causal else 1, window=window,
             masks=prepare_masks(q, q.shape, k.shape[-2], *map(placed(q, m, False).get, ("key_padding", "mask")))),
         attention(**settings), q, kv, kv, kept=attention_kept, products=True, drawn=HEADS if not masks else None)

for number, (name, (qkv, H, KV, settings)) in enumerate(PACKED.items()):
    masks = {key: value for key, value in settings.items() if isinstance(value, np.ndarray)}
    numbers = {key: value for key, value in settings.items() if key not in masks}
    case(f"packed_attention {name}", ops.PackedAttention,
         lambda qkv, heads=(H, KV), m=masks, n=numbers, host=number % 2: ops.packed_attention(
             qkv, *heads, **n, **placed(qkv, m, host)),
         packed(H, KV, **settings), qkv, kept=packed_kept(H), products=True,
         drawn=TOKENS if name == "causal, grouped" else None)

# name: (q, k and v, N of each prefix, settings)
PREFIXED = {
    "plain": (*TALL, [2], {}),
    "one key": (*WIDE, [1], {}),
    "grouped": (*WIDE, [3], dict(scale=0.7)),
    "no batch axis": ((2, 3, 4), (2, 3, 4), [2], {}),
    "two batch axes": ((2, 1, 2, 3, 2), (2, 1, 2, 2, 2), [2], {}),
    "empty batch": ((0, 2, 3, 5), (0, 2, 4, 5), [2], {}),
    "no query": ((2, 2, 0, 5), (2, 2, 4, 5), [2], {}),
    "causal": (*SQUARE, [3], dict(causal=True)),
    "causal, one query": ((2, 2, 1, 4), (2, 1, 3, 4), [2], dict(causal=True)),
    "causal, more queries": ((2, 2, 5, 4), (2, 1, 3, 4), [2], dict(causal=True)),
    "padded, nobody": (*WIDE, [2], dict(key_padding=NOBODY, causal=True)),
    "added, with -inf": (*TALL, [2], dict(mask=HOLES)),
    "window inside the text": (*SQUARE, [3], dict(causal=True, window=2)),
    "window into the prefix": (*SQUARE, [3], dict(causal=True, window=5)),
    "window over all": (*SQUARE, [3], dict(causal=True, window=7)),
    "window, padded": (*WIDE, [2], dict(causal=True, window=3, key_padding=NOBODY)),
    "some texts": ((4, 2, 3, 5), (4, 1, 3, 5), [2], dict(runs=[((1, 3), 0)], causal=True)),
    "two prefixes": ((4, 2, 3, 5), (4, 1, 4, 5), [2, 3], dict(runs=[((0, 1), 1), ((1, 3), 0)])),
    "one prefix twice": ((4, 4, 3, 5), (4, 2, 3, 5), [2, 1], dict(runs=[((0, 1), 0), ((1, 2), 1), ((3, 4), 0)], causal=True)),
    "runs and a window": ((3, 2, 4, 5), (3, 1, 4, 5), [2, 3], dict(runs=[((0, 1), 1), ((2, 3), 0)], causal=True, window=4)),
    "no text": ((2, 2, 3, 5), (2, 2, 4, 5), [2], dict(runs=[])),
}


def as_runs(settings):
    runs = settings.get("runs")
    return None if runs is None else [(slice(*texts), which) for texts, which in runs]


def prefixed_kept(needs, q, k, v, *rest):
    qk = needs[0] or needs[1]
    return (q.size + (qk or needs[2]) * k.size + qk * v.size + (qk or any(needs[3:])) * rest[-1].size
            + 2 * math.prod(q.shape[:-1]) + sum(prefix.size for prefix in rest[:-1]))


for number, (name, (q, kv, N, settings)) in enumerate(PREFIXED.items()):
    masks = {key: value for key, value in settings.items() if isinstance(value, np.ndarray)}
    numbers = {key: value for key, value in settings.items() if key not in masks and key != "runs"}
    case(f"prefix_attention {name}", ops.PrefixAttention,
         lambda q, k, v, *prefixes, m=masks, n=numbers, runs=as_runs(settings), host=number % 2: ops.prefix_attention(
             q, k, v, prefixes, runs, **n, **placed(q, m, host)),
         prefixed(**settings), q, kv, kv, *[(2, kv[-3], n, kv[-1]) for n in N], kept=prefixed_kept, products=True)

for name, (qkv, H, KV, N, settings) in {
    "two heads": ((2, 4, 18), 2, 2, [2], {}),
    "grouped, causal": ((2, 4, 16), 4, 2, [3], dict(causal=True)),
    "no batch axis": ((4, 12), 2, 2, [1], dict(causal=True)),
    "two batch axes": ((1, 2, 3, 12), 2, 2, [2], {}),
    "empty batch": ((0, 3, 12), 2, 2, [2], dict(causal=True)),
    "padded, causal": ((2, 4, 18), 2, 2, [2], dict(key_padding=NOBODY, causal=True)),
    "two prefixes": ((3, 4, 18), 2, 2, [2, 1], dict(runs=[((0, 2), 1), ((2, 3), 0)], causal=True, scale=0.3)),
}.items():
    masks = {key: value for key, value in settings.items() if isinstance(value, np.ndarray)}
    numbers = {key: value for key, value in settings.items() if key not in masks and key != "runs"}
    case(f"packed_prefix_attention {name}", ops.PackedPrefixAttention,
         lambda qkv, *prefixes, heads=(H, KV), m=masks, n=numbers, runs=as_runs(settings): ops.packed_prefix_attention(
             qkv, heads[0], prefixes, runs, heads[1], **n, **placed(qkv, m, True)),
         packed_prefixed(H, KV, **settings), qkv, *[(2, KV, n, qkv[-1] // (H + 2 * KV)) for n in N],
         kept=lambda needs, qkv, *rest, H=H: packed_kept(H)(needs, qkv, rest[-1]) + sum(p.size for p in rest[:-1]),
         products=True)

# name: (q, n buckets, the bucket of each distance, which of the terms, settings)
DISENTANGLED = {
    "plain": ((2, 2, 3, 4), 5, [0, 1, 2, 3, 4], "both", {}),
    "shared buckets": ((2, 2, 4, 3), 4, [0, 0, 1, 2, 2, 3, 3], "both", {}),
    "rows that nobody meets": ((1, 2, 3, 4), 9, [2, 2, 4, 7, 7], "both", {}),
    "buckets in any order": ((2, 1, 3, 2), 3, [2, 0, 1, 0, 2], "both", {}),
    "by query": ((2, 2, 3, 4), 5, [0, 1, 2, 3, 4], "by_query", {}),
    "by key": ((2, 2, 3, 4), 4, [0, 1, 2, 3, 3], "by_key", {}),
    "by none": ((2, 2, 3, 4), 5, [0, 1, 2, 3, 4], "none", {}),
    "one token": ((2, 2, 1, 3), 2, [1], "both", {}),
    "no batch axis": ((3, 4, 2), 5, [0, 1, 2, 2, 3, 4, 4], "both", {}),
    "two batch axes": ((2, 1, 2, 3, 2), 3, [0, 1, 1, 1, 2], "both", {}),
    "one number a head": ((2, 2, 3, 1), 5, [0, 1, 2, 3, 4], "both", {}),
    "empty batch": ((0, 2, 3, 4), 5, [0, 1, 2, 3, 4], "both", {}),
    "scale": ((2, 2, 3, 4), 5, [0, 1, 2, 3, 4], "both", dict(scale=0.7)),
    "padded": ((2, 2, 4, 3), 3, [0, 0, 1, 1, 1, 2, 2], "both", dict(key_padding=PADDING)),
    "padded, nobody": ((2, 2, 4, 3), 3, [0, 0, 1, 1, 1, 2, 2], "by_key", dict(key_padding=NOBODY)),
    "rows of each text": ((2, 2, 3, 4), 4, [0, 1, 2, 2, 3], "both", dict(lead=[(2,), (2,)])),
    "rows of each text, and of all": ((2, 2, 3, 2), 4, [0, 1, 1, 2, 3], "both", dict(lead=[(2,), (1,)])),
    "rows of some axes": ((2, 3, 2, 2, 2), 3, [0, 1, 2], "both", dict(lead=[(2, 1), (3,)])),
    "empty batch, one row": ((0, 2, 3, 4), 5, [0, 1, 2, 3, 4], "both", dict(lead=[(1,), ()])),
}


def disentangled_kept(needs, q, k, v, *rest):
    tables, y = rest[:-1], rest[-1]
    others = needs[0] or needs[1] or any(needs[3:])
    return (q.size + k.size + others * (v.size + y.size) + 2 * math.prod(q.shape[:-1]) + sum(table.size for table in tables))


for number, (name, (q, n, buckets, terms, settings)) in enumerate(DISENTANGLED.items()):
    leads = settings.pop("lead", [(), ()])
    by = dict(by_query=terms in ("both", "by_query"), by_key=terms in ("both", "by_key"))
    masks = {key: value for key, value in settings.items() if isinstance(value, np.ndarray)}
    numbers = {key: value for key, value in settings.items() if key not in masks}

    def call(q, k, v, *tables, b=buckets, by=by, m=masks, s=numbers, host=number % 2, block=None):
        rows = list(tables)
        rk, rq = (rows.pop(0) if by[name] else None for name in ("by_query", "by_key"))
        return ops.disentangled_attention(q, k, v, rk, rq, b, **s, **placed(q, m, host))

    case(f"disentangled_attention {name}", ops.DisentangledAttention, call,
         lambda *x, f=disentangled(buckets, **settings), by=by: f(*x, **by), q, q, q,
         *[(*lead, q[-3], n, q[-1]) for lead in leads[:sum(by.values())]], kept=disentangled_kept, products=True)

# In blocks of 4 queries, with a shorter one at the end.
for name, T, masks in (("plain", 6, {}), ("padded", 4, dict(key_padding=PADDING)), ("five", 5, {})):
    buckets = [0] * (T - 2) + [1, 1, 2, 3] + [4] * (T - 3)
    case(f"disentangled_attention in blocks {name}", ops.DisentangledAttention,
         lambda q, k, v, rk, rq, b=np.array(buckets), m=masks: engine.apply(
             ops.DisentangledAttention, q, k, v, rk, rq, scale=(3 * q.shape[-1]) ** -0.5, buckets=b, block=1,
             masks=prepare_masks(q, q.shape, k.shape[-2], placed(q, m, False).get("key_padding"), None)),
         disentangled(buckets, **masks), *[(2, 2, T, 3)] * 3, *[(2, 5, 3)] * 2, kept=disentangled_kept, products=True)

ROTARY = {
    "one head": ((3, 4), 10000.0, 0), "heads": ((2, 2, 5, 6), 10000.0, 0), "offset": ((2, 3, 4), 10000.0, 5),
    "theta": ((2, 3, 8), 50.0, 2), "one position": ((2, 1, 2), 10000.0, 7), "one at the start": ((1, 2), 10000.0, 0),
    "empty batch": ((0, 3, 4), 10000.0, 0), "no position": ((2, 0, 4), 10000.0, 3),
}


def turned(theta, offset):
    def call(x):
        real = "float64" if x.dtype.kind == "c" else x.dtype
        tables = ops.rotary_tables(ops.rotary_frequencies(x.shape[-1], theta), offset + x.shape[-2] + 2, real, x.device)
        return ops.rotary(x, *tables, offset)
    return call


for name, (x, theta, offset) in ROTARY.items():
    case(f"rotary {name}", ops.Rotary, turned(theta, offset), rotary(theta, offset), x,
         drawn=PLACES if name == "offset" else None)
