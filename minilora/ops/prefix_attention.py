"""Attention to two sets of keys: a text's own, and those of a prefix that all texts of a batch share. Derived by hand.

Shapes: q (..., H, T, hd), k and v (..., KV, S, hd) as in `ops.attention`; K and V (KV, N, hd), N keys and values of the prefix,
the same for every text b. Letters as there: c = 1 / sqrt(hd), M the masks of the text's own keys.

Forward. The softmax runs over both sets; a row of scores is [Z^p, Z^x]:

    Z^p = c q K^T        Z^x = c q k^T + M        m = max of both rows        n = sum e^(Z^p - m) + sum e^(Z^x - m)
    y = P^p V + P^x v    with P^p = e^(Z^p - m) / n and P^x = e^(Z^x - m) / n

Each set is attended to by itself first, which gives y^p, m^p, n^p and y^x, m^x, n^x; with w^p = n^p e^(m^p - m), w^x likewise,

    n = w^p + w^x        y = (w^p y^p + w^x y^x) / n

that is, with lambda = w^p / n for each query: y = (1 - lambda) Attn(x) + lambda Attn(prefix).

Backward. Of the other keys of a row the gradient of softmax needs nothing but D_t = sum_s dP_ts P_ts = sum_j dy_tj y_tj, where
y is the output for both sets. So the formulas of `ops.attention` hold for each set of keys as they are, with m, n, y of both:

    dv = P^x^T dy         dZ^x = P^x * (dy v^T - D)         dk = c dZ^x^T q
    dV = sum_b P^p^T dy   dZ^p = P^p * (dy V^T - D)         dK = c sum_b dZ^p^T q        dq = c (dZ^x k + dZ^p K)

K and V meet the queries of every text, hence the sums over b. No sum is written for them: the queries of all texts are read as
one text of B T queries (H, B T, hd), whose products with K and V sum over all of them, as grouped heads are read. K, V, dK and
dV exist once, whatever the batch.

The prefix stands before all tokens, so causality hides none of it; padding is a matter of the text's own keys. A window of w
keys is the one mask that reaches into it: key j of the prefix stands at the place j, query t at p = N + S - T + t, and it sees
j > p - w.

Of a batch with several prefixes each run of texts has its own; texts in no run have none. Where a query sees nothing, the
output is zero, as in `ops.attention`.

Source: Li and Liang 2021, "Prefix-Tuning", arXiv 2101.00190. The sum with lambda: He et al. 2022, arXiv 2110.04366, equation 7.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..engine import apply, floating, shape_of
from ..errors import ShapeError
from .attention import ScaledDotProduct, attention, check_attention, check_scale, check_window
from .masks import prepare_masks
from .packed_attention import PackedAttention, check_heads, check_packed, packed_attention

if TYPE_CHECKING:
    from ..tensor import Tensor
    from ..typing import Integers, TensorLike

Array = Any
Run = tuple[slice, int]  # texts, and which of the prefixes they have

EVERY: tuple[Run, ...] = ((slice(None), 0),)


class _WithPrefixes(ScaledDotProduct):
    """Attention to both sets of keys. `runs` tells which texts have which of the prefixes (2, KV, N, hd), keys and values."""

    runs: tuple[Run, ...]
    reach: int | None = None  # with a window w: S - T - w, less the gap

    def attend_both(self, q: Array, k: Array, v: Array, y: Array, prefixes: Sequence[Array]) -> tuple[Array, Array]:
        """Write the output into y. Returns m and n, (..., H, T, 1)."""
        m, n = self.attend(q, k, v, y)
        for texts, which in self.runs:
            K, V = prefixes[which]
            q_all = folded(q[texts])
            heads, rows, hd = q_all.shape
            y_all = self.xp.empty((rows, heads, hd), dtype=y.dtype).swapaxes(0, 1)  # heads inside, as y has them in memory
            found = y_all, *self.to_prefix(q.shape[-2], rows, K.shape[-2]).attend(q_all, K, V, y_all)
            own = y[texts], m[texts], n[texts]
            self.join(*own, *(unfolded(x, part.shape) for x, part in zip(found, own)))
        return m, n

    def join(self, y: Array, m: Array, n: Array, y_p: Array, m_p: Array, n_p: Array) -> None:
        """Make y, m and n those of both sets, in place; y_p is spent."""
        xp = self.xp
        top = xp.maximum(m.real, m_p.real)
        # In halves: where a query sees nothing m is the lowest number there is, from which nothing can be subtracted.
        w, w_p = (total * xp.exp(high.real * 0.5 - top * 0.5) ** 2 for high, total in ((m, n), (m_p, n_p)))
        total = w + w_p
        y *= w / total
        y_p *= w_p / total
        y += y_p
        m[...], n[...] = top, total

    def differentiate_both(self, dy: Array, q: Array, k: Array, v: Array, y: Array, m: Array, n: Array,
                           prefixes: Sequence[Array], dqkv: tuple[Array | None, ...]) -> list[Array | None]:
        """Write the gradients into those of dq, dk and dv that are not None. Returns those of the prefixes."""
        if any(x is not None for x in dqkv):
            self.differentiate(dy, q, k, v, y, m, n, *dqkv)
        dq, count = dqkv[0], len(prefixes)
        found = [self.xp.zeros_like(prefix) if need else None for prefix, need in zip(prefixes, self.needs[-count:])]
        for texts, which in self.runs:
            into = found[which]
            if dq is None and into is None:
                continue
            K, V = prefixes[which]
            dy_all, q_all, y_all, m_all, n_all = (folded(x[texts]) for x in (dy, q, y, m, n))
            dq_all = None if dq is None else self.xp.empty_like(q_all)
            dK, dV = (None, None) if into is None else (self.xp.empty_like(K), self.xp.empty_like(V))
            part = self.to_prefix(q.shape[-2], q_all.shape[-2], K.shape[-2])
            part.differentiate(dy_all, q_all, K, V, y_all, m_all, n_all, dq_all, dK, dV)
            if dq is not None:
                own = dq[texts]
                own += unfolded(dq_all, own.shape)
            if into is not None:
                into[0] += dK
                into[1] += dV
        return found

    def to_prefix(self, T: int, rows: int, N: int) -> _WithPrefixes:
        """This operation for N keys of a prefix and so many rows of texts: without masks, unless a window reaches into it."""
        part = copy.copy(self)
        part.causal, part.masks, part.window = False, (), None
        if self.reach is not None and N + self.reach + T > 0:  # else even the last query sees the first key
            xp = self.xp
            seen = xp.arange(N)[None] > xp.arange(T)[:, None] + (N + self.reach)
            part.masks = (xp.broadcast_to(seen, (rows // max(T, 1), T, N)).reshape(1, rows, N),)
        return part


class PrefixAttention(_WithPrefixes):
    """Attention to a text's own keys and to those of a prefix, derived at the top of this file.

    Inputs q, k, v and the prefixes, (2, KV, N, hd) each. Keeps what `Attention` keeps and the prefixes; k only for a gradient
    of q, k or v.
    """

    def forward(self, q: Array, k: Array, v: Array, *prefixes: Array) -> Array:
        y = self.xp.empty_like(q)
        m, n = self.attend_both(q, k, v, y, prefixes)
        qk = self.needs[0] or self.needs[1]
        self.save(q, k if qk or self.needs[2] else None, v if qk else None, y if qk or True in self.needs[3:] else None, m, n,
                  *prefixes)
        return y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        q, k, v, y, m, n, *prefixes = self.saved
        new = self.xp.empty_like if self.window is None else self.xp.zeros_like
        dqkv = tuple(new(x) if need else None for x, need in zip((q, k, k if v is None else v), self.needs))
        return (*dqkv, *self.differentiate_both(dy, q, k, v, y, m, n, prefixes, dqkv))


class PackedPrefixAttention(_WithPrefixes, PackedAttention):
    """`PrefixAttention` of q, k and v that lie side by side in one array, as in `PackedAttention`.

    Inputs qkv and the prefixes. Keeps them, y, m and n.
    """

    def forward(self, qkv: Array, *prefixes: Array) -> Array:
        q, k, v = self.split(qkv)
        y = self.xp.empty(qkv.shape[:-1] + (q.shape[-3], q.shape[-1]), dtype=qkv.dtype)
        m, n = self.attend_both(q, k, v, y.swapaxes(-3, -2), prefixes)
        self.save(qkv, y, m, n, *prefixes)
        return y.reshape(qkv.shape[:-1] + (q.shape[-3] * q.shape[-1],))

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        qkv, y, m, n, *prefixes = self.saved
        dqkv = self.xp.empty(qkv.shape, dtype=qkv.dtype) if self.needs[0] else None
        parts = (None, None, None) if dqkv is None else self.split(dqkv)
        by_heads = dy.reshape(y.shape).swapaxes(-3, -2), *self.split(qkv), y.swapaxes(-3, -2)
        return (dqkv, *self.differentiate_both(*by_heads, m, n, prefixes, parts))


def folded(x: Array) -> Array:
    """x (..., H, T, i) as (H, ... T, i): the rows of all texts below each other, a view if memory has them so."""
    heads, T, i = x.shape[-3:]
    order = (x.ndim - 3, *range(x.ndim - 3), x.ndim - 2, x.ndim - 1)
    return x.transpose(order).reshape(heads, math.prod(x.shape[:-3]) * T, i)


def unfolded(x: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `folded`; a view of what was made in one piece."""
    *lead, heads, T, i = shape
    n = len(lead)
    return x.reshape(heads, *lead, T, i).transpose(*range(1, n + 1), 0, n + 1, n + 2)


