"""Scaled dot-product attention as one operation, with its gradient derived by hand.

Shapes: q (..., H, T, hd), k and v (..., KV, S, hd), y like q. H query heads, T queries, S keys, hd numbers a head. With KV < H,
groups of g = H / KV query heads share the keys and values of one head.

Forward in one head (t a query, s a key, j a coordinate, c = 1 / sqrt(hd), M the masks: 0, -inf, or any number):

    Z_ts = c sum_j q_tj k_sj + M_ts
    P_ts = e^(Z_ts - m_t) / n_t                m_t = max_s Z_ts,  n_t = sum_s e^(Z_ts - m_t)
    y_tj = sum_s P_ts v_sj

Backward, with dy = dL/dy: every path from a letter to L goes through y, so sum over what the letter meets.

    v_sj meets y_tj in every query t:          dv_sj = sum_t P_ts dy_tj
    P_ts meets y_tj in every coordinate j:     dP_ts = sum_j dy_tj v_sj
    Z_ts moves the whole row P_t (softmax):    dZ_ts = P_ts (dP_ts - D_t)          D_t = sum_s dP_ts P_ts
    q_tj meets Z_ts in every key s:            dq_tj = c sum_s dZ_ts k_sj
    k_sj meets Z_ts in every query t:          dk_sj = c sum_t dZ_ts q_tj

D_t needs no pass over T S numbers: with dP written out, D_t = sum_s sum_j dy_tj v_sj P_ts = sum_j dy_tj y_tj. As matrices:

    Z = c q k^T + M         P = softmax of Z's rows        y = P v
    dv = P^T dy             dP = dy v^T                    dZ = P * (dP - rowsum(dy * y))
    dq = c dZ k             dk = c dZ^T q

Grouped heads: in the sums over t above, t runs over the queries of all g heads that share k and v. So the g matrices of T rows
are read as one of g T rows; k and v are never repeated.

A window of w keys is a mask too: query t, at the place p = S - T + t, sees the keys s with p - w < s <= p. Masked keys before
the window of a block's first query are not met at all, so that a long text costs T (w + 64) scores a head and not T S.

Masked places have M = -inf and P = 0. A query that may attend to nothing has m = -inf and n = 0; it gets the lowest finite
number and 1 in their place, whence P = 0: zeros out, zero gradients, and no NaN.

Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1. Grouped heads: Ainslie et al. 2023, arXiv 2305.13245. P computed
again in backward, and D as rowsum(dy * y): Dao et al. 2022, arXiv 2205.14135, appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..engine import Op, apply, floating, shape_of
from ..errors import ConfigError, ShapeError
from ..settings import number, whole
from .masks import combine_masks, prepare_masks

if TYPE_CHECKING:
    from ..tensor import Tensor
    from ..typing import Integers, TensorLike

Array = Any
Shape = tuple[int, ...]


def grouped(x: Array, kv: int) -> Array:
    """x (..., H, n, i) as (..., KV, g, n, i): a view, whatever the strides. Goes with keys and values (..., KV, 1, S, hd)."""
    return x.reshape(x.shape[:-3] + (kv, x.shape[-3] // kv) + x.shape[-2:])


def stacked(x: Array, kv: int) -> Array:
    """x (..., H, n, i) as (..., KV, g n, i): the heads of a group under each other, so that a product sums over them."""
    *lead, heads, n, i = x.shape
    return x if heads == kv else x.reshape(*lead, kv, heads // kv * n, i)  # a view costs CuPy 2 us, hundreds of times a step


class ScaledDotProduct(Op):
    """The mathematics at the top of this file, for operations that find q, k, v and y in their own ways.

    Everything is done on views of one layout, q and y (..., H, T, hd), k and v (..., KV, S, hd), with any strides, and for one
    block of queries after the other: that bounds the memory of P and dP, and causal queries skip the keys after their block.
    """

    rounds = True
    scale: float
    causal: bool
    masks: tuple[Array, ...]
    window: int | None = None  # if causal: the keys that a query sees at most
    block = 64  # queries, if causal: with more, more masked keys are met in vain; with fewer, the products get too small

    def attend(self, q: Array, k: Array, v: Array, y: Array) -> tuple[Array, Array]:
        """Write the output into y. Returns m and n, (..., H, T, 1)."""
        xp, kv = self.xp, k.shape[-3]
        m = xp.empty(q.shape[:-1] + (1,), dtype=q.dtype)
        n = xp.empty_like(m)
        for rows, keys in self.blocks(q.shape[-2], k.shape[-2]):
            P = self.scores(q, k, rows, keys)
            high = xp.maximum(P.real.max(axis=-1, keepdims=True), float(xp.finfo(P.dtype).min))  # .real: for complex steps
            P -= high
            xp.exp(P, out=P)
            total = P.sum(axis=-1, keepdims=True)
            total += total == 0.0  # only where nothing may be attended: elsewhere the largest score adds 1
            P /= total
            xp.matmul(grouped(P, kv), v[..., None, keys, :], out=grouped(y[..., rows, :], kv))
            m[..., rows, :], n[..., rows, :] = high, total
        return m, n

    def differentiate(self, dy: Array, q: Array, k: Array, v: Array, y: Array, m: Array, n: Array,
                      dq: Array | None, dk: Array | None, dv: Array | None) -> None:
        """Write the gradients into those of dq, dk and dv that are not None. With a window, dk and dv must hold zeros."""
        xp, kv = self.xp, k.shape[-3]
        for i, (rows, keys) in enumerate(self.blocks(q.shape[-2], k.shape[-2])):
            first = i == 0 and self.window is None  # it writes what the others add to
            dy_rows = dy[..., rows, :]
            P = self.scores(q, k, rows, keys)
            P -= m[..., rows, :]
            xp.exp(P, out=P)
            P /= n[..., rows, :]
            if dv is not None:
                self.sum_over_queries(P, dy_rows, dv[..., keys, :], first=first)
            if dq is None and dk is None:
                continue
            dZ = xp.matmul(grouped(dy_rows, kv), v[..., None, keys, :].swapaxes(-1, -2)).reshape(P.shape)  # dP so far
            dZ -= (dy_rows * y[..., rows, :]).sum(axis=-1, keepdims=True)
            dZ *= P
            if dq is not None:
                xp.matmul(grouped(dZ, kv), k[..., None, keys, :], out=grouped(dq[..., rows, :], kv))
            if dk is not None:
                self.sum_over_queries(dZ, q[..., rows, :] * self.scale, dk[..., keys, :], first=first)
        if dq is not None:
            dq *= self.scale

    def blocks(self, T: int, S: int) -> Iterator[tuple[slice, slice]]:
        """The queries that are done together, and the keys they may see. The last come first, as they see every key."""
        size = self.block if self.causal else 4 * self.block  # where all see all keys, blocks only bound the memory
        for start in reversed(range(0, max(T, 1), size)):
            stop = min(start + size, T)
            least = 0 if self.window is None else S - T + start + 1 - self.window
            yield slice(start, stop), slice(max(0, min(least, S - 1)), max(1, S - T + stop) if self.causal else S)

    def scores(self, q: Array, k: Array, rows: slice, keys: slice) -> Array:
        """Z of some queries and keys. The scaling is done on q, which is smaller."""
        T, S = q.shape[-2], k.shape[-2]
        q, k = q[..., rows, :] * self.scale, k[..., None, keys, :]
        Z = self.xp.matmul(grouped(q, k.shape[-4]), k.swapaxes(-1, -2)).reshape(q.shape[:-1] + k.shape[-2:-1])
        M = combine_masks(self.xp, self.masks, rows, keys, S - T if self.causal else None, Z.real.dtype, self.window)
        if M is not None:
            Z += M
        return Z

    def sum_over_queries(self, P: Array, x: Array, out: Array, first: bool) -> None:
        """Write P^T x into out, or add it, summed over the queries of a group's heads.

        Done as (x^T P)^T: CuPy copies a matrix to transpose it, and x is smaller than P.
        """
        kv = out.shape[-3]
        product = out if first else self.xp.empty(out.shape, dtype=out.dtype)
        self.xp.matmul(stacked(x, kv).swapaxes(-1, -2), stacked(P, kv), out=product.swapaxes(-1, -2))
        if not first:
            out += product


class Attention(ScaledDotProduct):
    """y = softmax(c q k^T + M) v, derived at the top of this file.

    Keeps q, k, v, y and two numbers a query and head, m and n; v and y only for a gradient of q or k. P, which would be T S
    numbers a head, is computed again from them, with the same bits.
    """

    def forward(self, q: Array, k: Array, v: Array) -> Array:
        y = self.xp.empty_like(q)  # in the order of q's memory: heads split from (..., T, d) are joined again without a copy
        m, n = self.attend(q, k, v, y)
        qk = self.needs[0] or self.needs[1]
        self.save(q, k, v if qk else None, y if qk else None, m, n)
        return y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        q, k, v, y, m, n = self.saved
        new = self.xp.empty_like if self.window is None else self.xp.zeros_like
        gradients = tuple(new(x) if need else None for x, need in zip((q, k, k if v is None else v), self.needs))
        self.differentiate(dy, q, k, v, y, m, n, *gradients)
        return gradients


def attention(q: TensorLike, k: TensorLike, v: TensorLike, causal: bool = False, key_padding: Integers | None = None,
              mask: TensorLike | None = None, scale: float | None = None, window: int | None = None) -> Tensor:
    """softmax(scale q k^T + mask) v in every head; see `Attention`.

    Parameters
    ----------
    q : Tensor, shape (..., H, T, hd)
    k, v : Tensor, shape (..., KV, S, hd)
        H must be a multiple of KV; query head h uses head h // (H / KV) of k and v.
    causal : bool
        Let no query see a later key. The last query and the last key stand at the same place: query t sees keys 0 to S - T + t.
    key_padding : bool array, shape (..., S), optional
        True where a key may be attended; its leading axes are those of k in front of the heads. (PyTorch's key_padding_mask
        says the opposite.)
    mask : array, optional
        Broadcasts to (..., H, T, S): booleans (True: may be attended), or numbers of the dtype of q that are added to the
        scores. A constant: it gets no gradient.
    scale : float, optional
        1 / sqrt(hd) by default.
    window : int, optional
        How many keys a causal query sees at most, the one at its own place among them: the sliding window of Mistral.

    Returns
    -------
    Tensor, shape (..., H, T, hd)
        Zeros for a query that may attend to nothing.

    Raises
    ------
    ShapeError
        If the shapes do not fit together.
    DTypeError
        If a mask has another dtype, or is no array.
    ConfigError
        If `scale` is not a finite number, or `window` is not an int >= 1, or is given without `causal`.

    Notes
    -----
    Masks on the host are copied to the device of q at every call: move them once with `minilora.to_device`. Dropout of the
    probabilities P, which some models use in training, is not offered.

    Examples
    --------
    >>> import numpy, minilora
    >>> q = minilora.tensor(numpy.zeros((1, 2, 3, 4)))
    >>> v = minilora.tensor(numpy.arange(12.0).reshape(1, 1, 3, 4))
    >>> minilora.ops.attention(q, v, v, causal=True).data[0, 1]
    array([[0., 1., 2., 3.],
           [2., 3., 4., 5.],
           [4., 5., 6., 7.]])
    """
    check_attention(shape_of(floating(q)), shape_of(floating(k)), shape_of(floating(v)))
    masks = prepare_masks(q, q.shape, k.shape[-2], key_padding, mask)
    return apply(Attention, q, k, v, scale=check_scale(scale, q.shape[-1]), causal=bool(causal), masks=masks,
                 window=check_window(window, causal, k.shape[-2]))


def check_scale(scale: Any, hd: int) -> float:
    """`scale`, or 1 / sqrt(hd), as a Python float; `ConfigError` if it is not a finite number."""
    if scale is None:
        return 1.0 / math.sqrt(hd)
    return number("attention: scale", scale, -math.inf, ends="()")


def check_window(window: Any, causal: Any, S: int) -> int | None:
    """`window`, or None where it hides none of S keys; `ConfigError` if it is no int >= 1, or there is no `causal`."""
    if window is None:
        return None
    if not causal:
        raise ConfigError(f"attention: a window of {window!r} keys ends at the place of its query: give causal=True with it")
    window = whole("attention: window", window)
    return window if window < S else None


def check_attention(q: Shape, k: Shape, v: Shape) -> None:
    """Raise `ShapeError` unless q (..., H, T, hd) and k and v (..., KV, S, hd) fit together."""
    expected = f"attention: expected q (..., H, T, hd) and k, v (..., KV, S, hd), got q {q}, k {k}, v {v}"
    if len(q) < 3 or len(k) != len(q) or k != v:
        raise ShapeError(f"{expected}: three axes or more, k and v alike. A single head needs its axis too: (batch, 1, T, hd)")
    if q[:-3] != k[:-3]:
        raise ShapeError(f"{expected}: the leading axes {q[:-3]} and {k[:-3]} differ")
    if q[-1] != k[-1] or q[-1] < 1 or k[-2] < 1:
        raise ShapeError(f"{expected}: heads of {q[-1]} and {k[-1]} numbers, {k[-2]} keys; the first two must be equal, none 0")
    if k[-3] < 1 or q[-3] % k[-3]:
        raise ShapeError(f"{expected}: {q[-3]} query heads are not a multiple of {k[-3]} key and value heads")
