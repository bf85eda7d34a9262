"""Cross-entropy of a softmax, from logits and integer labels; also behind a linear layer, without keeping its output."""

from __future__ import annotations

import math
from numbers import Integral
from typing import TYPE_CHECKING, Any

from .. import backend
from ..backend import add_matmul
from ..engine import Op, apply, floating, shape_of
from ..errors import ConfigError, DTypeError, ShapeError
from ..settings import number
from .few import few
from .indices import beside, integers
from .linear import check_linear, rows

if TYPE_CHECKING:
    from ..tensor import Tensor
    from ..typing import Integers, TensorLike

Array = Any


def row_weights(labels: Array, ignore_index: int, dtype: Any) -> tuple[Array, Array]:
    """Each row's share in the mean, (N, 1): 1 / n for the n rows that count, else 0. And labels that all name a class."""
    counted = labels != ignore_index
    return (counted / counted.sum()).astype(dtype)[:, None], labels * counted


def counted_rows(x: Array, weights: Array, ignores: bool, xp: Any) -> Array:
    """x (N, ...) with zeros in the rows of weight 0, whose numbers may be anything: 0 times infinity is no number.

    x itself unless `ignores`: the copy costs a fourth of a cross-entropy (measured).
    """
    return xp.where(weights != 0.0, x, 0.0) if ignores else x


def row_losses(z: Array, labels: Array, smoothing: float, xp: Any) -> tuple[Array, Array]:
    """The loss of every row of logits z (R, V), less the row's largest, and sum_j e^(z_j), both (R, 1). z becomes e^z."""
    target = xp.take_along_axis(z, labels[:, None], axis=1)
    if smoothing:
        target = (1.0 - smoothing) * target + z.sum(axis=1, keepdims=True) * (smoothing / z.shape[1])
    xp.exp(z, out=z)
    total = z.sum(axis=1, keepdims=True)
    return xp.log(total) - target, total


def to_gradient(e: Array, total: Array, labels: Array, weights: Array, smoothing: float, xp: Any) -> None:
    """Turn e = e^z (R, V) into weights (p - t), where p = e / total is the softmax and t the smoothed target."""
    e *= weights / total
    e[xp.arange(e.shape[0]), labels] -= weights[:, 0] * (1.0 - smoothing)
    if smoothing:
        e -= weights * (smoothing / e.shape[1])


class CrossEntropy(Op):
    """L = mean over the rows n that count of -sum_j t_nj log p_nj          logits x (N, V), p = softmax(x), labels k (N)

    t_nj = (1 - e) [j = k_n] + e / V, with e the label smoothing: each row of t sums to 1. As log p_nj = x_nj - lse_n with
    lse_n = log sum_j e^(x_nj),

        l_n = lse_n - (1 - e) x_(n, k_n) - (e / V) sum_j x_nj        L = sum_n w_n l_n

    where w_n = 1 / (number of rows that count), and 0 for a row whose label is ignore_index. dlse_n/dx_nj = p_nj, so

        dx_nj = dy w_n (p_nj - t_nj)

    A row of dx sums to 0. A row that is ignored is never read, and its dx is 0. The largest logit of a row is subtracted first:
    it cancels in l_n and p_n, and nothing overflows; a row's loss is never negative, not by rounding either.

    Keeps x, and of each row the largest logit and the sum: 2 N. The softmax is computed again: as large as x, which the
    caller often holds anyway.

    Source: label smoothing is that of Szegedy et al. 2016, arXiv 1512.00567, section 7.
    """

    rounds = False
    labels: Array
    ignore_index: int
    ignores: bool  # some label may be ignore_index
    label_smoothing: float

    def forward(self, x: Array) -> Array:
        weights, labels = row_weights(self.labels, self.ignore_index, x.dtype)
        x2 = counted_rows(rows(x), weights, self.ignores, self.xp)
        largest = x2.max(axis=1, keepdims=True)
        losses, total = row_losses(x2 - largest, labels, self.label_smoothing, self.xp)
        self.save(x, largest, total)
        return (weights * losses).sum()

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        x, largest, total = self.saved
        weights, labels = row_weights(self.labels, self.ignore_index, x.dtype)
        dx = counted_rows(rows(x), weights, self.ignores, self.xp) - largest
        self.xp.exp(dx, out=dx)
        to_gradient(dx, total, labels, weights * dy, self.label_smoothing, self.xp)
        return (dx.reshape(x.shape),)


