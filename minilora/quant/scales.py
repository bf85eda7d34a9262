"""Double quantisation: the scales of blocks, which cost 32 bits each, in 8 bits.

    o = mean of all scales a            d_i = a_i - o                         they lie around 0, and have either sign
    e_g = largest |d_i| of group g, of 256 scales                             float32
    q_i = the place of d_i / e_g in `codes.dynamic_map`                       8 bits
    a_i is then  map[q_i] e_g + o

With blocks of 64 weights, a weight costs 4 + 8/64 + 32/(64 256) = 4.127 bits in place of 4 + 32/64 = 4.5.

The numbers are those of bitsandbytes 0.50 on a CPU, to the last bit. There d / e is rounded to the nearest of 65,536 places
between -1 and 1 first, and from there to the nearest number of the map; on GPUs straight to it, which is another one for one
scale in a thousand, next to a middle. And the sum for o is taken as PyTorch takes it with one thread and vectors of eight
numbers; with others, and on GPUs, the order differs, and the last bits of o. Any o serves as well, since it is stored, and
what was made with it is read with it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy

from .codes import dynamic_map

__all__ = ["GROUP", "Compressed", "compress", "decompress", "mean"]

Array = Any

GROUP = 256  # scales that share a scale
STEPS = 65535  # between -1 and 1
LANES = 8  # numbers of a vector in PyTorch's sum
ROWS = 4  # vectors that it adds to sums of their own


class Compressed(NamedTuple):
    """Scales in 8 bits: places in the map (n,) uint8, the groups' scales (groups,) float32, and the mean () float32."""

    codes: Array
    absmax: Array
    offset: Array


def compress(scales: Array) -> Compressed:
    """Scales (n,) float32 on the host, finite, in 8 bits."""
    offset = mean(scales)
    groups = -(-len(scales) // GROUP)
    d = numpy.zeros((groups, GROUP), "float32")
    numpy.subtract(scales, offset, out=d.reshape(-1)[:len(scales)])
    largest = numpy.abs(d).max(axis=1, initial=0.0)
    with numpy.errstate(divide="ignore", over="ignore", invalid="ignore"):  # of a group whose scales are all equal
        d *= (numpy.float32(1.0) / largest)[:, None]
    d[largest == 0.0] = -1.0  # for those bitsandbytes writes place 0, and any does
    numpy.nan_to_num(d, copy=False, nan=0.0)  # 0 times inf, beside numbers less than 1e-38
    numpy.clip(d, -1.0, 1.0, out=d)
    d += 1.0
    d *= STEPS / 2.0
    d += 0.5
    return Compressed(_places()[d.astype("int32")].reshape(-1)[:len(scales)], largest, numpy.asarray(offset))


def decompress(held: Compressed, start: int, stop: int, xp: Any) -> Array:
    """Scales start to stop - 1, float32 on the device where they are held."""
    scales = xp.take(xp.asarray(dynamic_map()), held.codes[start:stop])
    scales *= xp.take(held.absmax, xp.arange(start, stop) // GROUP)
    scales += held.offset
    return scales


@functools.cache
def _places() -> Array:
    """The place in the map of each of the 65,536 steps: of two numbers equally near the lower one."""
    at, numbers = (numpy.arange(STEPS + 1) * 2.0 / STEPS - 1.0).astype("float32"), dynamic_map()
    right = numpy.clip(numpy.searchsorted(numbers, at), 1, len(numbers) - 1)
    return numpy.where(numbers[right] - at < at - numbers[right - 1], right, right - 1).astype("uint8")


def mean(scales: Array) -> Any:
    """The mean of numbers (n,) float32, in float32 and in PyTorch's order. nan of none.

    Vectors of 8 numbers are dealt to 4 sums in turn. Each sum is taken in four levels: what has grown by 2^p terms at a
    level is added to the next, and begins at 0 again, with p = max(4, ceil(log2 terms) // 4). What is left over of rows,
    vectors and numbers comes last. A number takes part in at most 3 2^p + n / 2^(3 p + 5) + 24 additions, each 2^-24 off.
    """
    n = len(scales)
    if n == 0:
        return numpy.float32("nan")
    lanes = LANES if n >= LANES else 1
    vectors = n // lanes
    rows = vectors // ROWS
    table = scales[:rows * ROWS * lanes].reshape(rows, ROWS, lanes)
    sums = _cascade(table)
    for vector in scales[rows * ROWS * lanes:vectors * lanes].reshape(-1, lanes):
        sums[0] += vector
    for k in range(1, ROWS):
        sums[0] += sums[k]
    total = numpy.float32(0.0)
    for number in (*scales[vectors * lanes:], *sums[0]):
        total += number
    return total / numpy.float32(n)


def _cascade(table: Array) -> Array:
    """The sum of the rows of an array (rows, ...): the partial sums of each level in their order."""
    power = max(4, max(0, len(table) - 1).bit_length() // 4)
    step = 1 << power
    levels = [numpy.zeros(table.shape[1:], "float32") for _ in range(4)]
    whole = len(table) // step
    for i in range(1, whole + 1):
        levels[0] += _in_turn(table[(i - 1) * step:i * step])
        for j in range(1, 4):
            levels[j] += levels[j - 1]
            levels[j - 1][...] = 0.0
            if (i * step) & ((step - 1) << (j * power)):
                break
    for row in table[whole * step:]:
        levels[0] += row
    for j in range(1, 4):
        levels[0] += levels[j]
    return levels[0]


def _in_turn(table: Array) -> Array:
    total = numpy.zeros(table.shape[1:], "float32")
    for row in table:
        total += row
    return total
