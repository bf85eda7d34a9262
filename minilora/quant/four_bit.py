"""Weights in four bits, as QLoRA holds them."""

from __future__ import annotations

from typing import Any

from ..backend import cpu, device_of, to_device, to_host
from ..errors import ShapeError
from ..stored import Stored
from .blocks import decode, encode
from .codes import check_kind
from .packed import Packed
from .scales import GROUP, Compressed, compress, decompress

__all__ = ["FourBit"]

Array = Any


class FourBit(Packed):
    """A matrix as codes of four bits in blocks with one scale each; `of` makes one.

    Parameters
    ----------
    shape : tuple of two ints
    codes : array of uint8, (ceil(size / 2),)
        Two codes in a byte, the first in the high half; the numbers of the matrix row by row. Used as it is.
    absmax : array, (ceil(size / blocksize),)
        The blocks' scales: float32; with double quantisation uint8, and then the next two are given.
    nested_absmax : array of float32, (groups of 256 scales,), optional
    nested_offset : array of float32, (), optional
    kind : {"nf4", "fp4"}
    blocksize : int
    dtype : dtype
        In which it computes.

    Raises
    ------
    ConfigError
        If there is no such kind or blocksize.
    ShapeError
        If an array has another shape or dtype than these.

    Notes
    -----
    Bits a weight: 4 + 32 / 64 = 4.5 with blocks of 64, and with double quantisation 4 + 8 / 64 + 32 / (64 256) = 4.127.

    Examples
    --------
    >>> import numpy
    >>> W = FourBit.of(numpy.array([[1.0, -0.5], [0.25, 0.0]], "float32"))
    >>> W.dense()
    array([[ 1.        , -0.52507305],
           [ 0.2461123 ,  0.        ]], dtype=float32)
    """

    coarse = True

    def __init__(self, shape: tuple[int, ...], codes: Array, absmax: Array, nested_absmax: Array | None = None,
                 nested_offset: Array | None = None, *, kind: str = "nf4", blocksize: int = 64, dtype: Any = "float32") -> None:
        check_kind(kind, blocksize)
        super().__init__(shape, dtype)
        self.kind, self.blocksize = kind, int(blocksize)
        self.codes, self.absmax, self.nested_absmax, self.nested_offset = codes, absmax, nested_absmax, nested_offset
        self._check()

    @classmethod
    def of(cls, W: Array, kind: str = "nf4", blocksize: int = 64, *, double: bool = True, dtype: Any = None) -> FourBit:
        """A matrix in four bits, on its device.

        Parameters
        ----------
        W : array (rows, columns), or one held in low precision
        kind : {"nf4", "fp4"}
        blocksize : int
        double : bool
            Hold the scales in 8 bits, see `scales`.
        dtype : dtype, optional
            In which it computes; W's own by default.

        Raises
        ------
        StateError
            If a number is not finite.

        Notes
        -----
        Computed on the host. The codes and scales are those of bitsandbytes, to the last bit.
        """
        if W.ndim != 2:
            raise ShapeError(f"FourBit holds a matrix, got shape {tuple(W.shape)}: reshape it first")
        device = device_of(W)
        host = W if isinstance(W, Stored) and device is cpu else to_host(W)
        codes, absmax = encode(host, kind, blocksize)
        scales = compress(absmax) if double and len(absmax) else (absmax,)
        held = (to_device(array, device) for array in (codes, *scales))
        return cls(W.shape, *held, kind=kind, blocksize=blocksize, dtype=W.dtype if dtype is None else dtype)

    def like(self, W: Array) -> FourBit:
        """Another matrix, held as this one is."""
        return FourBit.of(W, self.kind, self.blocksize, double=self.double)

    def _check(self) -> None:
        blocks = -(-self.size // self.blocksize)
        wanted: dict[str, tuple[str, tuple[int, ...]]] = {
            "codes": ("uint8", (-(-self.size // 2),)), "absmax": ("float32", (blocks,))}
        if self.nested_absmax is not None or self.nested_offset is not None:
            wanted |= {"absmax": ("uint8", (blocks,)), "nested_absmax": ("float32", (-(-blocks // GROUP),)),
                       "nested_offset": ("float32", ())}
        lines = []
        for name, (dtype, shape) in wanted.items():
            array = getattr(self, name)
            if getattr(array, "shape", None) != shape or array.dtype != dtype:
                got = "nothing" if array is None else f"{array.dtype} {tuple(array.shape)}"
                lines.append(f"{name}: expected {dtype} {shape}, got {got}")
        if lines:
            raise ShapeError("\n  ".join([f"FourBit {self.shape} in blocks of {self.blocksize}:", *lines]))

    @property
    def double(self) -> bool:
        """Whether the scales are held in 8 bits."""
        return self.nested_absmax is not None

    def arrays(self) -> dict[str, Array]:
        held = {"": self.codes, "absmax": self.absmax}
        return {**held, "nested_absmax": self.nested_absmax, "nested_offset": self.nested_offset} if self.double else held

    def with_arrays(self, arrays: dict[str, Array]) -> FourBit:
        return FourBit(self.shape, arrays[""], *list(arrays.values())[1:], kind=self.kind, blocksize=self.blocksize,
                       dtype=self.dtype)

    def scales(self, start: int, stop: int) -> Array:
        """The scales of blocks start to stop - 1, float32 on the device."""
        if not self.double:
            return self.absmax[start:stop]
        return decompress(Compressed(self.absmax, self.nested_absmax, self.nested_offset), start, stop, self.device.xp)

    def decoded(self, start: int, stop: int) -> Array:
        columns, size = self.shape[1], self.blocksize
        low, high = start * columns, stop * columns
        first, last = low // size, -(-high // size)  # blocks may begin and end within a row
        numbers = decode(self.codes[first * size // 2:last * size // 2], self.scales(first, last), self.kind, size,
                         self.device.xp)
        return numbers.reshape(-1)[low - first * size:high - first * size].reshape(stop - start, columns)
