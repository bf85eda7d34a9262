"""What reading has in common in the dialects: keys sorted into the parts of an update, and an update whose parts fit.

Nothing here raises. Problems are collected as lines, and `refuse` makes one error of all of them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ...errors import FormatError
from ..json_rules import once
from .faults import shortened
from .saved import Kind, Update

__all__ = ["FLOATS", "alike", "alpha_in", "alpha_of", "json_object", "named", "number", "refuse", "sorted_keys",
           "update_of"]

Array = Any
FLOATS = ("float16", "bfloat16", "float32", "float64")
LONGEST = 400  # characters of a line: names come from the file
SHOWN = 20  # a file of another program has hundreds of keys, and all may be wrong in the same way


def refuse(where: Any, what: str, problems: Iterable[str]) -> None:
    """Raise `FormatError` with all of these lines, unless there are none; of very many, the first."""
    lines = [shortened(line, LONGEST) for line in problems]
    if lines:
        head = f"{where}: {what}: {len(lines)} problem{'s' if len(lines) > 1 else ''}"
        rest = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise FormatError("\n  ".join([head, *lines[:SHOWN], *rest]))


def sorted_keys(keys: Iterable[str], split: Callable[[str], tuple[str, str] | None]
                ) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Keys by module and part, and a line for every key that is not understood or says again what another has said.

    Parameters
    ----------
    keys : iterable of str
    split : callable
        The module and the part that a key belongs to, or None.

    Returns
    -------
    dict of str to dict of str to str
        ``{"fc": {"A": "fc.lora_A.weight", "B": "fc.lora_B.weight"}}``
    list of str
    """
    modules: dict[str, dict[str, str]] = {}
    problems = []
    for key in keys:
        found = split(key)
        if found is None:
            problems.append(f"{key}: this key is not understood")
            continue
        module, part = found
        parts = modules.setdefault(module, {})
        if part in parts:
            problems.append(f"{key}: says again what {parts[part]} says: {part} of {module!r}")
        parts.setdefault(part, key)
    return modules, problems


def named(path: str, names: Iterable[str]) -> bool:
    """Whether a path is one of these names, or ends in one of them behind a dot."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def number(value: Any) -> float | None:
    """A finite number other than 0 as a float; None for anything else, text and booleans too."""
    if hasattr(value, "dtype"):
        if value.size != 1 or value.dtype.name not in FLOATS + ("int32", "int64"):
            return None
        value = float(value.reshape(()).astype("float64"))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:  # an int beyond the floats
        return None
    return found if math.isfinite(found) and found else None


def alpha_of(name: str, alpha: Array, problems: list[str]) -> float | None:
    """The number above 0 in a tensor of shape () or (1,); None, and a line added, if it is none."""
    value = number(alpha)
    if value is not None and value > 0 and alpha.ndim < 2:
        return value
    told = f"{alpha.reshape(-1)[0]}" if alpha.size == 1 else f"{alpha.dtype} {alpha.shape}"
    zero = ". 0 stands for the rank in kohya's program and for no update in others" if told in ("0", "0.0") else ""
    problems.append(f"{name}.alpha: expected one number above 0, got {told}{zero}")
    return None


def alpha_in(metadata: Mapping[str, str], problems: list[str]) -> float | None:
    """alpha as some files have it, once in the metadata; it holds for modules without a tensor of that name."""
    if "alpha" not in metadata:
        return None
    text = metadata["alpha"]
    alpha = number(float(text)) if re.fullmatch(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text, re.ASCII) else None
    if alpha is None:
        problems.append(f"__metadata__: alpha {text!r}: expected a number above 0")
    return alpha


def json_object(text: str) -> dict[str, Any] | None:
    """The object that this JSON text holds; None if it holds none, names a field twice, or is no JSON."""
    try:
        value = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def update_of(path: str, kind: Kind, A: Array, B: Array, s: float | None, problems: list[str], *, bias: Array | None = None,
              magnitude: Array | None = None) -> Update | None:
    """An update of arrays in PEFT's shapes; None, and lines added to `problems`, where they do not fit together.

    A and B of two float types are widened to the one that holds both.
    """
    found = _misfits(kind, A, B, bias, magnitude)
    if s is None or not math.isfinite(s * max(A.shape[:1], default=1)) or not s:  # s r is alpha, and finite too
        found.append(f"the scaling must be a finite number other than 0, got {s}")
    problems += [f"{path}: {line}" for line in found]
    if found or s is None:
        return None
    return Update(kind, *alike(A, B), float(s), bias, magnitude)


def alike(A: Array, B: Array) -> tuple[Array, Array]:
    """A and B in one float type: of two, the one that holds the numbers of both."""
    if A.dtype == B.dtype:
        return A, B
    both = "float64" if "float64" in (A.dtype, B.dtype) else "float32"  # float16 and bfloat16 fit in neither of the two
    return A.astype(both), B.astype(both)


def _misfits(kind: Kind, A: Array, B: Array, bias: Array | None, magnitude: Array | None) -> list[str]:
    """A line for everything in which these arrays are no update of this kind."""
    lines = []
    for name, array in (("A", A), ("B", B), ("bias", bias), ("magnitude", magnitude)):
        if array is not None and array.dtype.name not in FLOATS:
            lines.append(f"{name} is {array.dtype}: expected one of {', '.join(FLOATS)}")
    a, b = A.shape, B.shape
    axes = range(3, 6) if kind == "convolution" else (2,)
    if len(a) not in axes or len(b) != len(a) or 0 in a + b:
        shapes = "A (r, C_in, *kernel) and B (out, r, 1, ...)" if kind == "convolution" else "A (r, in) and B (out, r)"
        return [*lines, f"expected {shapes}, none of them empty, got A {a} and B {b}, as PEFT orders them"]
    if any(n != 1 for n in b[2:]):
        lines.append(f"B of a convolution is 1 x 1, got {b}")
    if a[0] % b[1] or (kind != "convolution" and a[0] != b[1]):
        lines.append(f"A {a} has rank {a[0]}, B {b} has rank {b[1]}")
    for name, array in (("bias", bias), ("magnitude", magnitude)):
        if array is not None and array.shape != b[:1]:
            lines.append(f"{name}: expected shape {b[:1]}, got {array.shape}")
    if bias is not None and magnitude is not None:
        lines.append("a bias (lora_bias) and DoRA's lengths: there is no update with both")
    return lines
