"""GPU: low-rank updates of a fused projection by the kernels of low_rank.cu, which know slots, and by stacks of products."""

from __future__ import annotations

from typing import Any

from ...backend import override
from ...lora.gradients.fused import LoRAMergedLinear, LoRAMergedUpdate
from ...ops.linear import rows, unrows
from ..launch import has_kernel
from .linear import with_bias
from .low_rank import Slots, beside_weight, had_kernels, update_alone, updated

__all__ = ["FusedLoRAMergedLinear", "FusedLoRAMergedUpdate"]

Array = Any

MOST_SLOTS = 62  # bits of a positive long long


def slots_of(op: Any) -> Slots:
    """What the kernels are told about the slots of an operation."""
    width = op.slots[0].rows.stop - op.slots[0].rows.start
    return Slots(sum(1 << slot.outputs.start // width for slot in op.slots), len(op.slots), width)


def has_kernels(op: Any, x: Array, A: Array, B: Array) -> bool:
    """Whether x has a dtype of the kernels, and anything is to be computed; if not, `op` is the reference's.

    Any rank will do: from 17 on cuBLAS makes all products, and the slots are stacks of them.
    """
    found = B.size > 0 and has_kernel(x, A, B) and op.slots[-1].outputs.stop <= MOST_SLOTS * op.slots[0].rows.stop
    if not found:
        op.kernel = ""
    return found


@override(LoRAMergedLinear, device="gpu")
class FusedLoRAMergedLinear(LoRAMergedLinear):
    """`LoRAMergedLinear` with the launches of `low_rank.FusedLoRALinear`, whatever the number of slots.

    Forward:  y = x W^T + b, then all z_e = x A_e^T and y_l += s z_e B_e^T in one launch.
    Backward: all u_e = dy_l B_e and dB_e = s dy_l^T z_e in one launch; dA = s u^T x and dx += s u A, in which the ranks of all
    slots count together, in one, or from 17 of them on in a product of cuBLAS each.
    """

    def forward(self, x: Array, W: Array, b: Array | None, A: Array, B: Array) -> Array:
        if not has_kernels(self, x, A, B):
            return super().forward(x, W, b, A, B)
        needs_x, needs_W, _, needs_A, needs_B = self.needs
        self.in_shape = x.shape
        x = rows(x)
        y = with_bias(self.xp, x, W, b)
        if y is None:
            y = self.dot(x, W.T)
            if b is not None:
                y += b
        z = updated(self.xp, x, A, B, None, self.s, y, True, slots_of(self))
        self.save(x if needs_A or needs_W else None, z if needs_B else None,
                  W if needs_x else None, A if needs_x else None, B if needs_x or needs_A else None)
        return unrows(y, self.in_shape)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        _, z, *_, B = self.saved
        return beside_weight(self, dy, slots_of(self)) if had_kernels(self, dy, z, B) else super().backward(dy)


@override(LoRAMergedUpdate, device="gpu")
class FusedLoRAMergedUpdate(LoRAMergedUpdate):
    """`LoRAMergedUpdate` by the same kernels: one launch forward, and one that writes zeros where a slot has no update."""

    def forward(self, x: Array, A: Array, B: Array) -> Array:
        if not has_kernels(self, x, A, B):
            return super().forward(x, A, B)
        needs_x, needs_A, needs_B = self.needs
        self.in_shape, slots = x.shape, slots_of(self)
        x = rows(x)
        empty = self.xp.empty if slots.enabled * slots.width == self.outputs else self.xp.zeros
        y = empty((len(x), self.outputs), dtype=x.dtype)
        z = updated(self.xp, x, A, B, None, self.s, y, False, slots)
        self.save(x if needs_A else None, z if needs_B else None, A if needs_x else None, B if needs_x or needs_A else None)
        return unrows(y, self.in_shape)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        _, z, _, B = self.saved
        return update_alone(self, dy, slots_of(self)) if had_kernels(self, dy, z, B) else super().backward(dy)
