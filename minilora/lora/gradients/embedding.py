"""The gradient of a low-rank update of an embedding table, derived by hand; and of the output head tied to that table.

Shapes: ids (n), W (V, d), A (r, V), B (d, r), y (n, d), s a number. L is the loss, dy = dL/dy.

Forward, element by element (n a place, v = ids_n the row that it names, k a column of the table, j a rank):

    a_nj = A_jv                                 v = ids_n
    y_nk = W_vk + s sum_j a_nj B_kj             v = ids_n

This is the low-rank update of a linear layer whose input x_n is 1 at v = ids_n and 0 elsewhere, of weight W^T (d, V): its
z = x A^T is a. The product with x is a choice of columns, so nothing of the size n V exists.

Backward: every path from a letter to L goes through y, so sum dy over the y's that the letter meets.

    B_kj meets y_nk at every place n:                dL/dB_kj = sum_n dy_nk s a_nj
    a_nj meets y_nk in every column k:               dL/da_nj = s sum_k dy_nk B_kj            call u_nj = sum_k dy_nk B_kj
    A_jv meets a_nj at every place n with ids_n = v:   dL/dA_jv = sum of dL/da_nj = s sum of u_nj over those n
    W_vk meets y_nk at the same places:              dL/dW_vk = sum of dy_nk over those n

Gathered into matrices:

    a = A[:, ids]^T                              (n, r)    kept: makes dB one product
    y = W[ids] + s a B^T
    u = dy B                                     (n, r)
    dB = s dy^T a                                (d, r)
    dA[:, v] = s sum of u_n over ids_n = v       (r, V)    0 for an id that does not occur
    dW[v] = sum of dy_n over ids_n = v           (V, d)    the same sums, if somebody trains the table

The sums over equal ids are trees of a fixed shape (`ops.embedding.plan_sums`), so that their bits are the same in every run.
The table with its update is W + D^T with D = s B A (d, V): so with G (V, d) the gradient of the merged table,
dA = s B^T G^T and dB = s G^T A^T. The tests use that as an independent check.

The start is the other way round than in a linear layer: A = 0 and B is drawn, hence a = 0 and dB = 0, and the first step
moves A alone. Only the columns of A whose ids occur ever move, so the update of an id never seen stays 0.

padding_idx, if given, is an id whose row is to stay as it is: its column of A and its row of W get no gradient. Its places
give an output like all others, so they take part in dB, as in PyTorch's embedding(ids, A^T, padding_idx) B^T, which PEFT
computes. If its column of A starts at 0, it stays 0, and its part of dB is 0 as well.

The tied output head reads the same table as a weight (V, d): logits = h E^T with E = W + D^T = W + s A^T B^T. Written out,

    h E^T = h W^T + s (h B) A = h W^T + s (h (B^T)^T) (A^T)^T,

the layer of `gradient` with B^T (r, d) in the place of its A and A^T (V, r) in that of its B. So the head needs no operation
of its own, and where both uses are trained together, their gradients of A and B add up, as for any parameter used twice.

Source: Hu et al. 2021, arXiv 2106.09685, and its repository microsoft/LoRA (Embedding); the shapes are PEFT's, too. Tied
heads: Press and Wolf 2017, arXiv 1608.05859.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ... import backend
from ...backend import add_matmul
from ...engine import Op, apply, floating, shape_of
from ...errors import ShapeError
from ...ops.embedding import check_padding, planned
from ...ops.indices import beside, integers
from ...ops.linear import rows
from ...ops.shape import transpose
from ...tensor import Tensor
from ..gradient import lora_linear

__all__ = ["LoRAEmbedding", "lora_embedding", "lora_head", "summed"]

Array = Any


class LoRAEmbedding(Op):
    """y = W[ids] + s a B^T with a = A[:, ids]^T, and the gradients derived at the top of this file.

    Keeps a, n r numbers, if B is trained; B (no copy) and the plan of the sums, as `ops.Embedding` does, if A is.
    Of the size of the table there is nothing but the gradients dA and dW themselves, each made only if wanted.
    """

    rounds = True
    ids: Array
    padding_idx: int | None
    s: float
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    add_up: Callable[..., None]

    def forward(self, W: Array, A: Array, B: Array) -> Array:
        needs_W, needs_A, needs_B = self.needs
        self.shapes = W.shape, A.shape
        ids = beside(W, self.ids).reshape(-1)
        a_T = self.xp.take(A, ids, axis=1)  # not rows of A.T: NumPy's take would first copy all of it
        y = W.take(ids, axis=0)
        add_matmul(y, a_T.T, B.T, self.s)  # y += s a B^T, into the array just made
        plan: list[Array] = []
        if needs_W or needs_A:
            plan, self.add_up = backend.device_of(W).resolve(planned)(self.ids, ids, self.padding_idx)
        self.save(a_T if needs_B else None, B if needs_A else None, *plan)
        return y.reshape(self.ids.shape + W.shape[1:])

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        needs_W, needs_A, needs_B = self.needs
        a_T, B, *plan = self.saved
        dW = dA = dB = None
        s, dy, dot = self.s, rows(dy), self.xp.dot
        if needs_W:
            dW = summed(self, 0, dy, plan)
        if needs_A:
            u = dot(dy, B)
            u *= s
            dA = summed(self, 1, u, plan, columns=True)
        if needs_B:
            dB = dot(dy.T, s * a_T.T, out=self.into(2))
        return dW, dA, dB


def summed(op: Op, i: int, g: Array, plan: list[Array], columns: bool = False) -> Array:
    """The gradient of an op's input i, a table: rows of g that have one id, added up in that id's row (or column).

    The op has `shapes`, those of its tables, and `add_up`; `plan` is what it kept for that: see `ops.embedding.planned`.
    """
    out = op.into(i)
    if out is None:
        out = op.xp.zeros(op.shapes[i], dtype=g.dtype)  # type: ignore[attr-defined]
    else:
        out.fill(0.0)
    op.add_up(out.T if columns else out, g, plan)  # type: ignore[attr-defined]
    return out


def lora_embedding(ids: Any, W: Any, A: Any, B: Any, s: float, padding_idx: int | None = None) -> Tensor:
    """Rows of W + s A^T B^T chosen by ids; see `LoRAEmbedding`.

    Parameters
    ----------
    ids : array, Tensor, or nested lists of int, shape (...)
        In [0, V). Best given on the host: they are checked there, and moved. Ids that lie on a GPU are not checked.
    W : Tensor, shape (V, d)
    A : Tensor, shape (r, V)
    B : Tensor, shape (d, r)
    s : float
        From `scaling`.
    padding_idx : int, optional
        An id whose row of W and column of A get no gradient.

    Returns
    -------
    Tensor, shape (..., d)

    Raises
    ------
    OutOfRangeError
        If an id is not in [0, V). Negative ids do not count from the end.
    DTypeError
        If the ids are not integers.
    ShapeError
        If W, A and B do not fit together.
    ConfigError
        If padding_idx is not in [0, V).

    Examples
    --------
    >>> import numpy, minilora
    >>> W, B = numpy.zeros((4, 2)), numpy.array([[1.0], [2.0]])
    >>> A = minilora.Parameter(numpy.array([[0.0, 1.0, 2.0, 3.0]]))
    >>> y = lora_embedding([3, 1, 3], W, A, B, s=0.5)
    >>> y.data
    array([[1.5, 3. ],
           [0.5, 1. ],
           [1.5, 3. ]])
    >>> y.sum().backward()
    >>> A.grad
    array([[0. , 1.5, 0. , 3. ]])
    """
    check_table("lora_embedding", W, A, B)
    limit = shape_of(W)[0]
    check_padding(padding_idx, limit)
    return apply(LoRAEmbedding, floating(W), A, B, ids=integers("lora_embedding: token id", ids, limit),
                 padding_idx=padding_idx, s=s)


def lora_head(h: Any, W: Any, A: Any, B: Any, s: float) -> Tensor:
    """Logits h W^T + s (h B) A of the output head tied to a table with a low-rank update: of the table of `lora_embedding`.

    It is ``lora_linear(h, W, None, B^T, A^T, s)``, as shown at the top of this file, and calls that.

    Parameters
    ----------
    h : Tensor, shape (..., d)
    W : Tensor, shape (V, d)
    A : Tensor, shape (r, V)
    B : Tensor, shape (d, r)
    s : float
        From `scaling`.

    Returns
    -------
    Tensor, shape (..., V)

    Raises
    ------
    ShapeError
        If the shapes do not fit together.

    Notes
    -----
    The gradients of A and B come back transposed, which costs a copy of dA, r V numbers, in each backward.

    Examples
    --------
    >>> import numpy, minilora
    >>> W, A, B = numpy.zeros((3, 2)), numpy.array([[0.0, 1.0, 2.0]]), numpy.array([[1.0], [2.0]])
    >>> lora_head(minilora.tensor([[1.0, 10.0]], "float64"), W, A, B, s=0.5).data
    array([[ 0. , 10.5, 21. ]])
    """
    check_table("lora_head", W, A, B)
    return lora_linear(h, W, None, transpose(B), transpose(A), s)


def check_table(name: str, W: Any, A: Any, B: Any) -> None:
    """Raise `ShapeError` unless W (V, d), A (r, V) and B (d, r) fit together."""
    W_shape, A_shape, B_shape = shape_of(W), shape_of(A), shape_of(B)
    if len(W_shape) != 2:
        raise ShapeError(f"{name}: expected a table (V, d), got shape {W_shape}")
    V, d = W_shape
    if len(A_shape) != 2 or A_shape[1] != V or B_shape != (d, A_shape[0]):
        raise ShapeError(f"{name}: for a table {W_shape} expected A (r, {V}) and B ({d}, r), got A {A_shape} and B {B_shape}. "
                         f"Those of a linear layer (out, in) = {W_shape} are B^T and A^T: transpose both")
