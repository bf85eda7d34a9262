"""Rotary position embedding: queries and keys turned by angles that grow with their position."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from .. import backend
from ..engine import Op, apply, floating, shape_of
from ..errors import ConfigError, DeviceError, DTypeError, ShapeError
from ..settings import number, whole
from .indices import beside, integers

if TYPE_CHECKING:
    from ..tensor import Tensor
    from ..typing import TensorLike

Array = Any


class Rotary(Op):
    """y = x cos(a) + turn(x) sin(a), with turn(x) = (-x2, x1) for the halves x = (x1, x2) of the last axis.

    Elements i and i + hd/2 are one point of a plane, turned by the angle a_ti = t f_i, t its position and f_i its frequency:

        y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin

    A turn's transpose is the turn back: dx1 = dy1 cos + dy2 sin, dx2 = dy2 cos - dy1 sin; a factor in the tables is in both.
    The product of a turned query and a turned key depends on the difference of their positions only. Halves, as in Llama; the
    paper pairs neighbours, which is the same up to a fixed permutation of the columns. Keeps nothing but the tables, which all
    layers share.

    x (..., T, hd), cos and sin (T, hd / 2), or with more axes in front that broadcast to those of x. Source: Su et al. 2021,
    arXiv 2104.09864, section 3.2.2.
    """

    cos: Array
    sin: Array

    def forward(self, x: Array) -> Array:
        return self.turn(x, self.sin)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        return (self.turn(dy, -self.sin),)

    def turn(self, x: Array, sin: Array) -> Array:
        half = x.shape[-1] // 2
        y = self.xp.empty_like(x)
        x1, x2, y1, y2 = x[..., :half], x[..., half:], y[..., :half], y[..., half:]
        self.xp.multiply(x1, self.cos, out=y1)
        y1 -= x2 * sin
        self.xp.multiply(x2, self.cos, out=y2)
        y2 += x1 * sin
        return y


def rotary(x: TensorLike, cos: Array, sin: Array, offset: int = 0, positions: Any = None) -> Tensor:
    """Turn queries or keys by the angles of their positions; see `Rotary`.

    Parameters
    ----------
    x : Tensor, shape (..., T, hd)
    cos, sin : array, shape (length, hd / 2)
        From `rotary_tables`: constants of the dtype and device of x.
    offset : int
        The position of x's first row: rows `offset` to `offset` + T of the tables are used.
    positions : array or nested lists of int, optional
        The position of every row, in place of `offset`; broadcasts to x (..., T) without its last axis.

    Raises
    ------
    ShapeError
        If the tables do not fit, or end before the last position, or the positions do not fit.
    OutOfRangeError
        If a given position has no row in the tables.
    DTypeError, DeviceError
        If the tables have another dtype or live on another device.

    Examples
    --------
    >>> import numpy, minilora
    >>> cos, sin = rotary_tables(rotary_frequencies(4), length=8, dtype="float64")
    >>> x = minilora.tensor(numpy.ones((2, 3, 4)))
    >>> rotary(x, cos, sin).data[0].round(3)
    array([[ 1.   ,  1.   ,  1.   ,  1.   ],
           [-0.301,  0.99 ,  1.382,  1.01 ],
           [-1.325,  0.98 ,  0.493,  1.02 ]])
    """
    shape, tables = shape_of(floating(x)), shape_of(cos)
    if len(tables) != 2 or tables != shape_of(sin):
        raise ShapeError(f"rotary: expected cos and sin of one shape (length, hd / 2), got {tables} and {shape_of(sin)}")
    needed = check_positions(shape, 2 * tables[1], offset)
    if needed > tables[0]:
        raise ShapeError(f"rotary: x {shape} stands at the positions {offset} to {needed - 1}, but the tables have {tables[0]} "
                         "positions: make longer ones with rotary_tables(frequencies, length)")
    like: Array = x.data if hasattr(x, "node") else x  # type: ignore[attr-defined]
    for name, table in (("cos", cos), ("sin", sin)):
        if backend.device_of(table) is not backend.device_of(like):
            raise DeviceError(f"rotary: x lives on the {backend.device_of(like).name}, {name} on the "
                              f"{backend.device_of(table).name}: make the tables with rotary_tables(..., device=x.device)")
        if table.dtype != like.real.dtype:
            raise DTypeError(f"rotary: x is {like.dtype}, {name} {table.dtype}: make the tables with rotary_tables(..., "
                             "dtype=x.dtype)")
    rows: Any = slice(offset, needed)
    if positions is not None:
        rows = beside(x, integers("rotary: position", positions, tables[0]))
        axes = shape[:-1]
        if rows.ndim > len(axes) or any(n not in (1, m) for n, m in zip(rows.shape[::-1], axes[::-1])):
            raise ShapeError(f"rotary: positions {rows.shape} do not broadcast to those of x, {axes}")
    return apply(Rotary, x, cos=cos[rows], sin=sin[rows])


def check_positions(x: tuple[int, ...], head_dim: int, offset: Any) -> int:
    """How many positions x (..., T, head_dim) needs; `ShapeError` for another shape, `ConfigError` for a bad offset."""
    first = whole("rotary: offset", offset, 0)
    if len(x) < 2 or x[-1] != head_dim:
        raise ShapeError(f"rotary: expected x (..., T, {head_dim}), as the tables have {head_dim // 2} frequencies, got {x}")
    return first + x[-2]


def rotary_frequencies(head_dim: int, theta: float = 10000.0) -> tuple[float, ...]:
    """f_i = theta^(-2 i / head_dim) for i below head_dim / 2, in radians a position.

    Raises
    ------
    ConfigError
        If head_dim is not an even int >= 2, or theta is not a finite number above 0.

    Examples
    --------
    >>> rotary_frequencies(4)
    (1.0, 0.01)
    """
    if isinstance(head_dim, bool) or not isinstance(head_dim, Integral) or head_dim < 2 or head_dim % 2:
        raise ConfigError(f"rotary: head_dim must be an even int >= 2, got {head_dim!r}: its halves are turned as pairs")
    theta, head_dim = number("rotary: theta", theta, 0.0, ends="()"), int(head_dim)
    return tuple(theta ** (-2.0 * i / head_dim) for i in range(head_dim // 2))


def rotary_tables(frequencies: Sequence[float], length: int, dtype: Any = "float32", device: Any = None,
                  factor: float = 1.0) -> tuple[Array, Array]:
    """a cos(t f_i) and a sin(t f_i) for the positions t = 0 to length - 1, and the factor a.

    Computed on the host in float64 and rounded once, so that every device has the same bits, also far from the start.

    Parameters
    ----------
    frequencies : sequence of float
        From `rotary_frequencies`, or `scaled_rotary_frequencies` for long contexts.
    length : int
        At least 1.
    dtype : dtype
        That of the queries and keys.
    device : Device or str, optional
        The current device by default.
    factor : float
        a, by which all turned vectors are longer: scores of attention grow by its square. 1, but for yarn.

    Returns
    -------
    tuple of two arrays, shape (length, number of frequencies)

    Raises
    ------
    ConfigError
        If length is not an int >= 1, or factor is not a finite number above 0.

    Examples
    --------
    >>> cos, sin = rotary_tables((1.0, 0.5), length=3)
    >>> cos.shape, sin[1].round(3).tolist()
    ((3, 2), [0.8410000205039978, 0.4790000021457672])
    """
    length, factor = whole("rotary: length", length), number("rotary: factor", factor, 0.0, ends="()")
    host = backend.cpu.xp
    angles = host.arange(length, dtype="float64")[:, None] * host.asarray(frequencies, dtype="float64")
    cos, sin = (factor * host.cos(angles)).astype(dtype), (factor * host.sin(angles)).astype(dtype)
    return backend.keep(cos, device), backend.keep(sin, device)
