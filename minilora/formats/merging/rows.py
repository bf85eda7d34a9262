"""What becomes of a tensor besides a low-rank update, in the words of `lora.merging.arithmetic.Rows`.

The way back predicts the original from what was written: exactly where nothing changed, so that only what did is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy

__all__ = ["Kept", "Placed", "Whole"]

NOTHING = numpy.zeros((0, 0), "float32")


class Kept:
    """The numbers as they are; what changes is their dtype."""

    parts: Mapping[str, Any] = {}
    kappa = None

    def rows(self, low: int, high: int) -> numpy.ndarray:
        return NOTHING

    def onto(self, w: numpy.ndarray, d: numpy.ndarray, low: int, high: int) -> numpy.ndarray:
        return w

    def off(self, m: numpy.ndarray, d: numpy.ndarray, low: int, high: int) -> numpy.ndarray:
        return m

    def fingerprint(self) -> bytes:
        return b""


class Placed(Kept):
    """Some rows of a table in the place of the base's (`trainable_token_indices`)."""

    def __init__(self, indices: tuple[int, ...], rows: numpy.ndarray) -> None:
        self.parts = {"rows": rows}
        self.indices, self.given = numpy.array(indices, "int64"), rows

    def onto(self, w: numpy.ndarray, d: numpy.ndarray, low: int, high: int) -> numpy.ndarray:
        here = (self.indices >= low) & (self.indices < high)
        if not here.any():
            return w
        x = w.copy()
        x[self.indices[here] - low] = self.given[here].astype(w.dtype)
        return x


class Whole(Kept):
    """Another array of the same shape."""

    def __init__(self, array: numpy.ndarray) -> None:
        self.parts, self.array = {"array": array}, array

    def onto(self, w: numpy.ndarray, d: numpy.ndarray, low: int, high: int) -> numpy.ndarray:
        return numpy.ascontiguousarray(self.array[low:high]).astype(w.dtype)
