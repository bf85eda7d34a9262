"""Numbers of 16 bits: widened to float32, which holds every one of them exactly, and rounded from wider ones."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy

from ..errors import ConfigError, StateError

__all__ = ["HALVES", "as_numbers", "narrowed", "rounded", "widened"]

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


def narrowed(x: Array, kind: str) -> Array:
    """float32 rounded to nearest, ties to even, where it lies: float16, or the bits of bfloat16 as uint16.

    Any number may come, as it may to a product: what is too large becomes infinite, and NaN stays NaN.

    Examples
    --------
    >>> narrowed(numpy.array([1.0, 1.0 + 2.0 ** -8, 1.0 + 3.0 * 2.0 ** -8], "float32"), "bfloat16")
    array([16256, 16256, 16258], dtype=uint16)
    """
    if kind == "float16":
        with numpy.errstate(over="ignore"):
            return x.astype("float16")
    bits = x.astype("float32").view("uint32")
    bits += ((bits >> 16) & 1) + 0x7fff
    bits >>= 16
    bits[x != x] = 0x7fc0
    return bits.astype("uint16")


def rounded(W: numpy.ndarray, kind: str) -> numpy.ndarray:
    """Host numbers, rounded once to nearest, ties to even: float16, or bfloat16 of ml_dtypes; its bits where that is missing.

    Raises
    ------
    StateError
        If a number is not finite, or would become infinite.
    """
    codes: numpy.ndarray = numpy.empty(W.shape, "float16" if kind == "float16" else "uint16")
    step = max(1, (1 << 17) // max(1, W.size // max(1, len(W))))
    lost = 0
    with numpy.errstate(over="ignore", invalid="ignore"):
        for low in range(0, len(W), step):
            some = W[low:low + step]
            codes[low:low + step] = some if kind == "float16" else _to_bfloat16(some)
            if not numpy.isfinite(some).all():
                raise StateError(f"a weight with NaN or inf is not to be held as {kind}: its model is damaged")
            lost += int(numpy.isinf(widened(codes[low:low + step])).sum())
    if lost:
        cure = " Take kind='bfloat16', which reaches as far as float32" if kind == "float16" else ""
        raise StateError(f"{lost:,} of {W.size:,} numbers would be infinite in {kind}, which ends at {MOST[kind]}: the largest "
                         f"is {float(numpy.abs(W).max()):.4g}.{cure}")
    return codes if kind == "float16" or find_spec("ml_dtypes") is None else as_numbers(codes)


def as_numbers(codes: numpy.ndarray) -> numpy.ndarray:
    """Codes as what they stand for, float16 or bfloat16 of ml_dtypes: a view.

    Raises
    ------
    ConfigError
        For bfloat16 without the package ml_dtypes.
    """
    if codes.dtype != "uint16":
        return codes
    try:
        import ml_dtypes
    except ImportError as error:
        raise ConfigError("bfloat16 needs the package ml_dtypes, since NumPy has no such numbers: "
                          "pip install 'minilora[models]'") from error
    return codes.view(ml_dtypes.bfloat16)


def _to_bfloat16(W: numpy.ndarray) -> numpy.ndarray:
    """The bits of bfloat16, as uint16; of finite numbers."""
    near = numpy.array(W, dtype="float32")
    if W.dtype == "float64":  # rounded twice, what was made a tie may go the wrong way: one bit away from the tie
        tie = (near.view("uint32") & 0xffff == 0x8000) & (near != W)
        near[tie] = numpy.nextafter(near[tie], numpy.where(W[tie] > near[tie], numpy.inf, -numpy.inf).astype("float32"))
    bits = near.view("uint32")
    bits += ((bits >> 16) & 1) + numpy.uint32(0x7fff)
    bits >>= 16
    return bits.astype("uint16")
