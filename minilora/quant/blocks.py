"""Blocks of numbers with one scale each, in codes of four bits: W to codes and scales, and back.

The numbers of a matrix are taken row by row, in blocks that know nothing of rows:

    a_b = largest |w| of block b                          float32; 0 of a block of zeros
    code_j = the place of w_j (1 / a_b) among the codes         of two equally near the lower one
    byte_i = code_2i 16 + code_2i+1                       an odd number at the end is followed by the code of 0

    w_j is then  number(code_j) a_b

so that w is at most half the widest gap between two codes off, times a_b: 0.152 a_b of NF4, 0.167 a_b of FP4. The
arithmetic is that of bitsandbytes to the last bit, with its two exceptions: a last block that is not full divides by its scale
in place of multiplying by the inverse, and its scale is at least 1e-38.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy

from ..errors import StateError
from .codes import check_kind, numbers_of_bytes, steps

__all__ = ["Blocks", "decode", "encode"]

Array = Any

CHUNK = 1 << 16  # numbers that are encoded together: a few arrays of them fit into a core's cache
LEAST = 1e-38  # in the place of a scale that cannot be divided by


class Blocks(NamedTuple):
    """Codes (ceil(n / 2),) uint8, two in a byte, and the blocks' scales (ceil(n / blocksize),) float32."""

    codes: Array
    absmax: Array


def encode(W: Array, kind: str = "nf4", blocksize: int = 64) -> Blocks:
    """The numbers of an array as codes of four bits.

    Parameters
    ----------
    W : ndarray of floats, of any shape, or a matrix held in low precision
        On the host. Rounded to float32 first. Needs memory for about `CHUNK` numbers, or one row, besides the result.
    kind : {"nf4", "fp4"}
    blocksize : int
        One of `codes.BLOCK_SIZES`.

    Raises
    ------
    ConfigError
        If there is no such kind or blocksize.
    StateError
        If a number is not finite, or not so in float32.

    Examples
    --------
    >>> encode(numpy.array([1.0, -2.0, 0.0], "float32"))
    Blocks(codes=array([192, 119], dtype=uint8), absmax=array([2.], dtype=float32))
    """
    check_kind(kind, blocksize)
    n = W.size
    codes, absmax = numpy.empty(-(-n // 2), "uint8"), numpy.empty(-(-n // blocksize), "float32")
    done = 0
    for x in _chunks(W, blocksize):
        full = len(x) - len(x) % blocksize
        first = done // blocksize
        last = absmax[first:first + -(-len(x) // blocksize)]
        some = numpy.zeros(len(x) + len(x) % 2, "float32")
        _scaled(x[:full].reshape(-1, blocksize), last[:full // blocksize], some[:full].reshape(-1, blocksize))
        if full < len(x):
            last[-1] = numpy.maximum(numpy.abs(x[full:]).max(), numpy.float32(LEAST))
            with numpy.errstate(invalid="ignore"):
                numpy.divide(x[full:], last[-1], out=some[full:len(x)])
        if not numpy.isfinite(last).all():
            raise StateError("a weight with NaN or inf has no codes: every number of its block would be lost")
        numpy.clip(some, -1.0, 1.0, out=some)
        codes[done // 2:(done + len(x) + 1) // 2] = _packed(some, kind)
        done += len(x)
    return Blocks(codes, absmax)


def decode(codes: Array, absmax: Array, kind: str, blocksize: int, xp: Any = numpy) -> Array:
    """The numbers of whole blocks, (blocks, blocksize) float32; of a last block that is not full the rest is 0.

    Parameters
    ----------
    codes : array of uint8, (bytes,)
        Of these blocks; its bytes may end within the last one.
    absmax : array of float32, (blocks,)
        The device of both is that of the result.

    Notes
    -----
    A byte is the place of eight bytes in a table, which are its two numbers: one look-up for two weights, and one product.
    """
    pairs = xp.empty(len(absmax) * blocksize // 2, dtype="uint64")
    pairs[len(codes):] = 0
    if xp is numpy and len(codes):
        numpy.take(numbers_of_bytes(kind), codes, out=pairs[:len(codes)], mode="clip")  # without a copy of the result
    elif len(codes):
        pairs[:len(codes)] = xp.take(xp.asarray(numbers_of_bytes(kind)), codes)
    numbers = pairs.view("float32").reshape(-1, blocksize)
    numbers *= absmax[:, None]
    return numbers


def _chunks(W: Array, blocksize: int) -> Iterator[Array]:
    """The numbers in their order, float32, in flat pieces of whole blocks; the last may end within one."""
    size = max(1, CHUNK // blocksize) * blocksize
    if W.ndim != 2:
        W = W.reshape(1, -1)
    rows = max(1, size // max(1, W.shape[1]))
    waiting = numpy.empty(0, "float32")
    for low in range(0, W.shape[0], rows):
        flat = W[low:low + rows].reshape(-1)
        for at in range(0, len(flat), size):
            with numpy.errstate(over="ignore"):  # what overflows is found, as a scale that is inf
                some = flat[at:at + size].astype("float32", copy=False)
            some = numpy.concatenate([waiting, some]) if len(waiting) else some
            whole = len(some) - len(some) % blocksize
            waiting = some[whole:]
            if whole:
                yield some[:whole]
    if len(waiting):
        yield waiting


def _scaled(x: Array, absmax: Array, out: Array) -> None:
    """x divided by its blocks' scales, which are put into `absmax`."""
    numpy.abs(x, out=out)
    numpy.max(out, axis=1, out=absmax, initial=0.0)
    with numpy.errstate(invalid="ignore"):  # inf times 0, which is refused
        numpy.multiply(x, (numpy.float32(1.0) / numpy.maximum(absmax, numpy.float32(LEAST)))[:, None], out=out)


def _packed(x: Array, kind: str) -> Array:
    """The codes of numbers between -1 and 1, an even count of them, two in a byte."""
    borders, order = steps(kind)
    place = numpy.zeros(len(x), "uint8")
    for border in borders:
        place += x > border
    code = place if kind == "nf4" else order[place]
    return (code[::2] << 4) | code[1::2]