def prefix_attention(q: TensorLike, k: TensorLike, v: TensorLike, prefixes: Sequence[TensorLike] = (),
                     runs: Sequence[Run] | None = None, gap: int = 0, causal: bool = False,
                     key_padding: Integers | None = None, mask: TensorLike | None = None, scale: float | None = None,
                     window: int | None = None) -> Tensor:
    """`attention` to k and v and to the keys and values of prefixes, which stand in front; see `PrefixAttention`.

    Parameters
    ----------
    q, k, v
        As in `attention`.
    prefixes : sequence of Tensor, shape (2, KV, N, hd) each
        Keys, then values; N may differ. None of them: `attention` itself.
    runs : sequence of (slice, int), optional
        Texts on the first axis of q that have the prefix of this number; no text in two runs. By default all have the only one.
    gap : int
        How many of the first keys of k, for texts with a prefix, are padding, and count as no places for the window.
    causal, key_padding, mask, scale
        As in `attention`, about k and v alone: nothing hides a prefix.
    window : int, optional
        As in `attention`; the N keys of the prefix count as the N places before the first key of k.

    Returns
    -------
    Tensor, shape (..., H, T, hd)

    Raises
    ------
    ShapeError
        If the shapes do not fit together, or runs overlap or name a prefix that is not there.
    DTypeError, ConfigError
        As `attention`.

    Examples
    --------
    >>> import numpy, minilora
    >>> q = minilora.tensor(numpy.zeros((1, 2, 3, 4)))
    >>> kv = minilora.tensor(numpy.zeros((1, 1, 3, 4)))
    >>> prefix = minilora.tensor(numpy.ones((2, 1, 1, 4)))
    >>> minilora.ops.prefix_attention(q, kv, kv, [prefix], causal=True).data[0, 0, :, 0]
    array([0.5       , 0.33333333, 0.25      ])
    """
    if not prefixes:
        return attention(q, k, v, causal, key_padding, mask, scale, window)
    check_attention(shape_of(floating(q)), shape_of(floating(k)), shape_of(floating(v)))
    runs = _checked(q.shape[:-3], k.shape[-3], q.shape[-1], prefixes, runs)
    masks, T, S = prepare_masks(q, q.shape, k.shape[-2], key_padding, mask), q.shape[-2], k.shape[-2]
    own = check_window(window, causal, S)
    return apply(PrefixAttention, q, k, v, *prefixes, scale=check_scale(scale, q.shape[-1]), causal=bool(causal), masks=masks,
                 window=own, runs=runs, reach=None if window is None else S - T - int(window) - gap)


