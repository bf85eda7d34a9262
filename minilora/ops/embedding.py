"""Rows of a table, chosen by ids, and the sums of their gradients in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from .. import backend
from ..engine import Op, apply, floating, shape_of
from ..errors import ConfigError, ShapeError
from .indices import beside, first_of_all, integers
from .linear import rows
from .window import is_int

if TYPE_CHECKING:
    from ..tensor import Tensor
    from ..typing import Integers, TensorLike

Array = Any


class Sums(NamedTuple):
    """How to add up the rows that have one id: see `plan_sums`.

    Attributes
    ----------
    order : array of int64, shape (n,)
        Rows sorted by id; rows of one id, a segment, keep their order.
    starts, ids : array of int64, shape (u,)
        Where each segment starts, and its id.
    pairs : tuple of array of int64
        pairs[k] lists the places p, in sorted order, to which the row at p + 2^k is to be added.
    """

    order: Array
    starts: Array
    ids: Array
    pairs: tuple[Array, ...]

    def arrays(self) -> list[Array]:
        return [self.order, self.starts, self.ids, *self.pairs]


def plan_sums(ids: numpy.ndarray, without: int | None = None) -> Sums:
    """Plan the sums over rows with equal ids: on the host, where the ids are.

    Each segment is summed as a binary tree. In round k = 0, 1, ... every 2^(k+1)-th row of a segment, counted from its
    start, takes in the row 2^k further on. All additions of a round go to different places, so a round is one fancy
    indexing: nothing depends on the order in which a GPU's threads arrive, as it would with atomic additions, and the bits
    are the same in every run. n rows cost fewer than n additions in at most log2 n rounds, and rounding errors grow with the
    depth of the tree and not with the length of a segment.

    Parameters
    ----------
    ids : numpy.ndarray of int64, shape (n,)
    without : int, optional
        An id whose rows are left out.
    """
    host = backend.cpu.xp
    chosen = host.flatnonzero(ids != without) if without is not None else host.arange(ids.size)
    order = chosen[ids[chosen].argsort(kind="stable")]
    ranked = ids[order]
    starts = host.flatnonzero(host.diff(ranked, prepend=-1))  # no id is -1
    lengths = host.diff(starts, append=ranked.size)
    rank = host.arange(ranked.size) - host.repeat(starts, lengths)  # of a row in its segment
    following = host.repeat(lengths, lengths) - rank  # rows from this one to the segment's end
    pairs, step = [], 1
    while step < lengths.max(initial=0):
        pairs.append(host.flatnonzero((rank % (2 * step) == 0) & (following > step)))
        step *= 2
    return Sums(order, starts, ranked[starts], tuple(pairs))


def moved(plan: Sums, device: backend.Device, constant: bool = False) -> Sums:
    """The plan on a device: one copy for all of its parts, made once if the plan is the same in every step."""
    parts = plan.arrays()
    flat = (backend.constant if constant else backend.to_device)(backend.cpu.xp.concatenate(parts), device)
    views, start = [], 0
    for part in parts:
        views.append(flat[start:start + part.size])
        start += part.size
    return Sums(views[0], views[1], views[2], tuple(views[3:]))


def planned(ids: Array, placed: Array, without: int | None = None) -> tuple[list[Array], Callable[..., None]]:
    """How to add up rows with equal ids: what to keep until then, on the device, and what does it.

    This is the reference, which plans on the host. A GPU has a version of its own, which gives the same bits.

    Parameters
    ----------
    ids : array of int64
        As they were given: a sync point only if that was on a device.
    placed : array of int64
        The same, where the rows are.
    without : int, optional
        An id whose rows are left out.

    Returns
    -------
    list of array
    callable
        ``add_up(out, dy, plan)``: out[id] = sum of the rows of dy (n, D) that have this id; rows of `out` whose id does not
        occur stay as they are.
    """
    on_host = backend.to_host(ids).reshape(-1)
    return moved(plan_sums(on_host, without), backend.device_of(placed)).arrays(), reference_sums


def reference_sums(out: Array, dy: Array, plan: Sequence[Array]) -> None:
    """`add_up` by the arrays of a plan."""
    order, starts, ids, *pairs = plan
    add_up(out, dy, Sums(order, starts, ids, tuple(pairs)))


def add_up(out: Array, dy: Array, plan: Sums) -> None:
    """out[id] = sum of the rows of dy (n, D) that have this id; rows of `out` whose id does not occur stay as they are."""
    g = dy[plan.order]
    for k, places in enumerate(plan.pairs):
        g[places] += g[places + 2 ** k]
    out[plan.ids] = g[plan.starts]


class Embedding(Op):
    """y = W[ids]: row ids_n of W (V, D) for every n; y has the shape of ids, and D.

    y_nd = W_(ids_n, d), so W_vd meets y_nd in every row n with ids_n = v:

        dW_vd = sum over those n of dy_nd        and 0 for an id that does not occur, or that is padding_idx

    Keeps the plan of the sums (`planned`): for n ids, of which u differ, 2 n + u integers, on a GPU 3 n. Ids on the host that
    count up, as positions do, are a part of W: of them nothing is sent to the device or kept.
    """

    rounds = True
    moves = True
    ids: Array
    padding_idx: int | None
    table: tuple[int, ...]
    part: slice | None = None
    add_up: Callable[..., None]

    def forward(self, W: Array) -> Array:
        self.table, ids, device = W.shape, self.ids, backend.device_of(W)
        first = None if device.recorded else first_of_all(ids)
        if first is not None and self.padding_idx is None:
            self.part = slice(first, first + ids.size)
            self.save(None)  # nothing, but the gradient may be written where an optimizer wants it
            return W[self.part].copy().reshape(*ids.shape, W.shape[1])
        placed = beside(W, ids)
        if self.needs[0]:
            plan, self.add_up = device.resolve(planned)(ids, placed, self.padding_idx)
            self.save(*plan)
        return W.take(placed, axis=0)  # a method: W may be held in low precision

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        dW = self.into(0)
        if dW is None:
            dW = self.xp.zeros(self.table, dtype=dy.dtype)
        else:
            dW.fill(0.0)
        if self.part is not None:
            dW[self.part] = rows(dy)
        else:
            self.add_up(dW, rows(dy), self.saved)
        return (dW,)


def embedding(ids: Integers, W: TensorLike, padding_idx: int | None = None) -> Tensor:
    """Rows of W chosen by ids; see `Embedding`.

    Parameters
    ----------
    ids : array, Tensor, or nested lists of int, shape (...)
        In [0, V). Best given on the host: they are checked there, and moved. Ids that lie on a GPU are not checked; with
        kernels off, and where W is trained, they are copied back once, to plan the sums (a sync point).
    W : Tensor, shape (V, D)
    padding_idx : int, optional
        An id whose row of W gets no gradient.

    Returns
    -------
    Tensor, shape (..., D)

    Raises
    ------
    OutOfRangeError
        If an id is not in [0, V). Negative ids do not count from the end.
    DTypeError
        If the ids are not integers.
    ShapeError
        If W is not a matrix.
    ConfigError
        If padding_idx is not in [0, V).

    Examples
    --------
    >>> import minilora
    >>> W = minilora.Parameter(minilora.backend.asarray([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]))
    >>> y = embedding([2, 0, 2], W)
    >>> y.data
    array([[4., 5.],
           [0., 1.],
           [4., 5.]], dtype=float32)
    >>> y.sum().backward()
    >>> W.grad
    array([[1., 1.],
           [0., 0.],
           [2., 2.]], dtype=float32)
    """
    shape = shape_of(W)
    if len(shape) != 2:
        raise ShapeError(f"embedding: expected a table (V, D), got shape {shape}")
    check_padding(padding_idx, shape[0])
    return apply(Embedding, floating(W), ids=integers("embedding: token id", ids, shape[0]), padding_idx=padding_idx)


def check_padding(padding_idx: int | None, limit: int) -> None:
    """Raise `ConfigError` unless padding_idx is None or in [0, limit)."""
    if padding_idx is not None and not (is_int(padding_idx, 0) and padding_idx < limit):
        raise ConfigError(f"padding_idx must be None or an int in [0, {limit}), got {padding_idx!r}")
