"""Weights in 16 bits: float16, or bfloat16 as its bits."""

from __future__ import annotations

from typing import Any

from ..backend import device_of
from ..errors import DTypeError
from .packed import Packed

__all__ = ["Sixteen"]

Array = Any


class Sixteen(Packed):
    """A matrix held as float16 or bfloat16, exact when it is decoded: both are subsets of float32.

    Parameters
    ----------
    codes : array, shape (rows, columns)
        float16, or bfloat16 of the package ml_dtypes, or uint16 that are the bits of bfloat16; used as it is, also where it
        lies in a mapped file.
    dtype : dtype
        In which it computes.

    Raises
    ------
    DTypeError
        If the codes are of another dtype.

    Examples
    --------
    >>> import minilora, numpy
    >>> W = Sixteen(numpy.array([[0x3f80, 0x4000]], "uint16"))
    >>> W.dense(), W.nbytes
    (array([[1., 2.]], dtype=float32), 4)
    """

    def __init__(self, codes: Array, dtype: Any = "float32") -> None:
        name = codes.dtype.name
        if name not in ("float16", "bfloat16", "uint16"):
            raise DTypeError(f"Sixteen holds float16, bfloat16 or the bits of bfloat16 as uint16, got {name}: convert it with "
                             ".astype('float16')")
        super().__init__(codes.shape, dtype)
        self.kind = "float16" if name == "float16" else "bfloat16"
        self.codes = codes

    def arrays(self) -> dict[str, Array]:
        return {"": self.codes}

    def with_arrays(self, arrays: dict[str, Array]) -> Sixteen:
        return Sixteen(arrays[""], self.dtype)

    def decoded(self, start: int, stop: int) -> Array:
        some = self.codes[start:stop]
        if self.kind == "float16":
            return some.astype("float32")
        bits = some.view("uint16").astype("uint32")
        bits <<= 16  # bfloat16 is the upper half of float32
        return bits.view("float32")

    def take(self, places: Array, axis: int | None = 0, out: None = None, mode: str = "raise") -> Array:
        flat = device_of(self.codes).xp.take(self.codes, places.reshape(-1), axis=0)
        return Sixteen(flat, self.dtype).rows(0, len(flat)).reshape(*places.shape, self.shape[1])
