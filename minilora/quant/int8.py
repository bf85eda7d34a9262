"""Weights in 8 bits with one scale a row: the plainest kind."""

from __future__ import annotations

from typing import Any

import numpy

from ..backend import cpu, device_of, to_device, to_host
from ..errors import ShapeError, StateError
from .packed import Packed

__all__ = ["Int8Rows"]

Array = Any

MOST = 127.0  # -128 is not used: what has a code has its negative


class Int8Rows(Packed):
    """A matrix W as integers q and a scale a for each row; `of` makes one.

        a_k = largest |w_ki| of row k        q_ki = round(127 w_ki / a_k)        w_ki is then  q_ki a_k / 127

    so that w is at most a_k / 254 off: numbers from a normal distribution lose 1 % or less. One large number makes the steps
    of its row wide, which is why codes of fewer bits have blocks. No file holds this kind.

    Parameters
    ----------
    codes : array of int8, (rows, columns)
    steps : array of float32, (rows,)
        a / 127.
    dtype : dtype
        In which it computes.

    Raises
    ------
    ShapeError
        If the arrays do not fit.

    Examples
    --------
    >>> W = Int8Rows.of(numpy.array([[127.0, -49.6], [0.0, 0.0]], "float32"))
    >>> W.codes.tolist(), W.dense().tolist()
    ([[127, -50], [0, 0]], [[127.0, -50.0], [0.0, 0.0]])
    """

    kind = "int8"
    coarse = True

    def __init__(self, codes: Array, steps: Array, dtype: Any = "float32") -> None:
        if codes.ndim != 2 or codes.dtype != "int8" or steps.shape != codes.shape[:1] or steps.dtype != "float32":
            raise ShapeError("Int8Rows holds codes int8 (rows, columns) and steps float32 (rows,), got "
                             f"{codes.dtype} {tuple(codes.shape)} and {steps.dtype} {tuple(steps.shape)}")
        super().__init__(codes.shape, dtype)
        self.codes, self.steps = codes, steps

    @classmethod
    def of(cls, W: Array, *, dtype: Any = None) -> Int8Rows:
        """A matrix in 8 bits, on its device; computed on the host, some rows at a time.

        Raises
        ------
        StateError
            If a number is not finite.
        """
        if W.ndim != 2:
            raise ShapeError(f"Int8Rows holds a matrix, got shape {tuple(W.shape)}: reshape it first")
        device, host = device_of(W), W if device_of(W) is cpu else to_host(W)
        codes, steps = numpy.empty(W.shape, "int8"), numpy.empty(W.shape[0], "float32")
        rows = max(1, (1 << 16) // max(1, W.shape[1]))
        for low in range(0, W.shape[0], rows):
            some = host[low:low + rows].astype("float64")
            step = (numpy.abs(some).max(axis=1, initial=0.0) / MOST).astype("float32")
            if not numpy.isfinite(step).all():
                raise StateError("a weight with NaN or inf has no codes: every number of its row would be lost")
            steps[low:low + rows] = step
            some /= numpy.where(step > 0.0, step, 1.0)[:, None]
            codes[low:low + rows] = numpy.clip(numpy.rint(some), -MOST, MOST)
        return cls(to_device(codes, device), to_device(steps, device), W.dtype if dtype is None else dtype)

    def like(self, W: Array) -> Int8Rows:
        """Another matrix, held as this one is."""
        return Int8Rows.of(W)

    def arrays(self) -> dict[str, Array]:
        return {"": self.codes, "steps": self.steps}

    def with_arrays(self, arrays: dict[str, Array]) -> Int8Rows:
        return Int8Rows(arrays[""], arrays["steps"], self.dtype)

    def decoded(self, start: int, stop: int) -> Array:
        some = self.codes[start:stop].astype("float32")
        some *= self.steps[start:stop, None]
        return some
