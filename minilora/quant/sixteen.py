"""Weights in 16 bits: float16, or bfloat16."""

from __future__ import annotations

from typing import Any

import numpy

from .. import stored
from ..backend import device_of, to_device, to_host
from ..errors import DTypeError
from ..nn.module import Module
from .halves import as_numbers, narrowed, rounded, widened
from .packed import Packed

__all__ = ["Sixteen", "half_products"]

Array = Any

NARROW = 256  # columns of a tile: a product with fewer wastes BLAS


class Sixteen(Packed):
    """A matrix, or the kernels of a convolution, held as float16 or bfloat16. Decoding is exact: float32 has all its numbers.

    Parameters
    ----------
    codes : array, shape (rows, columns) or with more axes
        float16, or bfloat16 of the package ml_dtypes, or uint16 that are the bits of bfloat16. Used as it is, with any strides
        and at any address: also where it lies in a mapped file.
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
        self.as_it_is = False  # see `half_products`
        self.by_columns = bool(codes.strides[0] < codes.strides[-1])

    @classmethod
    def of(cls, W: Array, kind: str = "bfloat16", *, dtype: Any = None) -> Sixteen:
        """Numbers rounded to 16 bits, to nearest and ties to even, on their device; computed on the host, some rows at a time.

        Parameters
        ----------
        W : array, or one held in low precision
        kind : {"bfloat16", "float16"}
        dtype : dtype, optional
            In which it computes; W's own by default.

        Raises
        ------
        StateError
            If a number is not finite, or would become infinite.
        """
        codes = rounded(to_host(W), kind)
        return cls(to_device(codes, device_of(W)), W.dtype if dtype is None else dtype)

    @property
    def numbers(self) -> numpy.ndarray:
        """The codes on the host, as float16 or as bfloat16 of ml_dtypes; a copy only of what lies on another device."""
        return as_numbers(device_of(self.codes).to_host(self.codes))

    @property
    def bits(self) -> Array:
        """The codes as what every device can copy and choose from: bfloat16, which CuPy has no kernels for, as its bits."""
        return self.codes if self.codes.dtype.char in "eH" else self.codes.view("uint16")

    def like(self, W: Array) -> Sixteen:
        """Another one, held as this one is: `W` is rounded to its kind, if it is not of it."""
        codes = W if W.dtype.name == self.kind else rounded(to_host(W), self.kind)
        if self.codes.dtype == "uint16":
            codes = codes.view("uint16")
        return self._with(to_device(codes, self.device))

    def replaced(self, places: Array, rows: Array) -> Sixteen:
        """Another one with other numbers in these rows."""
        bits = self.bits.copy()
        bits[places] = self.like(rows).bits
        return self._with(bits.view(self.codes.dtype))

    def arrays(self) -> dict[str, Array]:
        return {"": self.codes}

    def with_arrays(self, arrays: dict[str, Array]) -> Sixteen:
        return self._with(arrays[""])

    def _with(self, codes: Array) -> Sixteen:
        other = Sixteen(codes, self.dtype)
        other.as_it_is = self.as_it_is
        return other

    @property
    def T(self) -> Sixteen:
        return self._with(self.codes.T)

    def reshape(self, *shape: Any) -> Sixteen:
        return self._with(self.codes.reshape(*shape))

    def decoded(self, start: int, stop: int) -> Array:
        return self.device.resolve(widened)(self.bits[start:stop])

    def take(self, places: Array, axis: int | None = 0, out: None = None, mode: str = "raise") -> Array:
        chosen = Sixteen(self.bits[places.reshape(-1)], self.dtype)  # not NumPy's take: it would copy what is held by columns
        return chosen.rows(0, len(chosen)).reshape(places.shape + self.shape[1:])

    def after(self, x: Array, out: Array | None = None) -> Array:
        y = self.of_16_bits(x, out)
        if y is not None:
            return y
        if self.shape[0] * NARROW > stored.TILE:
            return super().after(x, out)
        return self.T.after_transposed(x, out)  # some columns at a time: then there are no sums to be added up

    def after_transposed(self, x: Array, out: Array | None = None) -> Array:
        y = self.of_16_bits(x, out, transposed=True)
        return super().after_transposed(x, out) if y is None else y

    def of_16_bits(self, x: Array, out: Array | None = None, transposed: bool = False,
                   bias: Array | None = None) -> Array | None:
        """As it is said in `Stored`, where it is asked for: see `half_products`."""
        device = device_of(x)
        if not (self.as_it_is and device.multiplies_16_bits and x.dtype.char == "f" and x.size and self.size):
            return None
        W = self.bits.T if transposed else self.bits
        y = device.xp.empty((len(x), W.shape[1]), dtype=x.dtype) if out is None else out
        return y if device.matmul_of_16_bits(y, device.resolve(narrowed)(x, self.kind), W, bias) else None


def half_products(model: Module, on: bool = True) -> int:
    """Let a GPU multiply weights that are held in 16 bits as they are, and round what they are multiplied with to 16 bits too.

    By default products are those of float32, here and there: the weights are decoded. Tensor cores are several times as fast on
    16 bits. On the CPU nothing changes, nor for float64.

    What is held is exact, so that of every term one factor alone is rounded, x forward and dy backward, and only inside of this
    product; sums, y and dx are float32, and so is everything else, gradients of adapters included:

        y = r(x) W^T        dx = r(dy) W        |r(x) - x| <= u |x|

        |y_nk - exact| <= u sum_i |x_ni| |W_ki|        |dx_ni - exact| <= u sum_k |dy_nk| |W_ki|

    and what sums of float32 cost, as always. In bfloat16 u is 2^-8, 0.4 %, for numbers of any size, and a typical y is 0.17 %
    off in norm. In float16 u is 2^-11, but its numbers end: x beyond 65504 becomes infinite, and of dy what is below 6e-8 is
    lost, which is nearly all that a big vocabulary sends back. There scale the loss (`optim.LossScale`), or hold bfloat16.

    The gradient is that of the product without r, taken at r(x): r itself, a staircase, has the slope 0 nearly everywhere, and
    is passed as if it were the identity. Its errors have the sign of a coin, so that those of L layers in a row add up to about
    sqrt(L) times one of them.

    Parameters
    ----------
    model : Module
    on : bool

    Returns
    -------
    int
        How many weights it is about.

    Examples
    --------
    >>> import minilora
    >>> from minilora import quant
    >>> layer = minilora.nn.Linear(4, 2, rng=0).requires_grad(False)
    >>> report = quant.quantize(layer, "float16")
    >>> half_products(layer)
    1
    """
    held = [p for p in model.parameters() if isinstance(p.data, Sixteen)]
    for p in held:
        p.data = p.data.with_arrays(p.data.arrays())  # another one: whoever has recorded a step with the former sees it
        p.data.as_it_is = bool(on)
    return len(held)
