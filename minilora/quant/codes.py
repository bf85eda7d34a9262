"""The codes of four bits, NF4 and FP4, and the 256 numbers in which their scales are held.

A code is a place in a table of 16 numbers between -1 and 1; what it stands for is that number times the scale of its block.

NF4 is for numbers that are drawn from a normal distribution, as trained weights nearly are: its table is made of quantiles of
it, 8 of the positive half and 7 of the negative one, and of 0, divided by the largest. So each code is used about equally
often (Dettmers et al. 2023, arXiv 2305.14314, section 3). FP4 is a floating-point number of a sign, two bits of exponent and
one of fraction, divided by its largest value 12; it has two zeros.

The numbers are the float32 of bitsandbytes, to the last bit. Computed anew from quantiles they come out 1e-7 off.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy

from ..errors import ConfigError

__all__ = ["BLOCK_SIZES", "FP4", "KINDS", "NF4", "check_kind", "dynamic_map", "numbers_of_bytes", "steps"]

Array = Any

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

NF4 = numpy.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], dtype="float32")

FP4 = numpy.array([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0],
                  dtype="float32") / numpy.float32(12.0)

KINDS = {"nf4": NF4, "fp4": FP4}

# The codes by the size of their numbers. Of FP4's zeros the one with a sign comes second: what is a little more than 0 gets it.
_ORDER = {"nf4": tuple(range(16)), "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)}


def check_kind(kind: Any, blocksize: Any) -> None:
    """Raise `ConfigError` for a kind of code, or a size of blocks, that there is none of."""
    if kind not in KINDS:
        raise ConfigError(f"the codes of four bits are 'nf4' and 'fp4', got {kind!r}")
    if isinstance(blocksize, bool) or blocksize not in BLOCK_SIZES:
        raise ConfigError(f"blocksize must be one of {', '.join(map(str, BLOCK_SIZES))}, got {blocksize!r}")


@functools.cache
def steps(kind: str) -> tuple[Array, Array]:
    """Where one code ends and the next begins, (15,), and the codes in that order, (16,), as uint8.

    A number has the code of that order's place ``count(number > steps)``: of two codes equally near the lower one.
    """
    order = numpy.array(_ORDER[kind], dtype="uint8")
    numbers = KINDS[kind][order]
    return (numbers[:-1] + numbers[1:]) / numpy.float32(2.0), order


@functools.cache
def numbers_of_bytes(kind: str) -> Array:
    """The two numbers that each byte stands for, (256,): two float32, the high half's first, as one element of eight bytes."""
    byte = numpy.arange(256)
    return numpy.stack([KINDS[kind][byte >> 4], KINDS[kind][byte & 15]], axis=1).view("uint64")[:, 0].copy()


@functools.cache
def dynamic_map() -> Array:
    """The 256 numbers that a scale's deviation is rounded to, (256,): dense near 0, and sorted.

    For i = 0 to 6, the 2^i midpoints between 0.1 and 1, times 10^(i - 6), with either sign; 0, and 1. There are 127 negative
    numbers, and 128 positive ones. In float32, step by step as bitsandbytes computes them (Dettmers et al. 2022, arXiv
    2110.02861).
    """
    numbers = [0.0, 1.0]
    for i in range(7):
        ends = _evenly(0.1, 1.0, 2 ** i + 1)
        middles = (ends[:-1] + ends[1:]) / numpy.float32(2.0) * numpy.float32(10.0 ** (i - 6))
        numbers += [*middles.tolist(), *(-middles).tolist()]
    return numpy.array(sorted(numbers), dtype="float32")


def _evenly(start: float, stop: float, count: int) -> Array:
    """float32 from start to stop: counted from start in the first half, from stop in the second, each rounded once."""
    low, high = (float(numpy.float32(end)) for end in (start, stop))
    step = float(numpy.float32(numpy.float32(high) - numpy.float32(low)) / numpy.float32(count - 1))
    place = numpy.arange(count)  # the products are exact in float64
    return numpy.where(place < count // 2, low + step * place, high - step * (count - 1 - place)).astype("float32")
