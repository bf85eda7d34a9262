"""gradcheck: hand-written gradients against numerical ones, and what else an operation promises."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy

from ..backend import current_device
from ..engine import ledger
from ..errors import ConfigError
from ..tensor import Tensor
from .differences import MODES, Slope
from .leaves import measure, rows
from .point import Point
from .promises import complex_agrees, promises
from .reports import Report

__all__ = ["gradcheck"]

Array = Any


def gradcheck(f: Callable[..., Tensor], *inputs: Any, parameters: Iterable[Any] = (), mode: str = "complex",
              rng: numpy.random.Generator | None = None, rtol: float | None = None, full_size: int = 200,
              directions: int = 8) -> Report:
    """Compare the gradients of f with numerical ones, at one point.

    f is contracted with a random cotangent c to the number L = sum(c f). A cotangent of ones would hide mistakes: the
    entries of a softmax sum to 1, so its gradient under ones is 0, and a lost one passes.

    Parameters
    ----------
    f : callable
        Takes a Tensor for each input and returns a Tensor of any shape. It must be a function: a dropout in it needs a
        fixed seed and step, or ``model.eval()``.
    *inputs : array, float64
        The point. Moved to the current device and checked; handed to f as trainable parameters.
    parameters : iterable of Parameter, Tensor or (str, Parameter)
        What else f uses, such as ``model.named_parameters()``. Trainable ones are checked. Frozen ones and plain
        tensors are not, but have to be named for ``mode="complex"``, which computes with complex numbers throughout.
    mode : {"complex", "central"}
        ``"complex"``: Im L(x + ih) / h with h = 1e-30, exact to rounding, for f made of analytic operations (all of
        minilora's are). ``"central"``: (L(x + h) - L(x - h)) / 2h with h = eps^(1/3) max(1, abs(x)), for any f.
    rng : numpy.random.Generator, optional
        Draws cotangent and directions. Without it always the same ones, so that what fails fails again.
    rtol : float, optional
        1e-9 for the complex step, 1e-6 for central differences.
    full_size, directions : int
        Leaves of up to `full_size` elements are checked one by one, larger ones along so many random directions.

    Returns
    -------
    Report
        True if passed. ``print(report)`` shows a table, ``report.check()`` raises `GradcheckError` if not passed.

    Raises
    ------
    ConfigError
        If a setting is out of range, or f cannot be computed with complex numbers.
    DTypeError
        If an input or trainable parameter is not float64.

    Notes
    -----
    The error of an element is abs(a - n) / max(abs(a), abs(n), floor), 0 if both are 0. The floor is a thousandth
    of the leaf's largest value, or the rounding error of L's derivative divided by `rtol`, whichever is larger.

    Also checked: float64 in gives float64 out; gradients have the shape and dtype of their leaf; f and its gradients
    are bit-equal when computed twice, also when a gradient is written into an optimizer's array; a zero cotangent
    gives zero gradients; nothing that f was given has changed; complex and real numbers give the same output.

    A leaf whose gradient is 0 everywhere, by hand and numerically, passes but was not tested: times -17 it would be 0 too. The
    report says so, and ``report.untested`` names it. With B = 0 that is dA of a low-rank update: give B random values. All that
    was not tested, such as frozen parameters and elements that were not used, is listed in ``report.unchecked``.

    A wrong gradient comes with a guess, ``report["W"].guess``: the transpose, a factor, the gradient of another input, rows or
    columns that are right. An error that backward raises is the failed check "backward runs"; one that forward raises is not
    caught, and gets a note with the operation in which it arose.

    At a kink (relu at 0) there is no derivative to compare with: the report does not pass, and says "kink near".

    Examples
    --------
    >>> import numpy, minilora
    >>> from minilora import ops, testing
    >>> rng = numpy.random.default_rng(0)
    >>> x, W = rng.standard_normal((5, 3)), rng.standard_normal((2, 3))
    >>> testing.gradcheck(lambda x, W: ops.tanh(ops.linear(x, W)), x, W).passed
    True
    """
    if mode not in MODES:
        raise ConfigError(f"gradcheck: mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    text, usual = MODES[mode]
    rtol = usual if rtol is None else rtol
    if not rtol > 0 or full_size < 0 or directions < 1:
        raise ConfigError(f"gradcheck: rtol must be > 0, full_size >= 0 and directions >= 1, got {rtol}, {full_size} "
                          f"and {directions}")
    rng = numpy.random.default_rng(0) if rng is None else rng
    with Point(f, inputs, parameters) as point:
        if not point.leaves:
            raise ConfigError("gradcheck: nothing to check: give inputs, or parameters of which one is trainable")
        y = point.output()
        surroundings = point.surroundings(y)
        computed = tuple(dict.fromkeys((row.op, row.kernel) for row in ledger(y).rows))
        checks, cotangent, gradients = promises(point, y, rng)
        found = []
        if gradients:
            slope = Slope(point, cotangent, mode, rtol)
            if mode == "complex":
                checks.append(complex_agrees(slope))
            found = rows([measure(slope, i, dx, _directions(point.start[i], full_size, directions, rng))
                          for i, dx in enumerate(gradients)], cotangent, surroundings)
    return Report(text, rtol, tuple(found), tuple(checks), surroundings.constants, computed, current_device().in_tf32)


def _directions(x: Array, full_size: int, n: int, rng: numpy.random.Generator) -> Array | None:
    """n random directions (n, size), or None for all elements one by one."""
    return None if x.size <= full_size else rng.standard_normal((n, x.size))
