"""Attention whose scores also count how far apart two tokens stand: the disentangled attention of DeBERTa, derived by hand.

Shapes: q, k, v and y (..., H, T, hd). A token t is compared with a token s by content, and with the distance t - s, of
which there are n kinds, the buckets: b(t - s) is one of 0 to n - 1. rk (H, n, hd) holds a key for every bucket, rq (H, n, hd)
a query.

Forward in one head (c = 1 / sqrt(terms hd), M the mask of padding):

    Z_ts = c (sum_j q_tj k_sj + sum_j q_tj rk_b(t-s),j + sum_j k_sj rq_b(t-s),j) + M_ts
              content - content    content - position         position - content

and y = softmax(Z) v, as in `ops.attention`. Without rk or rq their term is not there.

Backward: dv, dP and dZ are those of `ops.attention`, as they do not ask how Z was made. Every letter then sums over what it
meets:

    q_tj meets Z_ts in every s, by k_sj and by rk:           dq_tj = c sum_s dZ_ts (k_sj + rk_b(t-s),j)
    k_sj meets Z_ts in every t, by q_tj and by rq:           dk_sj = c sum_t dZ_ts (q_tj + rq_b(t-s),j)
    rk_bj meets Z_ts where b(t - s) = b, in all its texts:   drk_bj = c sum over such t, s of dZ_ts q_tj
    rq_bj likewise:                                          drq_bj = c sum over such t, s of dZ_ts k_sj

Written so, the sums with rk and rq would be over arrays of T T hd numbers. But b depends on t - s alone. Let E be rk with a
row for every difference instead of every bucket, E_e = rk_b(T-1-e), whose row e = s - t + T - 1 belongs to the pair (t, s).
Then

    C = q E^T  (T, 2 T)         sum_j q_tj rk_b(t-s),j = C_t,s-t+T-1:  row t of C, from column T - 1 - t on

and those rows, each shifted by one against the row above, are a view of C's memory: nothing is gathered. The adjoint of a
view is to write through it: dC is zeros with dZ in those places, and

    dq += c dC E                dE = c dC^T q                drk_b = sum of the rows e of dE whose bucket is b

The term of rq is the same with queries and keys exchanged: F_f = rq_b(f-T+1), G = k F^T, and its term of (t, s) is G_s,t-s+T-1.
So the products with positions cost 4 T T hd multiplications a head, and not n T hd for each of rk and rq (n is 512 in the
published models, however short the text), and no array has more than 2 T T numbers a head; queries are done in blocks, as in
`attention`.

Source: He et al. 2021, arXiv 2006.03654, section 3.1, equation 4 (its relative distance for the third term is that of the pair
(s, t); the published models, as here, take that of (t, s)). Logarithmic buckets: as arXiv 2111.09543 says of its models.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy

from .. import backend
from ..engine import apply, floating, shape_of
from ..errors import ConfigError, ShapeError
from ..settings import whole
from .attention import ScaledDotProduct, check_scale
from .elementwise import unbroadcast
from .embedding import add_up, moved, plan_sums
from .indices import integers
from .masks import prepare_masks

if TYPE_CHECKING:
    from ..tensor import Tensor
    from ..typing import Integers, TensorLike

__all__ = ["DisentangledAttention", "disentangled_attention", "distance_buckets"]

Array = Any


def shifted(C: Array, n: int) -> Array:
    """C (..., n, n + S) as (..., n, S): row i from column n - 1 - i on. A view, if C is without gaps."""
    lead, width = C.shape[:-2], C.shape[-1]
    flat = C.reshape(lead + (n * width,))[..., n - 1:n - 1 + n * (width - 1)]
    return flat.reshape(lead + (n, width - 1))[..., :width - n]


class DisentangledAttention(ScaledDotProduct):
    """y = softmax(c (q k^T + positions) + M) v, derived at the top of this file.

    Keeps q, k, rk, rq, and two numbers a query and head, m and n; v and y only for a gradient of something else than v.
    """

    causal = False
    buckets: Array  # (2 T - 1,): the row of rk and rq for the distances t - s = -(T - 1) to T - 1; on the host
    E: Array | None
    F: Array | None

    def forward(self, q: Array, k: Array, v: Array, rk: Array | None, rq: Array | None) -> Array:
        y = self.xp.empty_like(q)  # in the order of q's memory, as in `Attention`
        self.spread(rk, rq)
        m, n = self.attend(q, k, v, y)
        del self.E, self.F
        others = self.needs[0] or self.needs[1] or True in self.needs[3:]
        self.save(q, k, v if others else None, y if others else None, m, n, rk, rq)
        return y

    def spread(self, rk: Array | None, rq: Array | None) -> None:
        """Set E and F: rows for differences, and one more at the end that no pair meets, so that `shifted` has room."""
        ascending = backend.cpu.xp.append(self.buckets, self.buckets[-1:])
        descending = backend.cpu.xp.append(self.buckets[::-1], self.buckets[:1])
        self.E, self.F = (
            None if table is None else self.xp.take(table, backend.constant(rows, backend.device_of(table)), axis=-2)
            for table, rows in ((rk, descending), (rq, ascending)))

    def rows_of(self, rows: slice, T: int) -> tuple[slice, slice]:
        """Which rows of E and of F the pairs of some queries meet."""
        return slice(T - rows.stop, 2 * T - rows.start), slice(rows.start, rows.stop + T)

    def scores(self, q: Array, k: Array, rows: slice, keys: slice) -> Array:
        Z = super().scores(q, k, rows, keys)
        by_query, by_key = self.rows_of(rows, k.shape[-2])
        if self.E is not None:
            C = self.xp.matmul(q[..., rows, :] * self.scale, self.E[..., by_query, :].swapaxes(-1, -2))
            Z += shifted(C, Z.shape[-2])
        if self.F is not None:
            G = self.xp.matmul(k * self.scale, self.F[..., by_key, :].swapaxes(-1, -2))
            Z += shifted(G, Z.shape[-1]).swapaxes(-1, -2)
        return Z

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        q, k, v, y, m, n, rk, rq = self.saved
        self.spread(rk, rq)
        dq, dk, dv, dE, dF = (self.xp.zeros_like(x) if need and x is not None else None  # in the order of their memory
                              for x, need in zip((q, k, k if v is None else v, self.E, self.F), self.needs))
        self.differentiate_positions(dy, (q, k, v, y, m, n), (dq, dk, dv, dE, dF))
        del self.E, self.F
        return dq, dk, dv, self.by_bucket(dE, rk, -1), self.by_bucket(dF, rq, 1)

    def differentiate_positions(self, dy: Array, saved: tuple[Array, ...], gradients: tuple[Array | None, ...]) -> None:
        """Add to the gradients that are wanted, block by block."""
        xp, (q, k, v, y, m, n), (dq, dk, dv, dE, dF) = self.xp, saved, gradients
        for rows, keys in self.blocks(q.shape[-2], k.shape[-2]):
            dy_rows, q_rows = dy[..., rows, :], q[..., rows, :]
            P = self.scores(q, k, rows, keys)
            P -= m[..., rows, :]
            xp.exp(P, out=P)
            P /= n[..., rows, :]
            if dv is not None:
                dv += xp.matmul(P.swapaxes(-1, -2), dy_rows)
            if v is None:
                continue
            dZ = xp.matmul(dy_rows, v.swapaxes(-1, -2))
            dZ -= (dy_rows * y[..., rows, :]).sum(axis=-1, keepdims=True)
            dZ *= P
            dZ *= self.scale
            if dq is not None:
                dq[..., rows, :] += xp.matmul(dZ, k)
            if dk is not None:
                dk += xp.matmul(dZ.swapaxes(-1, -2), q_rows)
            by_query, by_key = self.rows_of(rows, k.shape[-2])
            self.through(dZ, q_rows, self.E, by_query, None if dq is None else dq[..., rows, :], dE)
            self.through(dZ.swapaxes(-1, -2), k, self.F, by_key, dk, dF)

    def through(self, dZ: Array, x: Array, table: Array | None, part: slice, dx: Array | None, dtable: Array | None) -> None:
        """Add what one term with positions, shifted(x table^T), gives to the gradients of x and of the table."""
        if table is None or dx is None and dtable is None:
            return
        xp, n = self.xp, dZ.shape[-2]
        dC = xp.zeros(dZ.shape[:-1] + (n + dZ.shape[-1],), dtype=dZ.dtype)
        shifted(dC, n)[...] = dZ
        if dx is not None:
            dx += xp.matmul(dC, table[..., part, :])
        if dtable is not None:
            own = dtable[..., part, :]
            own += unbroadcast(xp.matmul(dC.swapaxes(-1, -2), x), own.shape)

    def by_bucket(self, dE: Array | None, table: Array | None, step: int) -> Array | None:
        """The gradient of rk or rq: the rows of dE (..., H, 2 T, hd) summed by bucket, in a fixed order."""
        if dE is None or table is None:
            return None
        xp, n = self.xp, table.shape[-2]
        rows = xp.moveaxis(dE[..., :-1, :], -2, 0)
        out = xp.zeros((n, *rows.shape[1:]), dtype=dE.dtype)
        plan = moved(plan_sums(self.buckets[::step]), backend.device_of(dE), constant=True)
        add_up(out.reshape(n, -1), rows.reshape(len(rows), -1), plan)
        return xp.moveaxis(out, 0, -2)


def disentangled_attention(q: TensorLike, k: TensorLike, v: TensorLike, rk: TensorLike | None, rq: TensorLike | None,
                           buckets: Integers, key_padding: Integers | None = None, scale: float | None = None) -> Tensor:
    """DeBERTa's attention, to contents and distances; see the top of this file.

    Parameters
    ----------
    q, k, v : Tensor, shape (..., H, T, hd)
    rk, rq : Tensor, shape (..., H, n, hd), or None
        A key, and a query, for every bucket of distances; None leaves out the term. Axes in front of H, if there are any,
        broadcast to those of q: texts may have rows of their own.
    buckets : array or list of int, shape (2 T - 1,)
        The bucket of the distance t - s from query t to key s, for t - s = -(T - 1) to T - 1. On the host.
    key_padding : bool array, shape (..., T), optional
        True where a key may be attended.
    scale : float, optional
        1 / sqrt(terms hd) by default, where terms is 1 and 1 more for each of rk and rq.

    Returns
    -------
    Tensor, shape (..., H, T, hd)
        Zeros for a query that may attend to nothing.

    Raises
    ------
    ShapeError
        If the shapes do not fit together.
    OutOfRangeError
        If a bucket has no row in rk or rq.
    DTypeError
        If a mask has another dtype, or is no array.
    ConfigError
        If `scale` is not a finite number.

    Notes
    -----
    Dropout of the probabilities, which the published models use in training, is not offered.

    Examples
    --------
    >>> import numpy, minilora
    >>> q = minilora.tensor(numpy.zeros((1, 2, 3, 4)))
    >>> rk = minilora.tensor(numpy.zeros((2, 5, 4)))
    >>> v = minilora.tensor(numpy.arange(24.0).reshape(1, 2, 3, 4))
    >>> disentangled_attention(q, q, v, rk, None, [0, 1, 2, 3, 4]).data[0, 1, 0]
    array([16., 17., 18., 19.])
    """
    shape = shape_of(floating(q))
    if len(shape) < 3 or shape_of(floating(k)) != shape or shape_of(floating(v)) != shape or 0 in shape[-2:]:
        raise ShapeError(f"disentangled_attention: expected q, k and v of one shape (..., H, T, hd) with T and hd >= 1, got "
                         f"{shape}, {shape_of(k)} and {shape_of(v)}: a text attends to itself")
    H, T, hd = shape[-3:]
    tables = [shape_of(floating(x)) for x in (rk, rq) if x is not None]
    for table in tables:
        if table[-3:-2] + table[-1:] != (H, hd) or table[-2] != tables[0][-2] or not stretches(table[:-3], shape[:-3]):
            raise ShapeError(f"disentangled_attention: expected rk and rq (..., {H}, n, {hd}) with one n, whose axes in front "
                             f"broadcast to {shape[:-3]}, got {' and '.join(map(str, tables))}")
    n = tables[0][-2] if tables else 2 ** 62
    buckets = backend.to_host(integers("disentangled_attention: bucket", buckets, n))
    if buckets.shape != (2 * T - 1,):
        raise ShapeError(f"disentangled_attention: expected a bucket for each of the distances {1 - T} to {T - 1}, shape "
                         f"({2 * T - 1},), got {buckets.shape}")
    masks = prepare_masks(q, shape, T, key_padding, None)
    scale = check_scale(1.0 / math.sqrt((1 + len(tables)) * hd) if scale is None else scale, hd)
    return apply(DisentangledAttention, q, k, v, rk, rq, scale=scale, masks=masks, buckets=buckets)


def stretches(lead: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether axes broadcast to others, which stay as they are."""
    return len(lead) <= len(to) and all(n in (1, m) for n, m in zip(lead[::-1], to[::-1]))


