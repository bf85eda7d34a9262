"""Rounding to a narrower dtype, up or down at random, so that nothing is lost on average."""

from __future__ import annotations

from typing import Any

import numpy

from ...errors import ConfigError
from ...ops.philox import philox4x32

__all__ = ["check_rounding", "random_bits", "stochastic"]


def check_rounding(rounding: str, seed: int, stream: int = 0) -> None:
    if rounding not in ("nearest", "stochastic"):
        raise ConfigError(f"merge: rounding must be 'nearest' or 'stochastic', got {rounding!r}")
    for name, value in (("seed", seed), ("stream", stream)):
        if isinstance(value, bool) or not isinstance(value, (int, numpy.integer)) or not 0 <= value < 2 ** 64:
            raise ConfigError(f"merge: {name} must be an int in [0, 2^64), got {value!r}")


def random_bits(start: int, stop: int, seed: int, stream: int) -> numpy.ndarray:
    """Words `start` to `stop` of ``ops.philox.random_bits(numpy, n, seed, stream)``, without those before."""
    low = 0xFFFFFFFF
    block = numpy.arange(start // 4, -(-stop // 4), dtype=numpy.uint64)
    high = numpy.zeros_like(block)
    words = philox4x32(block & low, block >> 32, high + (stream & low), high + (stream >> 32), seed & low, seed >> 32)
    first = start % 4
    return numpy.stack(words, axis=1).reshape(-1)[first:first + stop - start]


def stochastic(x: numpy.ndarray, dtype: Any, bits: numpy.ndarray) -> numpy.ndarray:
    """x rounded to one of its two neighbours in a narrower dtype, so that the mean over the bits is x.

    Exact where x has no more than 24 binary digits below the narrow unit, which holds for float16 from 2^-25 upwards and for
    bfloat16 everywhere. Beyond the largest number, x is rounded to nearest.
    """
    near = x.astype(dtype)
    back = near.astype(x.dtype)
    other = numpy.nextafter(near, numpy.where(x > back, numpy.inf, -numpy.inf).astype(dtype))
    # Both differences are exact and the gap is a power of 2. Next to inf the share is 0.
    share = (x - back) / (other.astype(x.dtype) - back)
    return numpy.where((bits >> 8).astype(x.dtype) * 2.0 ** -24 < share, other, near)
