"""The gradient of low-rank updates of a fused projection, derived by hand: several layers that share one matrix.

A fused projection computes L slots of one input at once, such as query, key and value (L = 3), with the weights of the slots
stacked into one W. Each of the m enabled slots has an update of its own; the others have none.

Shapes: x (N, in), W (out, in), b (out), A (m r, in), B (m o, r), y (N, out), o = out / L, s a number. L and m are counts here;
the loss is called loss, dy = dloss/dy. The e-th enabled slot, e = 0 ... m - 1, owns the rows e r to (e + 1) r of A, called A_e,
and the rows e o to (e + 1) o of B, called B_e.

Forward, element by element (n a row, l a slot, k an output of it, i an input, j a rank of the e-th enabled slot):

    z_nej = sum_i x_ni A_eji
    y_nlk = sum_i x_ni W_lki + b_lk + s sum_j z_nej B_ekj          the last term only if l is enabled, as the e-th

Backward: every path from a letter to the loss goes through y, so sum dy over the y's that the letter meets.

    B_ekj meets y_nlk of its own slot l, in every row n:       dB_ekj = sum_n dy_nlk s z_nej
    z_nej meets y_nlk of that slot alone, in every k:          dz_nej = s u_nej, where u_nej = sum_k dy_nlk B_ekj
    A_eji meets z_nej in every row n:                          dA_eji = sum_n dz_nej x_ni = s sum_n u_nej x_ni
    x_ni meets every y_nlk and every z_nej:                    dx_ni = sum_l sum_k dy_nlk W_lki + s sum_e sum_j u_nej A_eji

Gathered into matrices, with y_l and dy_l (N, o) the columns of slot l, and z_e and u_e (N, r) those of e in z and u:

    z = x A^T                  (N, m r)    one product for all slots; kept: makes each dB_e one product
    y = x W^T + b              then y_l += s z_e B_e^T for every enabled slot
    u_e = dy_l B_e             (N, r)      the columns of u (N, m r)
    dB_e = s dy_l^T z_e        (o, r)      the rows of dB (m o, r)
    dA = s u^T x               (m r, in)   one product for all slots
    dx = dy W + s u A          (N, in)     one product for all slots; dW is never formed

Only u_e, dB_e and y_l know slots. The delta is D = s B' A, with B' (out, m r) block-diagonal: B_e in the rows of its slot and
the columns of its ranks, and 0 elsewhere (`block_diagonal`). So this is the layer of `gradient` with B' for B, without the
products with zeros, which would be m times as many; and with G = dy^T x, the gradient of the merged weight, and G_l its rows of
slot l, dA_e = s B_e^T G_l and dB_e = s G_l A_e^T. The tests use both as independent checks. With L = m = 1 it is that layer.

With dropout on the adapter's input the two branches read different arrays, as in `gradient`: the frozen one is `ops.linear`,
the other one `LoRAMergedUpdate`.

Source: Hu et al. 2021, arXiv 2106.09685, and its repository microsoft/LoRA (MergedLinear), which writes the blocks as a
convolution with m groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ...backend import add_matmul, device_of
from ...engine import Op, apply, shape_of
from ...errors import ConfigError, ShapeError
from ...ops.linear import check_linear, rows, unrows
from ...tensor import Tensor
from ..gradient import scaled

__all__ = ["LoRAMergedLinear", "LoRAMergedUpdate", "block_diagonal", "lora_merged_linear", "lora_merged_update"]

Array = Any


class Slot(NamedTuple):
    """What belongs to one enabled slot: columns of y (rows of W and B'), rows of B, and columns of z and u (rows of A)."""

    outputs: slice
    rows: slice
    ranks: slice


class InSlots(Op):
    """What both operations share: their settings, and the two products of backward that know slots."""

    rounds = True
    s: float
    slots: Sequence[Slot]
    in_shape: tuple[int, ...]

    def gradient_of_z(self, dy: Array, B: Array) -> Array:
        """u (N, m r): dL/dz without s."""
        u = self.xp.empty((len(dy), B.shape[1] * len(self.slots)), dtype=dy.dtype)
        for slot in self.slots:
            # matmul takes a view of columns as it is; NumPy's dot would copy it (measured: half as fast).
            u[:, slot.ranks] = self.xp.matmul(dy[:, slot.outputs], B[slot.rows])
        return u

    def gradient_of_B(self, dy: Array, z: Array) -> Array:
        """dB, block by block; into the place that waits for it, if there is one."""
        dB, r = self.into(len(self.needs) - 1), z.shape[1] // len(self.slots)
        if dB is None:
            dB = self.xp.empty((self.slots[-1].rows.stop, r), dtype=dy.dtype)
        z = scaled(z, self.s)
        for slot in self.slots:  # dot would copy the view of dy^T, element by element (measured: over 20 times slower)
            self.xp.matmul(dy[:, slot.outputs].T, z[:, slot.ranks], out=dB[slot.rows])
        return dB


class LoRAMergedLinear(InSlots):
    """y = x W^T + b, then y_l += s z_e B_e^T for every enabled slot; the gradients are derived at the top of this file.

    Keeps x and z: N (in + m r) numbers. As in `LoRALinear`, what is frozen costs nothing: without a trained W or A, x is not
    kept; below the first trained layer dx is not computed.
    """

    def forward(self, x: Array, W: Array, b: Array | None, A: Array, B: Array) -> Array:
        needs_x, needs_W, _, needs_A, needs_B = self.needs
        self.in_shape = x.shape
        x, dot = rows(x), self.dot
        z = dot(x, A.T)
        y = dot(x, W.T)
        if b is not None:
            y += b
        for slot in self.slots:
            add_matmul(y[:, slot.outputs], z[:, slot.ranks], B[slot.rows].T, self.s)
        self.save(x if needs_A or needs_W else None, z if needs_B else None,
                  W if needs_x else None, A if needs_x else None, B if needs_x or needs_A else None)
        return unrows(y, self.in_shape)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        needs_x, needs_W, needs_b, needs_A, needs_B = self.needs
        x, z, W, A, B = self.saved
        dx = dW = db = dA = dB = None
        dy, dot = rows(dy), self.dot
        if needs_B:
            dB = self.gradient_of_B(dy, z)
        if needs_A or needs_x:
            u = self.gradient_of_z(dy, B)
        if needs_A:
            dA = dot(scaled(u, self.s).T, x, out=self.into(3))
        if needs_x:
            dx = dot(dy, W)
            add_matmul(dx, u, A, self.s)
            dx = dx.reshape(self.in_shape)
        if needs_W:  # only if somebody trains the base beside the adapter: the same as in ops.Linear
            dW = dot(dy.T, x, out=self.into(1))
        if needs_b:
            db = dy.sum(axis=0, out=self.into(2))
        return dx, dW, db, dA, dB


class LoRAMergedUpdate(InSlots):
    """y_l = s z_e B_e^T in every enabled slot and 0 in the others: the update alone, the terms with s of the derivation.

    What stands beside a frozen projection of another input, as with dropout. Keeps x and z: N (in + m r) numbers.
    """

    outputs: int

    def forward(self, x: Array, A: Array, B: Array) -> Array:
        needs_x, needs_A, needs_B = self.needs
        self.in_shape = x.shape
        x = rows(x)
        z = self.dot(x, A.T)
        y, sz = self.xp.zeros((len(x), self.outputs), dtype=x.dtype), scaled(z, self.s)
        for slot in self.slots:
            y[:, slot.outputs] = self.xp.matmul(sz[:, slot.ranks], B[slot.rows].T)
        self.save(x if needs_A else None, z if needs_B else None, A if needs_x else None, B if needs_x or needs_A else None)
        return unrows(y, self.in_shape)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        needs_x, needs_A, needs_B = self.needs
        x, z, A, B = self.saved
        dx = dA = dB = None
        dy = rows(dy)
        if needs_B:
            dB = self.gradient_of_B(dy, z)
        if needs_A or needs_x:
            su = scaled(self.gradient_of_z(dy, B), self.s)
        if needs_A:
            dA = self.dot(su.T, x, out=self.into(1))
        if needs_x:
            dx = self.dot(su, A).reshape(self.in_shape)
        return dx, dA, dB


def lora_merged_linear(x: Any, W: Any, b: Any, A: Any, B: Any, s: float, enable_lora: Sequence[bool]) -> Tensor:
    """x W^T + b on the last axis of x, with a low-rank update in each enabled slot of the outputs; see `LoRAMergedLinear`.

    Parameters
    ----------
    x : Tensor, shape (..., in)
    W : Tensor, shape (out, in)
        The weights of L slots of out / L outputs each, stacked.
    b : Tensor, shape (out,), or None
    A : Tensor, shape (m r, in)
        m is the number of enabled slots; r rows for each, in the order of the slots.
    B : Tensor, shape (m out / L, r)
        out / L rows for each enabled slot.
    s : float
        From `scaling`, with the r of one slot.
    enable_lora : sequence of L bools
        Which slots have an update: ``(True, False, True)`` for query and value of a fused query-key-value projection.

    Returns
    -------
    Tensor, shape (..., out)

    Raises
    ------
    ConfigError
        If enable_lora is not a sequence of bools, enables nothing, or does not divide the outputs evenly.
    ShapeError
        If the shapes do not fit together.

    Examples
    --------
    >>> import numpy, minilora
    >>> W, A, B = numpy.zeros((3, 2)), numpy.array([[1.0, 0.0], [0.0, 1.0]]), numpy.array([[2.0], [4.0]])
    >>> x = minilora.tensor([[1.0, 10.0]], "float64")
    >>> lora_merged_linear(x, W, None, A, B, s=0.5, enable_lora=(True, False, True)).data
    array([[ 1.,  0., 20.]])
    """
    check_linear(x, W, b)
    out, n_in = shape_of(W)
    return apply(LoRAMergedLinear, x, W, b, A, B, s=s,
                 slots=slots_of("lora_merged_linear", enable_lora, out, n_in, shape_of(A), shape_of(B)))


def lora_merged_update(x: Any, A: Any, B: Any, s: float, enable_lora: Sequence[bool], out: int) -> Tensor:
    """The update of `lora_merged_linear` alone, (..., out), with 0 in the slots that have none; see `LoRAMergedUpdate`.

    Examples
    --------
    >>> import numpy, minilora
    >>> A, B = numpy.array([[1.0, 0.0], [0.0, 1.0]]), numpy.array([[2.0], [4.0]])
    >>> lora_merged_update(minilora.tensor([[1.0, 10.0]], "float64"), A, B, 0.5, (True, False, True), out=3).data
    array([[ 1.,  0., 20.]])
    """
    check_linear(x, A, None)
    slots = slots_of("lora_merged_update", enable_lora, out, shape_of(x)[-1], shape_of(A), shape_of(B))
    return apply(LoRAMergedUpdate, x, A, B, s=s, slots=slots, outputs=int(out))


def block_diagonal(A: Any, B: Any, s: float, enable_lora: Sequence[bool], out: int) -> tuple[Array, Array, float]:
    """Factors (A', B', s) of the whole update, D = s B' A' (out, in), as one ordinary LoRA of rank m r: for merging and export.

    B' has B_e in the rows of its slot and the columns of its ranks, and 0 elsewhere; rows of slots without an update are 0.

    Parameters
    ----------
    A : array or Tensor, shape (m r, in)
    B : array or Tensor, shape (m out / L, r)
    s : float
    enable_lora : sequence of L bools
        As in `lora_merged_linear`.
    out : int

    Returns
    -------
    A' : array, shape (m r, in)
        A itself, not a copy.
    B' : array, shape (out, m r)
    s : float

    Raises
    ------
    ConfigError, ShapeError
        As `lora_merged_linear`.

    Examples
    --------
    >>> import numpy
    >>> A, B = numpy.array([[1.0, 0.0], [0.0, 1.0]]), numpy.array([[2.0], [4.0]])
    >>> A_whole, B_whole, s = block_diagonal(A, B, 0.5, (True, False, True), out=3)
    >>> B_whole
    array([[2., 0.],
           [0., 0.],
           [0., 4.]])
    """
    A, B = (factor.data if isinstance(factor, Tensor) else factor for factor in (A, B))
    slots = slots_of("block_diagonal", enable_lora, out, None, shape_of(A), shape_of(B))
    whole = device_of(B).xp.zeros((out, len(A)), dtype=B.dtype)
    for slot in slots:
        whole[slot.outputs, slot.ranks] = B[slot.rows]
    return A, whole, s


def slots_of(name: str, enable_lora: Sequence[bool], out: int, n_in: int | None, A: tuple[int, ...],
             B: tuple[int, ...]) -> list[Slot]:
    """The enabled slots in order, if A and B of these shapes fit them; else `ConfigError` or `ShapeError`."""
    if not isinstance(enable_lora, (tuple, list)) or not all(type(on) is bool for on in enable_lora):
        raise ConfigError(f"{name}: enable_lora must be a tuple of True and False, one for each slot, got {enable_lora!r}")
    enabled = [i for i, on in enumerate(enable_lora) if on]
    L, m = len(enable_lora), len(enabled)
    if not m:
        raise ConfigError(f"{name}: enable_lora={enable_lora!r} enables none of its {L} slots: nothing would ever train. For a "
                          "layer without an update call ops.linear")
    if out % L:
        raise ConfigError(f"{name}: enable_lora={enable_lora!r} has {L} slots, which do not divide the {out} outputs evenly: "
                          "give one bool for each of the layers that the weight was fused from")
    o = out // L
    r = B[1] if len(B) == 2 else None
    if len(A) != 2 or n_in not in (None, A[1]) or r is None or A[0] != m * r or B[0] != m * o:
        weight = f"{out} outputs" if n_in is None else f"a weight {(out, n_in)}"
        raise ShapeError(f"{name}: for {weight} in {L} slots of {o}, {m} of them enabled, expected A ({m} r, "
                         f"{'in' if n_in is None else n_in}) and B ({m * o}, r), got A {A} and B {B}. Factors of one LoRA over "
                         "all outputs, B (out, r), belong to lora_linear")
    return [Slot(outputs=slice(i * o, (i + 1) * o), rows=slice(e * o, (e + 1) * o), ranks=slice(e * r, (e + 1) * r))
            for e, i in enumerate(enabled)]
