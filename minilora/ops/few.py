"""Walks over memory in many equal steps, of which an array without numbers needs only those that differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

__all__ = ["few"]

T = TypeVar("T")


def few(places: Sequence[T], x: Any) -> Iterable[T]:
    """The places of a walk over x, one after the other: all of them.

    An array that has no numbers, as in a plan, leaves out those whose step takes what another one took: that is counted
    without being run. So the walk must do the same at each place, but for how long it is, and but for the first one.
    """
    fewer = getattr(x, "fewer", None)
    return places if fewer is None else fewer(places)
