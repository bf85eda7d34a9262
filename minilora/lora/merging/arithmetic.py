"""The update D = s B A of one weight, block of rows by block of rows, the same to the last bit every time.

No BLAS promises that: the order in which it sums may change with the number of threads, the shape and the machine. Here D is r
updates of rank 1, s B_j times A_j for j = 0, 1, ..., each an elementwise product and an elementwise sum. IEEE arithmetic
leaves those no choice, whatever the blocks, the threads or the processor. It is the D of `gradient.delta` up to the rounding of
its sums. The price is 2 r passes over a block in the cache, where BLAS makes one over the memory.

With DoRA the rows (or columns) of W are stretched besides: W' = kappa W + D, see `layers.update`; back, W = (W' - D) / kappa.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy

from ...errors import ConfigError, DeviceError, DTypeError, ShapeError

__all__ = ["Dense", "Factored", "Rows", "Update", "blocks", "bytes_of", "rows_of_block", "update_rows", "wide_dtype"]

Array = Any

# Elements of a block of rows: D, its scratch, the sum and the float64 copies of a report stay in a second-level cache.
BLOCK = 1 << 15
_WIDE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


class Update(NamedTuple):
    """W' = kappa W + s B A of a stored weight, as `weight.merge_weight` takes it; without kappa W' = W + s B A."""

    A: numpy.ndarray
    B: numpy.ndarray
    s: float
    kappa: numpy.ndarray | None = None  # (out, 1) or (1, in)


def wide_dtype(name: str, array: Array) -> str:
    """The dtype to compute in. Raise unless `array` is a host array of floating-point numbers."""
    if not isinstance(array, numpy.ndarray):
        raise DeviceError(f"merge: {name} must be a host array (numpy.ndarray), got {type(array).__name__}: move it with "
                          "minilora.to_host(array) first")
    if array.dtype.name not in _WIDE:
        raise DTypeError(f"merge: {name} must be one of {', '.join(_WIDE)}, got {array.dtype}")
    if array.ndim != 2:
        raise ShapeError(f"merge: {name} must have two axes, got shape {array.shape}")
    return _WIDE[array.dtype.name]


def rows_of_block(shape: tuple[int, ...]) -> int:
    return max(1, BLOCK // max(1, shape[1]))


def blocks(shape: tuple[int, ...], rows: int) -> Iterator[tuple[int, int]]:
    return ((low, min(low + rows, shape[0])) for low in range(0, shape[0], rows))


def bytes_of(array: numpy.ndarray) -> Any:
    return array.reshape(-1).view(numpy.uint8)  # bfloat16 offers hashlib no buffer of its own


class Rows(Protocol):
    """What is to become of a weight, block of rows by block of rows, and the way back. All in the wide dtype.

    Attributes
    ----------
    parts : mapping of str to array
        What it consists of, for messages.
    kappa : array or None
        What the weight is multiplied by.
    """

    @property
    def parts(self) -> Any: ...

    @property
    def kappa(self) -> Any: ...

    def rows(self, low: int, high: int) -> numpy.ndarray: ...

    def onto(self, w: numpy.ndarray, d: numpy.ndarray, low: int, high: int) -> numpy.ndarray: ...

    def off(self, m: numpy.ndarray, d: numpy.ndarray, low: int, high: int) -> numpy.ndarray: ...

    def fingerprint(self) -> bytes: ...


class Factored:
    """D = s B A, a block of rows at a time, by rank-1 updates in a fixed order; with kappa (out, 1) or (1, in), or None."""

    def __init__(self, A: Array, B: Array, s: float, shape: tuple[int, ...], wide: str, kappa: Array | None = None) -> None:
        wide_dtype("A", A), wide_dtype("B", B)
        s = s.item() if isinstance(s, numpy.generic) else s
        if isinstance(s, bool) or not isinstance(s, (int, float)) or not abs(s) <= sys.float_info.max:
            raise ConfigError(f"merge: the scaling must be a finite number, got {s!r}")
        if (B.shape[0], A.shape[1]) != shape or A.shape[0] != B.shape[1]:
            raise ShapeError(f"merge: for a weight {shape} expected A (r, {shape[1]}) and B ({shape[0]}, r), got A {A.shape} "
                             f"and B {B.shape}")
        self.parts = {"lora_A": A, "lora_B": B}
        self.A, self.B, self.s = numpy.ascontiguousarray(A, wide), numpy.ascontiguousarray(B, wide), float(s)
        self.kappa = None if kappa is None else numpy.broadcast_to(numpy.asarray(kappa, wide), shape)
        self.divisor = None if kappa is None else numpy.broadcast_to(numpy.where(kappa == 0, 1, kappa).astype(wide), shape)

    def rows(self, low: int, high: int) -> numpy.ndarray:
        d = numpy.zeros((high - low, self.A.shape[1]), self.A.dtype)
        t = numpy.empty_like(d)
        for column, row in zip((self.s * self.B[low:high]).T, self.A):
            d += numpy.multiply(column[:, None], row, out=t)
        return d

    def onto(self, w: numpy.ndarray, d: numpy.ndarray, low: int, high: int) -> numpy.ndarray:
        """A block of W in the wide dtype, with the update, whose rows are `d`."""
        return w + d if self.kappa is None else w * self.kappa[low:high] + d  # type: ignore[no-any-return]

    def off(self, m: numpy.ndarray, d: numpy.ndarray, low: int, high: int) -> numpy.ndarray:
        """The way back from a block of W' in the wide dtype, up to rounding. Where kappa is 0 nothing leads back."""
        back = m - d
        # 0 / 0 would do on one machine, but the bits of NaN are not the same on all.
        return back if self.divisor is None else back / self.divisor[low:high]  # type: ignore[no-any-return]

    def fingerprint(self) -> bytes:
        text = f"s B A {self.A.dtype} {self.A.shape} {self.B.shape} {self.s.hex()}"
        digest = hashlib.sha256(text.encode() + self.A.tobytes() + self.B.tobytes())
        if self.kappa is not None:
            digest.update(b"kappa" + self.kappa[:, :1].tobytes() + self.kappa[:1].tobytes())
        return digest.digest()


class Dense:
    """D as it was given."""

    kappa = None

    def __init__(self, D: Array, shape: tuple[int, ...], wide: str) -> None:
        wide_dtype("D", D)
        if D.shape != shape:
            raise ShapeError(f"merge: for a weight {shape} expected an update of the same shape, got {D.shape}")
        self.parts, self.D, self.wide = {"D": D}, D, wide

    def rows(self, low: int, high: int) -> numpy.ndarray:
        return numpy.ascontiguousarray(self.D[low:high], self.wide)

    def onto(self, w: numpy.ndarray, d: numpy.ndarray, low: int, high: int) -> numpy.ndarray:
        return w + d  # type: ignore[no-any-return]

    def off(self, m: numpy.ndarray, d: numpy.ndarray, low: int, high: int) -> numpy.ndarray:
        return m - d  # type: ignore[no-any-return]

    def fingerprint(self) -> bytes:
        digest = hashlib.sha256(f"D {self.wide} {self.D.shape}".encode())
        for low, high in blocks(self.D.shape, rows_of_block(self.D.shape)):
            digest.update(bytes_of(self.rows(low, high)))
        return digest.digest()


def update_rows(update: Any, shape: tuple[int, ...], wide: str) -> Factored | Dense:
    if isinstance(update, tuple):
        A, B, s, *kappa = update
        return Factored(A, B, s, shape, wide, *kappa)
    return Dense(update, shape, wide)
