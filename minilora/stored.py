"""Stored: a frozen matrix that is held in low precision, and computed with in full precision, some rows at a time.

For an operation it is one of its arrays: it has a shape, the dtype in which it computes, rows, a transpose, and a device. What
it has not is a value that could be written, or one as a whole: `rows` makes some of it, `dense` all of it. So W needs as much
memory as its kind takes, and a product with it, `Op.dot`, one tile besides:

    y = x W^T        y[:, tile] = x W[tile]^T                W[tile] is decoded, used and dropped
    dx = dy W        dx = sum over tiles of dy[:, tile] W[tile]        and decoded again here: it is kept nowhere

The kinds (16 bits, 8 bits, 4 bits) are in `quant`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy

if TYPE_CHECKING:
    from .device import Device

__all__ = ["Stored", "dense"]

Array = Any
S = TypeVar("S", bound="Stored")

TILE = 1 << 20  # numbers that are decoded at a time: 4 MB of float32; a product with fewer rows of W wastes BLAS


class Stored:
    """A read-only matrix W (rows, columns) in low precision.

    A kind of storage defines `kind`, `arrays`, `decoded`, `with_arrays` and `device`. One that also defines `reshape` may have
    more axes: the kernels of a convolution, whose rows are kernels; products are of matrices.

    Parameters
    ----------
    shape : tuple of ints
        Two or more.
    dtype : dtype
        In which it computes: that of the arrays that it is multiplied with.

    Attributes
    ----------
    kind : str
        ``"bfloat16"``, ``"nf4"`` ...
    """

    kind: str
    by_columns = False  # whether what is held lies in that order
    base: Stored | None = None  # of a view: what it looks at, as arrays have it
    # NumPy asks this before it takes over `array * stored`: with None it raises, and does not decode silently.
    __array_ufunc__ = None

    def __init__(self, shape: tuple[int, ...], dtype: Any = "float32") -> None:
        self.shape = tuple(int(length) for length in shape)
        self.dtype = numpy.dtype(dtype)

    # -- what a kind defines ----------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, Array]:
        """What is held: arrays by the ending of their names in a state dict; ``""`` names the codes themselves."""
        raise NotImplementedError(f"{type(self).__name__}.arrays")

    def with_arrays(self: S, arrays: dict[str, Array]) -> S:
        """Another one of the same kind, shape and dtype that holds these, which have the shapes and dtypes of `arrays`."""
        raise NotImplementedError(f"{type(self).__name__}.with_arrays")

    def decoded(self, start: int, stop: int) -> Array:
        """Rows start to stop - 1 as an array of floats on the device: a new one, or a read-only view."""
        raise NotImplementedError(f"{type(self).__name__}.decoded")

    @property
    def device(self) -> Device:
        raise NotImplementedError(f"{type(self).__name__}.device")

    # -- an array, as far as operations need one ----------------------------------------------------------------------

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(int(array.nbytes) for array in self.arrays().values())

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def T(self) -> Stored:
        return Transposed(self)

    def transpose(self, axes: Any = None) -> Stored:
        return self if axes is not None and tuple(axes) == (0, 1) else self.T

    def astype(self, dtype: Any, copy: bool = True) -> Stored:
        """The same numbers, held as they are, that compute in another dtype: nothing is copied."""
        if numpy.dtype(dtype) == self.dtype:
            return self
        other = self.with_arrays(self.arrays())
        other.dtype, other.base = numpy.dtype(dtype), self
        return other

    def rows(self, start: int, stop: int) -> Array:
        """Rows start to stop - 1 in the dtype in which it computes: to read only."""
        return self.decoded(start, stop).astype(self.dtype, copy=False)

    def take(self, places: Array, axis: int | None = 0, out: None = None, mode: str = "raise") -> Array:
        """The rows that are named, (*places.shape, columns): `numpy.take` along the first axis. Decodes every tile once."""
        xp = self.device.xp
        places = xp.take(xp.arange(self.shape[0]), places)  # a number that names no row is an error, as of an array
        found = xp.empty(places.shape + self.shape[1:], dtype=self.dtype)
        for low, high in self.tiles():
            here = (places >= low) & (places < high)
            found[here] = self.rows(low, high)[places[here] - low]
        return found

    def __getitem__(self, index: Any) -> Array:
        """``W[low:high]``, ``W[places]``, ``W[mask]``, ``W[i]``: rows, decoded."""
        if isinstance(index, slice):
            low, high, step = index.indices(self.shape[0])
            return self.rows(low, max(low, high))[::step] if step > 0 else self.dense()[index]
        return self.take(self.device.xp.arange(self.shape[0])[index])  # numbers below 0, masks, and errors are an array's

    def dense(self) -> Array:
        """All of it, decoded: a new array as large as the matrix."""
        whole = self.device.xp.empty(self.shape, dtype=self.dtype)
        for low, high in self.tiles():
            whole[low:high] = self.rows(low, high)
        return whole

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> numpy.ndarray:
        return numpy.asarray(self.device.to_host(self.dense()), dtype)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a {type(self).__name__} weight has no {name!r}: it is no array. weight.dense() decodes it, "
                             "quant.dequantize(model) a whole model")

    def tiles(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of the rows that are decoded together."""
        step = max(1, TILE // max(1, math.prod(self.shape[1:])))
        for low in range(0, self.shape[0], step):
            yield low, min(low + step, self.shape[0])

    # -- products -----------------------------------------------------------------------------------------------------

    def after(self, x: Array, out: Array | None = None) -> Array:
        """x W          x (N, rows)"""
        device = self.device
        y = device.xp.empty((len(x), self.shape[1]), dtype=x.dtype) if out is None else out
        if not self.shape[0]:
            y.fill(0.0)
        for low, high in self.tiles():
            if low:
                device.add_matmul(y, x[:, low:high], self.rows(low, high), 1.0)
            else:
                device.xp.matmul(x[:, :high], self.rows(0, high), out=y)
        return y

    def after_transposed(self, x: Array, out: Array | None = None) -> Array:
        """x W^T          x (N, columns)"""
        xp = self.device.xp
        y = xp.empty((len(x), self.shape[0]), dtype=x.dtype) if out is None else out
        for low, high in self.tiles():  # not dot, which writes no columns: the product would be made elsewhere and copied
            xp.matmul(x, self.rows(low, high).T, out=y[:, low:high])
        return y

    def of_16_bits(self, x: Array, out: Array | None = None, transposed: bool = False,
                   bias: Array | None = None) -> Array | None:
        """x W or x W^T, with a bias for each row if one is given, by a product of 16 bits; None where there is none."""
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kind}, {self.shape}, {self.nbytes:,} bytes)"


