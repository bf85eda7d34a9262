"""What a 4-bit weight's file says of it in words: JSON in a tensor of bytes, ``weight.quant_state.bitsandbytes__nf4``.

    {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [out, in],
     "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0505...}      the last three if scales are nested

It comes from a file: what is not exactly that is refused, with the field and what was expected.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import numpy

from ...errors import FormatError
from ...quant.codes import BLOCK_SIZES, KINDS
from ...quant.scales import GROUP
from ..json_rules import no_number, once

__all__ = ["State", "read_state", "state_bytes"]

DTYPES = ("float32", "float16", "bfloat16")  # that bitsandbytes takes weights in
LONGEST = 4096  # bytes; real ones have at most about 180
PLAIN = ("quant_type", "blocksize", "dtype", "shape")
NESTED = ("nested_blocksize", "nested_dtype", "nested_offset")


class State(NamedTuple):
    """What a weight is.

    Attributes
    ----------
    kind : {"nf4", "fp4"}
    blocksize : int
    dtype : str
        That of the weight before it was quantised.
    shape : tuple of two ints
    offset : float or None
        What the scales' deviations are counted from; None if the scales are not nested.
    """

    kind: str
    blocksize: int
    dtype: str
    shape: tuple[int, int]
    offset: float | None

    @property
    def nested(self) -> bool:
        """Whether the scales are in 8 bits."""
        return self.offset is not None

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


def state_bytes(state: State) -> numpy.ndarray:
    """The JSON as a tensor of bytes, letter by letter as bitsandbytes writes it."""
    said: dict[str, Any] = {"quant_type": state.kind, "blocksize": state.blocksize, "dtype": state.dtype,
                            "shape": list(state.shape)}
    if state.offset is not None:
        said |= {"nested_blocksize": GROUP, "nested_dtype": "float32", "nested_offset": state.offset}
    return numpy.frombuffer(json.dumps(said).encode(), "uint8")


def read_state(data: bytes) -> State:
    """What the bytes say.

    Raises
    ------
    FormatError
        With everything that is wrong.

    Examples
    --------
    >>> read_state(b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [3, 5]}')
    State(kind='nf4', blocksize=64, dtype='float16', shape=(3, 5), offset=None)
    """
    if len(data) > LONGEST:
        raise FormatError(f"{len(data):,} bytes where about 180 are written")
    try:
        said = json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=no_number)
    except RecursionError as error:
        raise FormatError("no JSON that is meant for reading: nested too deeply") from error
    except ValueError as error:  # what is no UTF-8 too
        raise FormatError(f"no JSON: {error}"[:200]) from error
    if not isinstance(said, dict):
        raise FormatError(f"expected a JSON object, got {type(said).__name__}")
    nested = any(name in said for name in NESTED)
    wanted = {*PLAIN, *(NESTED if nested else ())}
    problems = [f"{name} is missing" for name in (*PLAIN, *NESTED) if name in wanted - said.keys()]
    problems += [f"unknown field {name!r:.60}" for name in said if name not in wanted]
    problems += [f"{name} is {said[name]!r:.60}, expected {text}" for name, (fits, text) in RULES.items()
                 if name in said and not fits(said[name])]
    if problems:
        raise FormatError("; ".join(problems[:8]))
    offset = float(said["nested_offset"]) if nested else None
    return State(said["quant_type"], said["blocksize"], said["dtype"], (said["shape"][0], said["shape"][1]), offset)


def _one_of(*values: Any) -> tuple[Any, str]:
    def fits(value: Any) -> bool:
        return any(value == known and type(value) is type(known) for known in values)
    return fits, " or ".join(map(str, values))


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 < n < 1 << 40 for n in value)


def _is_offset(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= float(numpy.finfo("float32").max)


RULES: dict[str, tuple[Any, str]] = {
    "quant_type": _one_of(*KINDS), "blocksize": _one_of(*BLOCK_SIZES), "dtype": _one_of(*DTYPES),
    "shape": (_is_shape, "[rows, columns], two whole numbers from 1 on"),
    "nested_blocksize": _one_of(GROUP), "nested_dtype": _one_of("float32"),
    "nested_offset": (_is_offset, "a number that float32 has"),
}