class LinearCrossEntropy(Op):
    """`CrossEntropy` of y = h W^T + b          h (..., H) = N rows, W (V, H), b (V), labels k (N)

    The logits y (N, V) of a language model are its largest array by far, and nobody wants them but the loss. L is a sum over
    rows, so it is computed a chunk of rows at a time; and G = dL/dy = w (p - t), from `CrossEntropy`, depends on nothing that
    comes later: not even on dy = dL'/dL, a number, which multiplies all. So the gradients are finished in the forward pass,
    while a chunk's G still stands where its logits stood, and backward only scales them:

        dh = dy G W        dW = dy G^T h        db = dy sum over rows of G

    Memory: one chunk of logits. Keeps the gradients that are wanted (dh N H, dW V H, db V), and neither logits nor h; in a
    model whose W is frozen, dh alone. A forward pass without backward should run under `no_grad`: it does half the work.
    """

    rounds = False
    labels: Array
    ignore_index: int
    ignores: bool  # some label may be ignore_index
    label_smoothing: float
    chunk_rows: int
    # Logits in memory at a time: 64 MB of float32, 333 rows of GPT-2's 50257. Every chunk reads all of W twice, and thin
    # products are slow: measured at that size, 256 rows cost as much as 508 at once, 128 rows a quarter more, 64 rows a half.
    most = 1 << 24

    def forward(self, h: Array, W: Array, b: Array | None) -> Array:
        needs_h, needs_W, needs_b = self.needs
        xp, shape = self.xp, h.shape
        weights, labels = row_weights(self.labels, self.ignore_index, h.dtype)
        h = counted_rows(rows(h), weights, self.ignores, xp)
        dh: Array = xp.empty(h.shape, dtype=h.dtype) if needs_h else None
        dW = db = None
        loss = 0.0
        room = xp.empty((min(self.chunk_rows, h.shape[0]), W.shape[0]), dtype=h.dtype)
        for start in few(range(0, h.shape[0], self.chunk_rows), h):
            part = slice(start, start + self.chunk_rows)
            h_part, w, k = h[part], weights[part], labels[part]
            z = self.dot(h_part, W.T, out=room[:h_part.shape[0]])
            if b is not None:
                z += b
            loss = loss + self.finish(z, k, w)  # z is G from here on
            if needs_h:
                self.dot(z, W, out=dh[part])
            if needs_W and start == 0:
                dW = xp.dot(z.T, h_part)
            elif needs_W:
                add_matmul(dW, z.T, h_part, 1.0)
            if needs_b:
                db = z.sum(axis=0) if start == 0 else db + z.sum(axis=0)
        self.save(dh.reshape(shape) if needs_h else None, dW, db)
        return loss

    def finish(self, z: Array, labels: Array, weights: Array) -> Array:
        """The weighted sum of the losses of some rows of logits z; z becomes their G, if a gradient is wanted."""
        z -= z.max(axis=1, keepdims=True)
        losses, total = row_losses(z, labels, self.label_smoothing, self.xp)
        if True in self.needs:
            to_gradient(z, total, labels, weights, self.label_smoothing, self.xp)
        return (weights * losses).sum()

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        return tuple(None if gradient is None else self.xp.multiply(gradient, dy, out=self.into(i))
                     for i, gradient in enumerate(self.saved))


def cross_entropy(logits: TensorLike, labels: Integers, ignore_index: int = -100, label_smoothing: float = 0.0) -> Tensor:
    """Mean of -log softmax(logits)[label] over the rows that count; see `CrossEntropy`.

    Parameters
    ----------
    logits : Tensor, shape (..., V)
        The classes lie along the *last* axis, wherever there are more than two (PyTorch has them on the second).
    labels : array, Tensor, or nested lists of int, shape (...)
        Classes in [0, V), best on the host: they are checked there, and moved. Labels that lie on a GPU are not checked.
    ignore_index : int
        Rows with this label count nothing and get no gradient. If labels on a GPU are all such, the loss is NaN.
    label_smoothing : float
        In [0, 1]: this share of the target is spread evenly over all classes.

    Returns
    -------
    Tensor, shape ()

    Raises
    ------
    ShapeError
        If the shapes do not fit, or if there is nothing to average.
    OutOfRangeError
        If a label is neither in [0, V) nor ignore_index.
    DTypeError
        If the labels are not integers or the logits not floating-point.
    ConfigError
        If label_smoothing is outside [0, 1].

    Examples
    --------
    >>> import minilora
    >>> logits = minilora.tensor([[0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]])
    >>> round(cross_entropy(logits, [2, -100]).item(), 6)  # log 4
    1.386294
    """
    check_order(logits, labels)
    settings = check_labels("cross_entropy", logits, shape_of(logits), labels, ignore_index, label_smoothing)
    return apply(CrossEntropy, floating(logits), **settings)


