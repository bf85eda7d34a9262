"""Checks of numbers that are settings: sizes, rates, probabilities. NumPy's numbers are numbers, booleans are none.

What comes out are Python's own int and float: constants of an operation, which promote no array.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from .errors import ConfigError

__all__ = ["number", "whole"]


def whole(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int; `ConfigError` unless it is an int >= `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigError(f"{name} must be an int >= {least}, got {value!r}")
    return int(value)


def number(name: str, value: Any, low: float, high: float = math.inf, *, ends: str = "[)", why: str = "") -> float:
    """`value` as a float; `ConfigError` unless it is a finite number in the interval.

    Parameters
    ----------
    name : str
    value : object
    low, high : float
    ends : {"[)", "[]", "()", "(]"}
        Which of the two belong to the interval, as mathematicians write it.
    why : str
        The end of the message: what is wrong with numbers outside.

    Examples
    --------
    >>> number("p", 1, 0.0, 1.0, why=": 1 would drop everything")
    Traceback (most recent call last):
    minilora.errors.ConfigError: p must be a number in [0, 1), got 1: 1 would drop everything
    """
    try:
        fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond the floats
        fits = False
    if fits:
        fits = (low <= value if ends[0] == "[" else low < value) and (value <= high if ends[1] == "]" else value < high)
    if not fits:
        interval = f"{ends[0]}{low:g}, {high:g}{ends[1]}"
        raise ConfigError(f"{name} must be a number in {interval}, got {value!r}{why}")
    return float(value)
