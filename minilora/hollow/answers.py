"""Where what NumPy's functions give for arrays without numbers is written down, and which dtypes come out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy

from ..errors import DeviceError

__all__ = ["ANSWERS", "Rule", "dtype_of", "kind_of", "lacking", "rule"]

Rule = Callable[..., Any]

ANSWERS: dict[Any, Rule] = {}  # by NumPy's function


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register the decorated function as what these give."""
    def register(given: Rule) -> Rule:
        for function in functions:
            ANSWERS[function] = given
        return given
    return register


def kind_of(x: Any) -> Any:
    """What decides about dtypes: that of an array, the type of a number of Python's, which promotes none."""
    return getattr(x, "dtype", None) or type(x)


@functools.cache
def dtype_of(function: Any, kinds: tuple[Any, ...]) -> Any:
    with numpy.errstate(all="ignore"):
        return function(*(kind(1) if isinstance(kind, type) else numpy.ones(1, kind) for kind in kinds)).dtype


def lacking(name: str) -> DeviceError:
    return DeviceError(f"numpy.{name} of an array without numbers, as in a plan: minilora/hollow/rules.py lacks a line that "
                       "says what shape comes out")
