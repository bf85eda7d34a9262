"""Gradients as the library computes them, to compare a learner's with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..backend import to_host
from ..tensor import Parameter, Tensor

__all__ = ["gradients"]

Array = Any


def gradients(f: Callable[..., Tensor], *arrays: Array, dy: Array | None = None) -> tuple[Array, ...]:
    """dL/dx for each array x, with dL/df = dy; of f itself if it is one number and dy is None.

    Examples
    --------
    >>> import numpy
    >>> gradients(lambda x: x * x, numpy.array([3.0]), dy=numpy.array([1.0]))
    (array([6.]),)
    """
    leaves = [Parameter(array) for array in arrays]
    f(*leaves).backward(gradient=dy)
    return tuple(to_host(leaf.grad) for leaf in leaves)
