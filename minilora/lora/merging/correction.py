"""The exact difference between an array and a prediction of it, in few bits where the prediction is good.

Read the bits of a float as a signed integer and turn the negative half over: the integers stand in the order of the numbers,
and neighbouring floats, -0 and +0 among them, are neighbouring integers. The map is one to one on all bit patterns, so with
differences taken modulo 2^bits

    order(original) = order(predicted) + k

gives the original back whatever the two arrays hold. A good prediction makes k mostly 0, otherwise mostly +1 or -1. Stored
are a bit map of k != 0 and, of the others only, the bytes of k folded to 0, 1, 2, ... (+1, -1, +2, ...): all lowest bytes
together, then the next ones, each deflated. Where that is no shorter than the original, the original itself is stored: a
block never costs more than its copy and one byte.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy

__all__ = ["decode", "encode"]

Array = Any

_CODED, _COPIED = 0, 1  # the first byte of a block
_DAMAGED = "the stored correction is damaged"


def encode(original: numpy.ndarray, predicted: numpy.ndarray) -> bytes:
    """What leads from `predicted` to `original`: at most ``original.nbytes + 1`` bytes.

    Parameters
    ----------
    original, predicted : ndarray
        C-contiguous, of one shape and one floating-point dtype; any values.

    Examples
    --------
    >>> import numpy
    >>> original = numpy.array([0.1, -0.0, 3e8], "float32")
    >>> predicted = original + numpy.array([0.0, 0.0, 32.0], "float32")
    >>> data = encode(original, predicted)
    >>> decode(memoryview(data), predicted)[0].tobytes() == original.tobytes()
    True
    """
    word = _unsigned(original.dtype)
    bits, near = (array.reshape(-1).view(word) for array in (original, predicted))
    differs = bits != near
    at = numpy.flatnonzero(differs)  # where k is not 0: few, as a rule
    k = _order(bits[at]) - _order(near[at])
    values = ((k.view(word) << 1) ^ (k >> (8 * k.itemsize - 1)).view(word)) - 1
    planes = values.view(numpy.uint8).reshape(-1, k.itemsize).T
    data = bytes([_CODED]) + b"".join(map(_pack, (numpy.packbits(differs), *planes)))
    return data if len(data) <= original.nbytes else bytes([_COPIED]) + original.tobytes()


def decode(data: memoryview, predicted: numpy.ndarray) -> tuple[numpy.ndarray, memoryview]:
    """The original of `encode`, and the data behind it.

    Raises
    ------
    ValueError
        If the data cannot come from `encode` on an array of this shape and dtype.
    """
    if not len(data) or data[0] > _COPIED:
        raise ValueError(_DAMAGED)
    kind, data = data[0], data[1:]
    if kind == _COPIED:
        if len(data) < predicted.nbytes:
            raise ValueError(_DAMAGED)
        copy = numpy.frombuffer(data[:predicted.nbytes], numpy.uint8).view(predicted.dtype)
        return copy.reshape(predicted.shape), data[predicted.nbytes:]
    bits, data = _unpack(data, -(-predicted.size // 8))
    differs = numpy.unpackbits(bits, count=predicted.size).view(bool)
    word = _unsigned(predicted.dtype)
    planes = numpy.empty((int(differs.sum()), word.itemsize), numpy.uint8)
    for plane in planes.T:
        plane[...], data = _unpack(data, len(planes))
    folded = planes.view(word).reshape(-1) + 1
    k = (folded >> 1) ^ (0 - (folded & 1))
    order = _order(predicted)
    order.reshape(-1)[differs] += k.view(order.dtype)
    return _order(order).view(predicted.dtype), data


def _unsigned(dtype: numpy.dtype[Any]) -> numpy.dtype[Any]:
    return numpy.dtype(f"<u{dtype.itemsize}")


def _order(array: numpy.ndarray) -> numpy.ndarray:
    """Bits of floats to signed integers in the order of the numbers, and back: the map is its own inverse. A copy."""
    bits = array.view(f"<i{array.dtype.itemsize}")
    return bits ^ ((bits >> (8 * bits.itemsize - 1)) & numpy.iinfo(bits.dtype).max)  # type: ignore[no-any-return]


def _pack(plane: numpy.ndarray) -> bytes:
    """A length of four bytes, then the bytes deflated; as they are where that is no longer; nothing if all are 0."""
    if not plane.any():
        return struct.pack("<I", 0)
    raw = plane.tobytes()
    # Runs and single bytes are all there is to find: on updates of 1e-1 to 1e-4 of the weight, Z_RLE is smaller and faster
    # than every level of the default strategy.
    deflate = zlib.compressobj(1, zlib.DEFLATED, -12, 6, zlib.Z_RLE)
    packed = deflate.compress(raw) + deflate.flush()
    return struct.pack("<I", min(len(packed), len(raw))) + (packed if len(packed) < len(raw) else raw)


def _unpack(data: memoryview, count: int) -> tuple[numpy.ndarray, memoryview]:
    if len(data) < 4:
        raise ValueError(_DAMAGED)
    (length,), data = struct.unpack("<I", data[:4]), data[4:]
    if length > min(count, len(data)):
        raise ValueError(_DAMAGED)
    raw, data = bytes(data[:length]), data[length:]
    if length == 0:
        return numpy.zeros(count, numpy.uint8), data
    if length < count:
        try:
            raw = zlib.decompressobj(-15).decompress(raw, count + 1)  # no more than fits: damaged data cannot fill the memory
        except zlib.error as error:
            raise ValueError(_DAMAGED) from error
        if len(raw) != count:
            raise ValueError(_DAMAGED)
    return numpy.frombuffer(raw, numpy.uint8), data