class Transposed(Stored):
    """The transpose of a stored matrix: a view."""

    def __init__(self, matrix: Stored) -> None:
        super().__init__(matrix.shape[::-1], matrix.dtype)
        self.matrix = self.base = matrix
        self.kind, self.by_columns = matrix.kind, not matrix.by_columns

    @property
    def T(self) -> Stored:
        return self.matrix

    @property
    def device(self) -> Device:
        return self.matrix.device

    def arrays(self) -> dict[str, Array]:
        return self.matrix.arrays()

    def with_arrays(self, arrays: dict[str, Array]) -> Transposed:
        return Transposed(self.matrix.with_arrays(arrays))

    def astype(self, dtype: Any, copy: bool = True) -> Stored:
        return Transposed(self.matrix.astype(dtype))

    def decoded(self, start: int, stop: int) -> Array:
        """Columns of the matrix: each tile of it is decoded for them."""
        whole = self.device.xp.empty((stop - start, self.shape[1]), dtype=self.dtype)
        for low, high in self.matrix.tiles():
            whole[:, low:high] = self.matrix.rows(low, high)[:, start:stop].T
        return whole

    def dense(self) -> Array:
        return self.matrix.dense().T

    def after(self, x: Array, out: Array | None = None) -> Array:
        return self.matrix.after_transposed(x, out)

    def after_transposed(self, x: Array, out: Array | None = None) -> Array:
        return self.matrix.after(x, out)


def dense(x: Any) -> Any:
    """A stored matrix decoded; any other array as it is."""
    return x.dense() if isinstance(x, Stored) else x
