"""Half precision: an operation on float16 computes in float32, and rounds each of its results once.

float16 has 11 bits and ends at 65504: a square overflows from 256 on, and a sum stands still once it is 2048 times its next
term. So nothing is added up, squared or multiplied out in it. This holds for every operation, forward and backward, because
it is done around the operation and not in it: inputs are widened, outputs and gradients are rounded. What an operation
keeps for backward is kept as it is: its inputs in float16, what it made of them in float32.

Results of float32 are at most 2^-24 off for each addition that leads to them, and rounding to float16 costs 2^-11, once.
"""

from __future__ import annotations

import functools
from typing import Any

__all__ = ["in_single"]

Array = Any


def wide(a: Any) -> Any:
    """A float16 array as float32; anything else as it is."""
    return a.astype("float32") if getattr(a, "dtype", None) == "float16" else a


def narrow(a: Any) -> Any:
    """A float32 array as float16; anything else as it is."""
    return a.astype("float16") if getattr(a, "dtype", None) == "float32" else a


def kept_for(saved: Any, arrays: tuple[Any, ...], inputs: list[Any]) -> Any:
    """What to keep in the place of a saved array: the float16 input of which it is the widened copy, if it is one."""
    for a, x in zip(arrays, inputs):
        if saved is x:
            return a
        if x is not None and getattr(saved, "base", None) is x:
            return narrow(saved)  # a view of the copy: nothing is lost
    return saved


@functools.cache
def in_single(version: Any) -> Any:
    """The version of an operation for float16 arrays: a subclass that computes in float32."""

    class InSingle(version):  # type: ignore[misc]
        saved: tuple[Any, ...]
        reference = version.reference or version  # it goes by that name in a ledger

        def forward(self, *arrays: Array) -> Array:
            if self.moves:
                return super().forward(*arrays)
            inputs = [wide(a) for a in arrays]
            y = super().forward(*inputs)
            self.saved = tuple(kept_for(a, arrays, inputs) for a in self.saved)
            return narrow(y)

        def backward(self, dy: Array) -> tuple[Array | None, ...]:
            kept, self.saved = self.saved, tuple(wide(a) for a in self.saved)
            try:
                return tuple(narrow(dx) for dx in super().backward(wide(dy)))
            finally:
                self.saved = kept

        def into(self, i: int) -> Array | None:
            return None  # that place is float16

    InSingle.__name__ = version.__name__
    return InSingle
