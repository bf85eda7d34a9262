"""Philox4x32-10: random bits as a function of (key, counter), with no state. The same bits on every device.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC11.
"""

from __future__ import annotations

from typing import Any

__all__ = ["philox4x32", "random_bits"]

Array = Any

_LOW = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # the multipliers of a round
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # what a round adds to the key


def philox4x32(c0: Array, c1: Array, c2: Array, c3: Array, k0: int, k1: int) -> tuple[Array, Array, Array, Array]:
    """Ten rounds on counters (c0, c1, c2, c3) under the key (k0, k1): four words of 32 random bits for each counter.

    Parameters
    ----------
    c0, c1, c2, c3 : array of uint64
        32-bit words, one array a word.
    k0, k1 : int
        The key, two 32-bit words.

    Returns
    -------
    tuple of four arrays of uint64, each value below 2^32
    """
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1  # 32 x 32 -> 64 bits: the high words are mixed in, the low words replace
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def random_bits(xp: Any, n: int, seed: int, step: int) -> Array:
    """n words of 32 random bits, a pure function of (seed, step).

    Parameters
    ----------
    xp : module
        Array module to compute with.
    n : int
    seed, step : int
        Below 2^64 each: the key, and the upper half of the counter; the lower half counts blocks of four words.

    Returns
    -------
    array of uint64, shape (n,), each value below 2^32
    """
    block = xp.arange(-(-n // 4), dtype=xp.uint64)
    high = xp.zeros_like(block)
    words = philox4x32(block & _LOW, block >> 32, high + (step & _LOW), high + (step >> 32), seed & _LOW, seed >> 32)
    return xp.stack(words, axis=1).reshape(-1)[:n]
