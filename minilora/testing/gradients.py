"""gradcheck: hand-written gradients against numerical ones, and what else an operation promises."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy

from .. import backend
from ..errors import ConfigError, MiniloraError
from ..tensor import Tensor
from .differences import MODES, Slope
from .guesses import guess, relative_errors, transposed
from .point import Point
from .reports import Check, Report, Row

__all__ = ["draw_cotangent", "gradcheck"]

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
    report says so, and ``report.untested`` names it. With B = 0 that is dA of a low-rank update: give B random values.

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
        cotangent, gradients, checks = _promises(point, rng)
        rows = []
        if gradients:
            slope = Slope(point, cotangent, mode, rtol)
            if mode == "complex":
                checks.append(_complex_agrees(slope))
            rows = [_row(slope, i, dx, _directions(point.start[i], full_size, directions, rng))
                    for i, dx in enumerate(gradients)]
    return Report(text, rtol, tuple(rows), tuple(checks), point.computed)


def draw_cotangent(y: Tensor, rng: numpy.random.Generator) -> tuple[Array, Array]:
    """A random cotangent for y: on the host, and on y's device in y's dtype."""
    host = rng.standard_normal(y.shape)
    return host, backend.to_device(host.astype(y.dtype), y.device)


# -- what an operation promises ---------------------------------------------------------------------------------------


def _promises(point: Point, rng: numpy.random.Generator) -> tuple[Array, list[Array | None], list[Check]]:
    """The cotangent, the gradients (none if comparing them would be pointless) and the checks."""
    y = point.output()
    changed = point.undo_changes()
    checks = [
        Check("inputs unchanged by f", *_none(changed, "changed: {}. An operation edits only what it made")),
        Check("float64 gives float64", y.dtype == "float64", f"the output is {y.dtype}: write constants as Python "
              "numbers, and make arrays with the dtype of the input"),
    ]
    if not checks[-1].passed:
        return None, [], checks
    host, cotangent = draw_cotangent(y, rng)
    before = numpy.array(backend.to_host(y.data))
    try:
        first = point.gradients(y, cotangent)
    except MiniloraError as error:
        return None, [], [*checks, Check("backward runs", False, str(error))]
    checks.append(Check("inputs unchanged by backward", *_none(point.undo_changes(), "changed: {}")))
    checks.append(Check("cotangent unchanged", _same(host, backend.to_host(cotangent)),
                        "backward wrote into dy, which other operations may read too"))
    cotangent = backend.to_device(host, y.device)
    again = point.output()
    repeats = Check("forward repeats", _same(before, backend.to_host(again.data)), "f gives another output for the "
                    "same input: fix the seed and step of a dropout, or call model.eval()")
    if not repeats.passed:
        return None, [], [*checks, repeats]
    second = point.gradients(again, cotangent)
    checks += [repeats, Check("gradients repeat", *_differ(point, first, second, "other values the second time: {}"))]
    _lend_rooms(point)
    third = point.gradients(point.output(), cotangent)
    for _, leaf in point.leaves:
        leaf.room = None
    if checks[-1].passed:
        checks.append(Check("gradients repeat when written into an array", *_differ(
            point, first, third, "other values when self.into(i) held NaN before: {}. Write every element, reading none")))
    zero = point.gradients(point.output(), backend.to_device(numpy.zeros_like(host), y.device))
    names = [name for (name, _), dx in zip(point.leaves, zero) if dx is not None and dx.any()]
    checks.append(Check("zero cotangent gives zero", *_none(names, "not zero: {}. Is dy left out of the gradient?")))
    return host, first, checks


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


def _complex_agrees(slope: Slope) -> Check:
    errors = relative_errors(slope.complex_output({}).real.reshape(-1), slope.y.reshape(-1))
    return Check("complex and real outputs agree", not errors.size or bool(errors.max() <= 1e-9), "f computes "
                 "something else with complex numbers, so the complex step says nothing about it: use mode='central'")


# -- one leaf ---------------------------------------------------------------------------------------------------------


def _directions(x: Array, full_size: int, n: int, rng: numpy.random.Generator) -> Array | None:
    """n random directions (n, size), or None for all elements one by one."""
    return None if x.size <= full_size else rng.standard_normal((n, x.size))


def _row(slope: Slope, i: int, dx: Array | None, along: Array | None) -> Row:
    name, leaf = slope.point.leaves[i]
    gradient = numpy.zeros(leaf.shape) if dx is None else dx
    n = leaf.size if along is None else len(along)

    def direction(j: int) -> Array:
        v = (numpy.arange(leaf.size) == j).astype("float64") if along is None else along[j]
        return v.reshape(leaf.shape)

    def project(array: Array) -> Array:
        return array.reshape(-1) if along is None else along @ array.reshape(-1)

    analytic = project(gradient)
    numerical = numpy.array([slope(i, direction(j)) for j in range(n)])
    errors = relative_errors(analytic, numerical, slope.noise / slope.rtol)
    wrong = errors > slope.rtol
    worst, text, kink = int(errors.argmax()) if n else 0, "", False
    if wrong.any():
        worst, text, kink, doubtful = _why(slope, i, direction, errors, wrong, numerical)
        if not text and dx is None:
            text = "gradient is zero: none arrived. Is the graph cut, by .data or .detach()?"
        elif not text:
            turned = transposed(gradient)
            columns = [analytic, numerical, wrong, *([] if turned is None else [project(turned)])]
            text = guess(*[numpy.delete(column, doubtful) for column in columns])
    compared = f"{n} {'element' if along is None else 'direction'}{'' if n == 1 else 's'}"
    if not n:
        return Row(name, leaf.shape, compared, 0.0, "-", 0.0, 0.0, True)
    if not (analytic.any() or numerical.any()):
        return Row(name, leaf.shape, compared, 0.0, "-", 0.0, 0.0, True, untested=True)
    where = str(tuple(map(int, numpy.unravel_index(worst, leaf.shape)))) if along is None else f"direction {worst}"
    return Row(name, leaf.shape, compared, float(errors[worst]), where, float(analytic[worst]),
               float(numerical[worst]), not wrong.any(), text, kink)


def _why(slope: Slope, i: int, direction: Callable[[int], Array], errors: Array, wrong: Array,
         numerical: Array) -> tuple[int, str, bool, list[int]]:
    """The worst place where the numerical value can be trusted, or, if there is none, the worst of all, why it cannot,
    and whether that is a kink. Last, the places where it cannot be trusted, as far as they were looked at.
    """
    places = [int(j) for j in numpy.argsort(-errors, kind="stable")[:int(wrong.sum())]]
    objections = {j: slope.objection(i, direction(j), float(numerical[j])) for j in places[:20]}  # 8 evaluations each
    doubtful = [j for j, (text, _) in objections.items() if text]
    if len(doubtful) < len(objections):
        return next(j for j in objections if j not in doubtful), "", False, doubtful
    text, kink = objections[places[0]]
    if kink:
        text += f", at {len(places)} such place{'s' if len(places) > 1 else ''}. Choose another point"
    return places[0], text, kink, doubtful
