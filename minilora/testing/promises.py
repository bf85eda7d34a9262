"""What an operation promises besides the values of its gradients."""

from __future__ import annotations

import traceback
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy

from .. import backend
from ..errors import MiniloraError
from ..tensor import Tensor
from .differences import Slope
from .evidence import relative_errors
from .point import Point
from .reports import Check

__all__ = ["Promised", "complex_agrees", "draw_cotangent", "promises"]

Array = Any


class Promised(NamedTuple):
    """The checks; and the cotangent, and a gradient or None for each leaf: none if comparing them would be pointless."""

    checks: list[Check]
    cotangent: Array = None
    gradients: tuple[Array | None, ...] = ()


def draw_cotangent(y: Tensor, rng: numpy.random.Generator) -> tuple[Array, Array]:
    """A random cotangent for y: on the host, and on y's device in y's dtype."""
    host = rng.standard_normal(y.shape)
    return host, backend.to_device(host.astype(y.dtype), y.device)


class _Broken(Exception):
    """A backward failed; the message says how."""


def promises(point: Point, y: Tensor, rng: numpy.random.Generator) -> Promised:
    """Everything that can be checked without a numerical gradient, from f's output y at the point."""
    changed = point.undo_changes()
    checks = [
        Check("inputs unchanged by f", *_none(changed, "changed: {}. An operation edits only what it made")),
        Check("float64 gives float64", y.dtype == "float64", f"the output is {y.dtype}: write constants as Python "
              "numbers, and make arrays with the dtype of the input"),
    ]
    if not checks[-1].passed:
        return Promised(checks)
    host, cotangent = draw_cotangent(y, rng)
    try:
        return Promised(checks, host, _backwards(point, y, host, cotangent, checks))
    except _Broken as error:
        checks.append(Check("backward runs", False, str(error)))
    return Promised(checks)


def _backwards(point: Point, y: Tensor, host: Array, cotangent: Array, checks: list[Check]) -> tuple[Array | None, ...]:
    """The gradients; `checks` grows by what five backward passes show."""
    before = numpy.array(backend.to_host(y.data))
    first = _gradients(point, y, cotangent)
    checks.append(Check("inputs unchanged by backward", *_none(point.undo_changes(), "changed: {}")))
    checks.append(Check("cotangent unchanged", _same(host, backend.to_host(cotangent)),
                        "backward wrote into dy, which other operations may read too"))
    cotangent = backend.to_device(host, y.device)
    again = point.output()
    checks.append(Check("forward repeats", _same(before, backend.to_host(again.data)), "f gives another output for the "
                        "same input: fix the seed and step of a dropout, or call model.eval()"))
    if not checks[-1].passed:
        return ()
    second = _gradients(point, again, cotangent)
    checks.append(Check("gradients repeat", *_differ(point, first, second, "other values the second time: {}")))
    _lend_rooms(point)
    third = _gradients(point, point.output(), cotangent)
    for _, leaf in point.leaves:
        leaf.room = None
    if checks[-1].passed:
        checks.append(Check("gradients repeat when written into an array", *_differ(
            point, first, third, "other values when self.into(i) held NaN before: {}. Write every element, reading none")))
    zero = _gradients(point, point.output(), backend.to_device(numpy.zeros_like(host), y.device))
    names = [name for (name, _), dx in zip(point.leaves, zero) if dx is not None and dx.any()]
    checks.append(Check("zero cotangent gives zero", *_none(names, "not zero: {}. Is dy left out of the gradient?")))
    return tuple(first)


def _gradients(point: Point, y: Tensor, cotangent: Array) -> list[Array | None]:
    try:
        return point.gradients(y, cotangent)
    except NotImplementedError:  # it is still to be written: no finding
        raise
    except Exception as error:  # whatever a backward that is being written raises: it is a finding
        text = str(error)
        if not isinstance(error, MiniloraError):
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({PurePath(last.filename).name}, line {last.lineno})"
        raise _Broken("; ".join([text, *getattr(error, "__notes__", [])])) from error


def _none(names: list[str], detail: str) -> tuple[bool, str]:
    return not names, detail.format(", ".join(names))


def _same(a: Array, b: Array) -> bool:
    return bool(a.shape == b.shape and a.tobytes() == b.tobytes())


def _differ(point: Point, first: list[Array | None], second: list[Array | None], detail: str) -> tuple[bool, str]:
    return _none([name for (name, _), a, b in zip(point.leaves, first, second)
                  if (a is None) != (b is None) or not (a is None or _same(a, b))], detail)


def _lend_rooms(point: Point) -> None:
    """Give every leaf an array to write its gradient into, as an optimizer does; NaN shows what was not written."""
    for (_, leaf), x in zip(point.leaves, point.start):
        leaf.room = backend.to_device(numpy.full(x.shape, numpy.nan), leaf.device)


def complex_agrees(slope: Slope) -> Check:
    """Whether the complex step looks at the same function."""
    errors = relative_errors(slope.complex_output({}).real.reshape(-1), slope.y.reshape(-1))
    return Check("complex and real outputs agree", not errors.size or bool(errors.max() <= 1e-9), "f computes "
                 "something else with complex numbers, so the complex step says nothing about it: use mode='central'")
