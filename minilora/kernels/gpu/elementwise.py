"""GPU: activations, dropout and optimizers, one kernel each way. The CUDA text is elementwise.cu."""

from __future__ import annotations

import math
from typing import Any

import numpy

from ...backend import override
from ...ops.activation import GELU, ExactGELU, SiLU
from ...ops.dropout import Dropout
from ...optim.adam import adam_update
from ...optim.sgd import sgd_update
from ..launch import TYPES, by_element, contiguous, has_kernel

__all__ = ["FusedDropout", "FusedExactGELU", "FusedGELU", "FusedSiLU", "adam_update_fused", "sgd_update_fused"]

Array = Any


@override(adam_update, device="gpu")
def adam_update_fused(theta: Array, g: Array, m: Array, v: Array, beta1: float, beta2: float, size: float, eps: float,
                      keep: float) -> None:
    """`adam_update` as one kernel: the reference starts eleven."""
    if theta.dtype.char not in TYPES:
        return adam_update(theta, g, m, v, beta1, beta2, size, eps, keep)
    if size.__class__ is theta.__class__:  # in a recorded step: arrays of the device
        numbers: tuple[Any, ...] = 0.0, 0.0, 0.0, size, eps, keep
    else:
        numbers = float(size), float(eps), float(keep), None, None, None
    by_element("elementwise", "adam", theta.size, theta.dtype, theta, g, m, v, theta.size, beta1, beta2, *numbers)


@override(sgd_update, device="gpu")
def sgd_update_fused(theta: Array, g: Array, v: Array | None, lr: float, momentum: float, weight_decay: float) -> None:
    """`sgd_update` as one kernel: the reference starts two to six."""
    if theta.dtype.char not in TYPES:
        return sgd_update(theta, g, v, lr, momentum, weight_decay)
    of_device = lr.__class__ is theta.__class__  # in a recorded step
    by_element("elementwise", "sgd", theta.size, theta.dtype, theta, g, v, theta.size, 0.0 if of_device else float(lr),
               momentum, weight_decay, lr if of_device else None)


def fours(n: int) -> int:
    """The threads for n numbers, four by each."""
    return -(-n // 4)


def _activate(op: Any, kernel: str, x: Array) -> Array:
    """One kernel for an operation on every element that keeps its input."""
    op.save(x)
    (x,) = contiguous(op.xp, x)
    y = op.xp.empty_like(x)
    by_element("elementwise", kernel, fours(x.size), x.dtype, x, y, x.size)
    return y


def _differentiate(op: Any, kernel: str, dy: Array) -> tuple[Array | None, ...]:
    x, dy = contiguous(op.xp, *op.saved, dy)
    dx = op.xp.empty_like(x)
    by_element("elementwise", kernel, fours(x.size), x.dtype, x, dy, dx, x.size)
    return (dx,)


@override(GELU, device="gpu")
class FusedGELU(GELU):
    """`GELU` with one kernel each way."""

    def forward(self, x: Array) -> Array:
        if not has_kernel(x):
            self.kernel = ""
            return super().forward(x)
        return _activate(self, "gelu", x)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        return _differentiate(self, "gelu_backward", dy) if has_kernel(dy, *self.saved) else super().backward(dy)


@override(ExactGELU, device="gpu")
class FusedExactGELU(ExactGELU):
    """`ExactGELU` with one kernel each way, computed with the table of ops/erf.py."""

    def forward(self, x: Array) -> Array:
        if not has_kernel(x):
            self.kernel = ""
            return super().forward(x)
        return _activate(self, "exact_gelu", x)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        return _differentiate(self, "exact_gelu_backward", dy) if has_kernel(dy, *self.saved) else super().backward(dy)


@override(SiLU, device="gpu")
class FusedSiLU(SiLU):
    """`SiLU` with one kernel each way."""

    def forward(self, x: Array) -> Array:
        if not has_kernel(x):
            self.kernel = ""
            return super().forward(x)
        return _activate(self, "silu", x)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        return _differentiate(self, "silu_backward", dy) if has_kernel(dy, *self.saved) else super().backward(dy)


@override(Dropout, device="gpu")
class FusedDropout(Dropout):
    """`Dropout` whose mask is one kernel: the same bits as the reference's hundred."""

    def _mask(self, like: Array) -> Array:
        if like.dtype.char not in TYPES:
            self.kernel = ""
            return super()._mask(like)
        mask = self.xp.empty(like.shape, dtype=like.dtype)
        threshold = numpy.uint32(math.ceil(self.p * 2 ** 24))
        step = (numpy.uint64(self.step), None) if isinstance(self.step, int) else (numpy.uint64(0), self.step)
        by_element("elementwise", "dropout_mask", fours(mask.size), mask.dtype, mask, mask.size, numpy.uint64(self.seed),
                   step[0], threshold, 1.0 / (1.0 - self.p), step[1])
        return mask
