"""Numbers that are none: NaN and inf in what is to become a part of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ... import backend
from ...errors import StateDictError

__all__ = ["nonfinite", "refused"]

Array = Any


def nonfinite(path: str, tensors: Mapping[str, Array]) -> list[str]:
    """A line for every tensor of a layer that holds NaN or inf: how many, of how many. One sync point a tensor on a GPU."""
    lines = []
    for name, array in tensors.items():
        bad = int(array.size) - int(backend.device_of(array).xp.isfinite(array).sum())
        if bad:
            lines.append(f"not finite {path + '.' if path else ''}{name}: {bad:,} of {array.size:,} numbers are NaN or inf")
    return lines


def refused(what: str, problems: Sequence[str]) -> StateDictError:
    """The error that lists these problems, and says how NaN and inf pass."""
    cure = ["If NaN and inf are meant, give allow_nonfinite=True"] if any(x.startswith("not finite") for x in problems) else []
    return StateDictError("\n  ".join([f"{what}:", *problems, *cure]))
