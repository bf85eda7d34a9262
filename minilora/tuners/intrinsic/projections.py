"""Fixed random projections of d numbers to D: what they draw, and how it is kept. The calculus is in `ops`."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy

from ... import backend, ops
from ...errors import ConfigError
from ...settings import whole
from ...tensor import Tensor

__all__ = ["Dense", "Fastfood", "KINDS", "Projection"]

Array = Any


class Projection:
    """z = P v, with E |P v|^2 = |v|^2 over what is drawn.

    What is drawn follows from the sizes and the seed, on the host: the same numbers on every device. It is drawn when it is
    first used, and kept on the device and in the dtype of that use. A copy, in another process too, draws again.

    Parameters
    ----------
    d, size : int
        P has `size` rows and d columns.
    seed : int

    Raises
    ------
    ConfigError
        If one of them is no such number.
    """

    kind: str

    def __init__(self, d: int, size: int, seed: int = 0) -> None:
        self.d, self.size, self.seed = whole("d", d), whole("size", size), whole("seed", seed, 0)
        self._kept: tuple[Any, tuple[Array, ...]] = None, ()

    def draw(self) -> tuple[numpy.ndarray, ...]:
        """What is drawn, on the host; numbers in float64."""
        raise TypeError(f"{type(self).__name__} has no draw: define draw(self) in the subclass")

    def apply(self, v: Tensor, *drawn: Array) -> Tensor:
        """P v, from what was drawn."""
        raise TypeError(f"{type(self).__name__} has no apply: define apply(self, v, *drawn) in the subclass")

    def __call__(self, v: Tensor) -> Tensor:
        key, drawn = self._kept  # read and written as one: of two threads that draw at once, each has what it needs
        if key != (v.device.name, v.dtype):
            drawn = tuple(backend.to_device(a.astype(v.dtype) if a.dtype.kind == "f" else a, v.device) for a in self.draw())
            self._kept = (v.device.name, v.dtype), drawn
        return self.apply(v, *drawn)

    def digest(self) -> str:
        """SHA-256 of what is drawn: a seed means the same numbers only as long as NumPy's generators do not change."""
        found = hashlib.sha256()
        for array in self.draw():
            found.update(numpy.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
        return found.hexdigest()

    def __reduce__(self) -> Any:
        return type(self), (self.d, self.size, self.seed)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Projection) and self.__reduce__() == other.__reduce__()

    def __hash__(self) -> int:
        return hash(self.__reduce__())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(d={self.d}, size={self.size}, seed={self.seed})"


class Dense(Projection):
    """P as a matrix: D d numbers, and 2 D d operations in forward and in backward. For small models, and as an oracle.

    Columns of unit length in uniformly random directions: normal numbers, each column divided by its length, as Li et al. have
    it. (A normal matrix of variance 1 / D has columns of nearly unit length, and the same mean. Aghajanyan et al. draw with a
    standard deviation of 0.01 whatever D is, which is another learning rate.) Then E |P v|^2 = |v|^2: the columns are
    independent and each has the mean 0, so that the mixed terms cancel.

    Examples
    --------
    >>> import minilora, numpy
    >>> z = Dense(d=2, size=1000)(minilora.tensor([3.0, 4.0]))
    >>> z.shape, round(float(numpy.linalg.norm(z.data)), 1)
    ((1000,), 5.0)
    """

    kind = "dense"

    def draw(self) -> tuple[numpy.ndarray, ...]:
        P = numpy.random.default_rng(self.seed).standard_normal((self.size, self.d))
        return (P / numpy.sqrt((P * P).sum(axis=0)),)

    def apply(self, v: Tensor, *drawn: Array) -> Tensor:
        return ops.linear(v, drawn[0])


class Fastfood(Projection):
    """P by two fast transforms, and no matrix: 4 D log2 d additions, and memory for about 3 D numbers; see `ops.Fastfood`.

    Blocks have L numbers, the next power of two from d on (Le et al. 2013), unless `block` says otherwise: the next one from D
    on makes one block of all, as Aghajanyan et al. have it, with the same mean and 4 L log2 L additions. Kept are a sign (a
    byte), a place and a normal number for each of the K L, K = ceil(D / L), numbers: 13 bytes in float32, 26 D at most.

    Parameters
    ----------
    d, size, seed
        As in `Projection`.
    block : int, optional
        L: a power of two, d or more.

    Examples
    --------
    >>> import minilora, numpy
    >>> z = Fastfood(d=2, size=1000)(minilora.tensor([3.0, 4.0]))
    >>> z.shape, round(float(numpy.linalg.norm(z.data)))
    ((1000,), 5)
    """

    kind = "fastfood"

    def __init__(self, d: int, size: int, seed: int = 0, block: int | None = None) -> None:
        super().__init__(d, size, seed)
        self.block = 1 << (self.d - 1).bit_length() if block is None else whole("block", block)
        if self.block < self.d or self.block & (self.block - 1):
            raise ConfigError(f"block must be a power of 2 and at least d = {self.d}, got {block}: leave it out")

    def draw(self) -> tuple[numpy.ndarray, ...]:
        rng = numpy.random.default_rng(self.seed)
        shape = -(-self.size // self.block), self.block
        signs = rng.integers(0, 2, shape, dtype="int8") * numpy.int8(2) - numpy.int8(1)
        places = rng.permuted(numpy.arange(shape[0] * shape[1]).reshape(shape), axis=1)
        gauss = rng.standard_normal(shape)
        gauss /= numpy.sqrt((gauss * gauss).sum(axis=1, keepdims=True) * self.size)
        return signs, places, gauss

    def apply(self, v: Tensor, *drawn: Array) -> Tensor:
        signs, places, gauss = drawn
        return ops.fastfood(v, signs, places, gauss, self.size)

    def __reduce__(self) -> Any:
        return type(self), (self.d, self.size, self.seed, self.block)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, block={self.block})"


KINDS: dict[str, type[Projection]] = {each.kind: each for each in (Dense, Fastfood)}