def linear_cross_entropy(h: TensorLike, W: TensorLike, labels: Integers, b: TensorLike | None = None, ignore_index: int = -100,
                         label_smoothing: float = 0.0,
                         chunk_rows: int | None = None) -> Tensor:
    """``cross_entropy(linear(h, W, b), labels)`` without ever holding all logits; see `LinearCrossEntropy`.

    Parameters
    ----------
    h : Tensor, shape (..., H)
    W : Tensor, shape (V, H)
    labels : array, Tensor, or nested lists of int, shape (...)
    b : Tensor, shape (V,), optional
    ignore_index, label_smoothing
        As in `cross_entropy`.
    chunk_rows : int, optional
        Rows whose logits are held at a time; by default so many that they are 2^24 numbers at most, 2^26 on a GPU, in
        chunks of about equal size.

    Returns
    -------
    Tensor, shape ()

    Raises
    ------
    ShapeError, OutOfRangeError, DTypeError, ConfigError
        As `linear` and `cross_entropy` do.

    Examples
    --------
    >>> import minilora
    >>> h, W = minilora.tensor([[1.0, 0.0], [0.0, 2.0]]), minilora.tensor([[0.0, 0.0], [0.0, 0.0]])
    >>> round(linear_cross_entropy(h, W, [0, 1]).item(), 6)  # log 2
    0.693147
    """
    check_linear(h, W, b)
    classes = W.shape[0]
    settings = check_labels("linear_cross_entropy", h, h.shape[:-1] + (classes,), labels, ignore_index, label_smoothing)
    if chunk_rows is None:
        source: Any = h
        most = backend.device_of(source.data if hasattr(h, "node") else source).resolve(LinearCrossEntropy).most
        n = math.prod(shape_of(h)[:-1])
        chunks = -(-n * classes // most) or 1
        chunk_rows = max(1, -(-n // chunks))
    elif isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int) or chunk_rows < 1:
        raise ConfigError(f"linear_cross_entropy: chunk_rows must be None or an int >= 1, got {chunk_rows!r}")
    return apply(LinearCrossEntropy, floating(h), W, b, chunk_rows=chunk_rows, **settings)


def check_labels(name: str, like: Any, shape: tuple[int, ...], labels: Any, ignore_index: int,
                 label_smoothing: float) -> dict[str, Any]:
    """The settings of both operations for logits of this shape, checked; the labels flat, and on the device of `like`."""
    if not shape:
        raise ShapeError(f"{name}: expected logits (..., V), got a single number")
    check_cross_entropy(ignore_index, label_smoothing)
    labels = integers(f"{name}: label", labels, shape[-1], ignore_index)
    ignore_index = int(ignore_index)
    if labels.shape != shape[:-1]:
        one_hot = ": for one-hot rows take labels.argmax(axis=-1)" if labels.shape == shape else ""
        raise ShapeError(f"{name}: expected labels of shape {shape[:-1]} for logits {shape}, whose last axis is the classes; "
                         f"got {labels.shape}{one_hot}")
    on_host = backend.device_of(labels) is backend.cpu
    counted = labels != ignore_index
    if labels.size == 0 or (on_host and not counted.any()):
        raise ShapeError(f"{name}: nothing to average: " + (
            f"each of the {labels.size} labels is ignore_index {ignore_index}. Are the labels cut off?" if labels.size else
            f"no rows in logits of shape {shape}. Is the batch empty?"))
    return dict(labels=beside(like, labels).reshape(-1), ignore_index=ignore_index, label_smoothing=float(label_smoothing),
                ignores=not on_host or not counted.all())  # nobody waits for a GPU to say


def check_order(logits: Any, labels: Any) -> None:
    """Raise `DTypeError` if floating-point numbers were given for labels, and integers or lists for logits."""
    if hasattr(labels, "dtype") and labels.dtype.kind == "f" and getattr(getattr(logits, "dtype", None), "kind", "i") in "iu":
        raise DTypeError(f"cross_entropy: the logits come first, then the labels: expected floating-point logits (..., V) and "
                         f"integer labels, got {getattr(logits, 'dtype', type(logits).__name__)} and {labels.dtype} "
                         f"{labels.shape}: swap the two")


def check_cross_entropy(ignore_index: Any, label_smoothing: Any) -> None:
    """Raise `ConfigError` unless ignore_index is an int and label_smoothing a number in [0, 1]."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, Integral):
        raise ConfigError(f"ignore_index must be an int, got {ignore_index!r}")
    number("label_smoothing", label_smoothing, 0.0, 1.0, ends="[]")