def distance_buckets(T: int, span: int, limit: int | None = None) -> numpy.ndarray:
    """The bucket of each distance from -(T - 1) to T - 1 in DeBERTa's table of 2 span rows, whose middle is the distance 0.

    Distances up to span / 2 have a bucket each; greater ones share them, the more the greater they are, up to the distance
    `limit`. Without a limit each has its own. Whatever is beyond shares the last one. With m = span // 2 and a distance d > m:

        bucket = m + ceil((m - 1) log(d / m) / log((limit - 1) / m)),  and for -d its negative

    Parameters
    ----------
    T : int
        Tokens.
    span : int
        position_buckets of config.json, where it is above 0; else max_relative_positions.
    limit : int, optional
        max_relative_positions, where position_buckets is above 0.

    Returns
    -------
    numpy.ndarray of int64, shape (2 T - 1,)

    Notes
    -----
    The logarithms are taken in float32, as in transformers: where the ceiling meets a whole number, the last bit decides.

    Raises
    ------
    ConfigError
        If a number is out of range.

    Examples
    --------
    >>> distance_buckets(4, 2).tolist()
    [0, 0, 1, 2, 3, 3, 3]
    >>> distance_buckets(10, 6, 9).tolist()[9:]
    [6, 7, 8, 9, 10, 11, 11, 11, 11, 11]
    """
    xp = backend.cpu.xp
    T, span = whole("distance_buckets: T", T), whole("distance_buckets: span", span)
    distances = xp.arange(1 - T, T)
    buckets = distances
    if limit is not None:
        middle, limit = span // 2, whole("distance_buckets: limit", limit)
        if middle < 1 or limit - 1 <= middle:
            raise ConfigError(f"distance_buckets: a span of {span} buckets and a limit of {limit} leave no distances to share: "
                              "expected span >= 2 and limit > span // 2 + 1")
        far = xp.maximum(xp.abs(distances), middle).astype("float32") / xp.float32(middle)
        steps = xp.log(far) / xp.log(xp.float32((limit - 1) / middle)) * xp.float32(middle - 1)
        buckets = xp.where(abs(distances) <= middle, distances, xp.sign(distances) * (xp.ceil(steps) + middle))
    rows: numpy.ndarray = xp.clip(buckets + span, 0, 2 * span - 1).astype("int64")
    return rows
