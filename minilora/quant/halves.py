"""Numbers of 16 bits: widened to float32, which holds every one of them exactly, and rounded from wider ones."""

from __future__ import annotations

from typing import Any

import numpy

from ..errors import ConfigError, StateError

__all__ = ["HALVES", "as_numbers", "rounded", "widened"]

Array = Any

HALVES = ("bfloat16", "float16")
MOST = {"bfloat16": "3.39e38", "float16": "65504"}


def widened(codes: Array) -> Array:
    """float16, or the bits of bfloat16 (as uint16, or bfloat16 of ml_dtypes), as a new array of float32.

    Examples
    --------
    >>> widened(numpy.array([0x3f80, 0xc000], "uint16"))
    array([ 1., -2.], dtype=float32)
    """
    if codes.dtype.name == "float16":
        return codes.astype("float32")
    bits = codes.view("uint16").astype("uint32")
    bits <<= 16  # bfloat16 is the upper half of float32
    return bits.view("float32")


def rounded(W: numpy.ndarray, kind: str) -> numpy.ndarray:
    """Host numbers, rounded to nearest and ties to even, as float16 or as bfloat16 of ml_dtypes: once, also from float64.

    Raises
    ------
    StateError
        If a finite number becomes infinite.
    ConfigError
        For bfloat16 without the package ml_dtypes.
    """
    dtype = numpy.dtype("float16") if kind == "float16" else _bfloat16()
    codes: numpy.ndarray = numpy.empty(W.shape, dtype)
    step = max(1, (1 << 17) // max(1, W.size // max(1, len(W))))
    lost = 0
    with numpy.errstate(over="ignore", invalid="ignore"):
        for low in range(0, len(W), step):
            some, part = W[low:low + step], codes[low:low + step]
            part[...] = some if kind == "float16" else _to_bfloat16(some).view(dtype)
            whole = widened(part)
            lost += int((numpy.isinf(whole) & numpy.isfinite(some)).sum())
    if lost:
        cure = " Take kind='bfloat16', which reaches as far as float32" if kind == "float16" else ""
        raise StateError(f"{lost:,} of {W.size:,} numbers would be infinite in {kind}, which ends at {MOST[kind]}: the largest "
                         f"is {float(numpy.nanmax(numpy.abs(W))):.4g}.{cure}")
    return codes


def as_numbers(codes: numpy.ndarray) -> numpy.ndarray:
    """Codes as what they stand for, float16 or bfloat16 of ml_dtypes: a view."""
    return codes.view(_bfloat16()) if codes.dtype == "uint16" else codes


def _bfloat16() -> Any:
    try:
        import ml_dtypes
    except ImportError as error:
        raise ConfigError("bfloat16 needs the package ml_dtypes, since NumPy has no such numbers: "
                          "pip install 'minilora[models]'") from error
    return numpy.dtype(ml_dtypes.bfloat16)


def _to_bfloat16(W: numpy.ndarray) -> numpy.ndarray:
    """The bits of bfloat16, as uint16. A NaN stays one."""
    near = numpy.array(W, dtype="float32")
    if W.dtype == "float64":  # rounded twice, what was made a tie may go the wrong way: one bit away from the tie
        tie = (near.view("uint32") & 0xffff == 0x8000) & (near != W) & numpy.isfinite(near)
        near[tie] = numpy.nextafter(near[tie], numpy.where(W[tie] > near[tie], numpy.inf, -numpy.inf).astype("float32"))
    bits = near.view("uint32")
    up = ((bits >> 16) & 1) + numpy.uint32(0x7fff)
    up[numpy.isnan(near)] = 0
    bits += up
    bits[numpy.isnan(W)] |= 0x400000  # a NaN whose upper bits are 0 would become inf
    bits >>= 16
    return bits.astype("uint16")