def packed_prefix_attention(qkv: TensorLike, num_heads: int, prefixes: Sequence[TensorLike] = (),
                            runs: Sequence[Run] | None = None, num_kv_heads: int | None = None, causal: bool = False,
                            key_padding: Integers | None = None, scale: float | None = None) -> Tensor:
    """`packed_attention` with prefixes in front, as in `prefix_attention`; see `PackedPrefixAttention`.

    Examples
    --------
    >>> import numpy, minilora
    >>> qkv, prefix = minilora.tensor(numpy.ones((2, 5, 3 * 8))), minilora.tensor(numpy.zeros((2, 4, 3, 2)))
    >>> minilora.ops.packed_prefix_attention(qkv, 4, [prefix], causal=True).shape
    (2, 5, 8)
    """
    if not prefixes:
        return packed_attention(qkv, num_heads, num_kv_heads, causal, key_padding, scale=scale)
    H, KV = check_heads(num_heads, num_kv_heads)
    hd, T = check_packed(shape_of(floating(qkv)), H, KV), qkv.shape[-2]
    runs = _checked(qkv.shape[:-2], KV, hd, prefixes, runs)
    masks = prepare_masks(qkv, (*qkv.shape[:-2], H, T, hd), T, key_padding, None)
    return apply(PackedPrefixAttention, qkv, *prefixes, heads=(H, KV), scale=check_scale(scale, hd), causal=bool(causal),
                 masks=masks, runs=runs)


def _checked(lead: tuple[int, ...], KV: int, hd: int, prefixes: Sequence[TensorLike],
             runs: Sequence[Run] | None) -> tuple[Run, ...]:
    """The runs, with numbers of texts in them; `ShapeError` if prefixes or runs do not fit."""
    shapes = [shape_of(floating(prefix)) for prefix in prefixes]
    if any(len(p) != 4 or p[:2] != (2, KV) or p[2] < 1 or p[3] != hd for p in shapes):
        raise ShapeError(f"prefix_attention: expected prefixes (2, {KV}, N, {hd}) = (2, KV, N, hd), keys and values, with N >= "
                         f"1, got {', '.join(map(str, shapes))}")
    if runs is None and len(shapes) == 1:
        return EVERY
    texts = lead[0] if lead else 0
    if runs is None:
        raise ShapeError(f"prefix_attention: {len(shapes)} prefixes: runs must say which texts have which")
    covered = sorted((rows.start, rows.stop, which) for rows, which in runs)
    ends = [0, *(stop for _, stop, _ in covered)]
    if any(not end <= start < stop <= texts or not 0 <= which < len(shapes)
           for end, (start, stop, which) in zip(ends, covered)):
        raise ShapeError(f"prefix_attention: expected runs of the {texts} texts, (slice(start, stop), number of a prefix below "
                         f"{len(shapes)}), none of which meet, got {list(runs)}")
    return tuple((slice(start, stop), which) for start, stop, which in covered)
