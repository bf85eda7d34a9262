"""A table some of whose rows an adapter replaces, and the output head tied to it: the gradients, derived by hand.

Shapes: ids (n), W (V, d) the table, T (k, d) the rows that take the places `indices` (k) of it, h (m, d), y (n, d) or (m, V).
The table with its new rows is W~ = W but for W~_v = T_j where v = indices_j. L is the loss, dy = dL/dy.

**Rows chosen by ids.** Element by element (n a place, c a column):

    y_nc = T_jc    if ids_n = indices_j for some j
    y_nc = W_vc    with v = ids_n otherwise

T_jc meets y_nc at every place n whose id is indices_j, and nothing else; W_vc at every place n with ids_n = v, unless v is one
of the indices. So each gets the sum of dy over its own places:

    dT_j = sum of dy_n over ids_n = indices_j       (k, d)    0 for a row whose id does not occur
    dW_v = sum of dy_n over ids_n = v               (V, d)    0 for the v in indices: what is replaced moves nothing

The sums over equal ids are trees of a fixed shape (`ops.embedding.plan_sums`): the same bits in every run. padding_idx gets no
gradient: in T if it is one of the indices, else in W, as in PyTorch's embedding(ids, W~, padding_idx), which PEFT computes.

**The tied head** makes logits from the same table, y = h W~^T:

    y_mv = sum_c h_mc W_vc        y_mv = sum_c h_mc T_jc    where v = indices_j

h meets every column of y, W only the columns that are not replaced, T only those that are; with dy_I (m, k) the columns of dy
at the indices:

    dh = dy W~ = dy W + dy_I (T - W_I)    (m, d)    W~ is never formed: W_I are k rows
    dT = dy_I^T h                         (k, d)
    dW = dy^T h, with 0 in the rows I     (V, d)

Where both uses are trained together, their gradients of T add up, as for any parameter used twice.

This replaces rows and adds nothing: with T = W_I the model is the base's, to the last bit. Source: PEFT's trainable tokens
(`trainable_token_indices`), whose file calls T a delta although it is the rows themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy

from ... import backend
from ...engine import Op, apply, floating, shape_of
from ...errors import ConfigError, ShapeError
from ...ops.embedding import check_padding, planned
from ...ops.indices import beside, integers
from ...ops.linear import rows
from ...tensor import Tensor
from .embedding import summed

__all__ = ["TokenEmbedding", "TokenHead", "check_indices", "token_embedding", "token_head"]

Array = Any


class TokenEmbedding(Op):
    """y = W~[ids] and the gradients derived at the top of this file.

    Keeps the plans of the sums of what is trained (`ops.embedding.planned`): for the p places at which a replaced row is looked
    up 2 p integers and 1 more for each such row; for W the same over the other places.
    """

    rounds = True
    moves = True
    ids: Array
    indices: tuple[int, ...]
    padding_idx: int | None
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    add_up: Callable[..., None]

    def forward(self, W: Array, T: Array) -> Array:
        self.shapes = W.shape, T.shape
        others, slots = self.keys()
        placed = beside(W, slots)
        y = W.take(beside(W, self.ids).reshape(-1), axis=0)
        if len(self.indices):
            y = self.xp.where((placed >= 0)[:, None], T.take(self.xp.maximum(placed, 0), axis=0), y)
        plans: list[list[Array]] = [[], []]
        for i, keys in enumerate((others, slots)):
            if self.needs[i]:
                keys = self.without_padding(keys)
                plans[i], self.add_up = backend.device_of(W).resolve(planned)(keys, beside(W, keys), -1)
        self.parts = len(plans[0])
        self.save(*plans[0], *plans[1])
        return y.reshape(self.ids.shape + W.shape[1:])

    def keys(self) -> tuple[Array, Array]:
        """For each place the row of W that is looked up there, and that of T: -1 where it is one of the other table."""
        device, ids = backend.device_of(self.ids), self.ids.reshape(-1)
        if not self.indices:
            return ids, device.xp.full(ids.shape, -1)
        order = numpy.argsort(self.indices)
        ranked = backend.constant(numpy.array(self.indices, "int64")[order], device)
        found = device.xp.minimum(device.xp.searchsorted(ranked, ids), len(self.indices) - 1)
        replaced = ranked[found] == ids
        return device.xp.where(replaced, -1, ids), device.xp.where(replaced, backend.constant(order, device)[found], -1)

    def without_padding(self, keys: Array) -> Array:
        if self.padding_idx is None:
            return keys
        return backend.device_of(keys).xp.where(self.ids.reshape(-1) == self.padding_idx, -1, keys)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        dy, saved = rows(dy), list(self.saved)
        kept = saved[:self.parts], saved[self.parts:]
        return tuple(summed(self, i, dy, kept[i]) if needed else None for i, needed in enumerate(self.needs))


class TokenHead(Op):
    """y = h W~^T and the gradients derived at the top of this file. Keeps h if W or T is trained; for dh W and T, no copies."""

    rounds = True
    indices: tuple[int, ...]

    def forward(self, h: Array, W: Array, T: Array) -> Array:
        needs_h, needs_W, needs_T = self.needs
        flat = rows(h)
        y = self.dot(flat, W.T)
        at = self._at(W)
        if len(self.indices):
            y[:, at] = self.xp.dot(flat, T.T)
        self.save(flat if needs_W or needs_T else None, W if needs_h else None, T if needs_h else None, at)
        return y.reshape(h.shape[:-1] + W.shape[:1])

    def _at(self, W: Array) -> Array:
        return backend.constant(numpy.array(self.indices, "int64"), backend.device_of(W))

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        needs_h, needs_W, needs_T = self.needs
        h, W, T, at = self.saved
        dy, dot = rows(dy), self.xp.dot
        dh = dW = dT = None
        replaced = self.xp.take(dy, at, axis=1)
        if needs_h:
            dh = dot(dy, W)
            if len(self.indices):
                dh += dot(replaced, T - W[at])
            dh = dh.reshape(self.shape[:-1] + W.shape[1:])
        if needs_W:
            dW = dot(dy.T, h, out=self.into(1))
            dW[at] = 0.0
        if needs_T:
            dT = dot(replaced.T, h, out=self.into(2))
        return dh, dW, dT


def token_embedding(ids: Any, W: Any, T: Any, indices: Sequence[int], padding_idx: int | None = None) -> Tensor:
    """Rows of a table chosen by ids, of which those at `indices` are replaced by the rows of T; see `TokenEmbedding`.

    Parameters
    ----------
    ids : array, Tensor, or nested lists of int, shape (...)
        In [0, V). Best given on the host, where they are checked.
    W : Tensor, shape (V, d)
    T : Tensor, shape (k, d)
    indices : sequence of int, length k
        In [0, V), none twice.
    padding_idx : int, optional
        An id whose row gets no gradient, of W or of T.

    Returns
    -------
    Tensor, shape (..., d)

    Raises
    ------
    OutOfRangeError
        If an id is not in [0, V).
    ConfigError
        If an index is not in [0, V) or comes twice, or padding_idx is not in [0, V).
    ShapeError
        If W, T and the indices do not fit together.

    Examples
    --------
    >>> import numpy, minilora
    >>> W, T = numpy.zeros((4, 2)), minilora.Parameter(numpy.array([[1.0, 2.0]]))
    >>> y = token_embedding([3, 1, 3], W, T, [3])
    >>> y.data
    array([[1., 2.],
           [0., 0.],
           [1., 2.]])
    >>> y.sum().backward()
    >>> T.grad
    array([[2., 2.]])
    """
    indices = _check("token_embedding", W, T, indices)
    V = shape_of(W)[0]
    check_padding(padding_idx, V)
    return apply(TokenEmbedding, floating(W), T, ids=integers("token_embedding: token id", ids, V), indices=indices,
                 padding_idx=padding_idx)


def token_head(h: Any, W: Any, T: Any, indices: Sequence[int]) -> Tensor:
    """Logits h W~^T of the output head tied to the table of `token_embedding`; see `TokenHead`.

    Parameters
    ----------
    h : Tensor, shape (..., d)
    W, T, indices
        As in `token_embedding`.

    Returns
    -------
    Tensor, shape (..., V)

    Raises
    ------
    ShapeError, ConfigError
        As in `token_embedding`.

    Examples
    --------
    >>> import numpy, minilora
    >>> W, T = numpy.ones((3, 2)), numpy.array([[1.0, 2.0]])
    >>> token_head(minilora.tensor([[1.0, 10.0]], "float64"), W, T, [1]).data
    array([[11., 21., 11.]])
    """
    indices = _check("token_head", W, T, indices)
    d = shape_of(W)[1]
    if not shape_of(h) or shape_of(h)[-1] != d:
        raise ShapeError(f"token_head: expected h (..., {d}), got {shape_of(h)}")
    return apply(TokenHead, floating(h), W, T, indices=indices)


def check_indices(indices: Sequence[int], V: int) -> tuple[int, ...]:
    """These rows of a table as ints; `ConfigError` if one is none of its V rows or comes twice."""
    found = tuple(int(i) for i in indices)
    wrong = [i for i in found if not 0 <= i < V]
    twice = sorted({i for i in found if found.count(i) > 1})
    if wrong:
        raise ConfigError(f"token indices are in [0, {V}), the rows of the table, got {', '.join(map(str, wrong[:5]))}")
    if twice:
        raise ConfigError(f"token indices: {', '.join(map(str, twice[:5]))} comes twice: a row can be replaced by one row only")
    return found


def _check(name: str, W: Any, T: Any, indices: Sequence[int]) -> tuple[int, ...]:
    W_shape, T_shape = shape_of(W), shape_of(T)
    if len(W_shape) != 2:
        raise ShapeError(f"{name}: expected a table (V, d), got shape {W_shape}")
    indices = check_indices(indices, W_shape[0])
    if T_shape != (len(indices), W_shape[1]):
        raise ShapeError(f"{name}: for {len(indices)} indices of a table {W_shape} expected rows ({len(indices)}, "
                         f"{W_shape[1]}), got {T_shape}")
    return indices
