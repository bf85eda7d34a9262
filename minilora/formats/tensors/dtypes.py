"""The number types of safetensors files, by the names that the format gives them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from ...errors import FormatError

__all__ = ["DTYPES", "DType", "array_dtype", "check_byte_order", "file_dtype"]


class DType(NamedTuple):
    """A number type: its bits, and the name of NumPy's or ml_dtypes' type for it (None: nobody has one)."""

    bits: int
    array: str | None
    extra: bool = False  # ml_dtypes has it, NumPy has not


# In the order of the format: a writer puts the tensors of the last ones first, so that each is aligned in the file.
DTYPES = {
    "BOOL": DType(8, "bool"),
    "F4": DType(4, None),
    "F6_E2M3": DType(6, None),
    "F6_E3M2": DType(6, None),
    "U8": DType(8, "uint8"),
    "I8": DType(8, "int8"),
    "F8_E5M2": DType(8, "float8_e5m2", True),
    "F8_E4M3": DType(8, "float8_e4m3fn", True),
    "F8_E8M0": DType(8, "float8_e8m0fnu", True),
    "F8_E4M3FNUZ": DType(8, "float8_e4m3fnuz", True),
    "F8_E5M2FNUZ": DType(8, "float8_e5m2fnuz", True),
    "I16": DType(16, "int16"),
    "U16": DType(16, "uint16"),
    "F16": DType(16, "float16"),
    "BF16": DType(16, "bfloat16", True),
    "I32": DType(32, "int32"),
    "U32": DType(32, "uint32"),
    "F32": DType(32, "float32"),
    "C64": DType(64, "complex64"),
    "F64": DType(64, "float64"),
    "I64": DType(64, "int64"),
    "U64": DType(64, "uint64"),
}
_NAMES = {dtype.array: name for name, dtype in DTYPES.items() if dtype.array}


def check_byte_order(path: Path) -> None:
    """Refuse a machine whose numbers are the other way round than those of the format."""
    if sys.byteorder != "little":
        raise FormatError(f"{path}: the numbers of safetensors files are little-endian, and this machine is big-endian: use "
                          "the safetensors library")


def array_dtype(name: str) -> numpy.dtype[Any]:
    """The dtype of arrays for a type of the file. ml_dtypes is imported when one of its types is asked for.

    Raises
    ------
    FormatError
        If no array has numbers of that type, or the package that has them is missing.

    Examples
    --------
    >>> array_dtype("F32")
    dtype('float32')
    """
    dtype = DTYPES[name]
    if dtype.array is None:
        raise FormatError(f"{name} packs numbers of {dtype.bits} bits, which no array has: convert the file to F16 or F32 with "
                          "the program that wrote it")
    if not dtype.extra:
        return numpy.dtype(dtype.array)
    try:
        import ml_dtypes
    except ImportError as error:
        raise FormatError(f"{name} needs the package ml_dtypes, since NumPy has no such numbers: "
                          "pip install 'minilora[models]'") from error
    found = getattr(ml_dtypes, dtype.array, None)
    if found is None:
        raise FormatError(f"{name} needs a newer ml_dtypes than {ml_dtypes.__version__}: pip install -U ml_dtypes")
    dtype_of_arrays: numpy.dtype[Any] = numpy.dtype(found)
    return dtype_of_arrays


def file_dtype(dtype: numpy.dtype[Any]) -> str | None:
    """The type of the file for a dtype of arrays of either byte order, or None if the format has none."""
    return _NAMES.get(dtype.name)
