"""Grading the backward of an operation: its gradients against numerical ones, with gradcheck's diagnosis."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy

from ...backend import to_host
from ...engine import Op, apply
from ...tensor import Parameter, Tensor
from ...testing import compare, gradcheck
from ..draw import SINGLE, Draw
from ..puzzle import Operation
from .answers import at, kind, learners, own
from .function import same
from .outcome import WRONG, Stopped

__all__ = ["grade"]

Array = Any


def grade(puzzle: Operation, answer: Any) -> None:
    """Return if the operation's backward is right; `Stopped` says why it is not."""
    if not (isinstance(answer, type) and issubclass(answer, Op)):
        raise Stopped(WRONG, [f"{puzzle.find} is {kind(answer)}: keep it a class that begins with class {puzzle.find}(Op)"])
    solution = own(puzzle, puzzle.answer)
    for place, case in enumerate(puzzle.cases):
        inputs = puzzle.points(Draw(place, case))
        try:
            with learners():
                came, meant = (output(puzzle, op, inputs).data for op in (answer, solution))
                gradients(puzzle, answer, inputs)  # the walk refuses another shape or dtype
                problems = checked(puzzle, answer, inputs) if case != SINGLE else []
        except Stopped as stopped:
            where = [at(inputs, case)] if stopped.words else []
            raise Stopped(stopped.status, [*(with_names(puzzle, inputs, text) for text in stopped.words), *where]) from None
        if not compare("y", came, meant, 1e-3 if case == SINGLE else None):
            raise Stopped(WRONG, ["forward gives other numbers than it did: put its lines back as they were "
                                  f"(show {puzzle.name}); only backward is to be written"])
        if problems:
            raise Stopped(WRONG, [*problems, at(inputs, case), *why(puzzle, answer, inputs)])


def checked(puzzle: Operation, op: type[Op], inputs: Mapping[str, Any]) -> list[str]:
    """What gradcheck finds wrong."""
    constants = constants_of(puzzle, inputs)
    report = gradcheck(function(puzzle, op, inputs, constants), *(inputs[name] for name in puzzle.wanted),
                       parameters=list(constants.items()))
    found = [f"d{row.name}: {row.guess}" for row in report.rows if not row.passed]
    return found + [f"{check.name}: {check.detail}" for check in report.checks if not check.passed]


def with_names(puzzle: Operation, inputs: Mapping[str, Any], text: str) -> str:
    """The engine's "input 1" with the name that it has here."""
    names = [name for name in inputs if name not in puzzle.settings]
    for number, name in enumerate(names):
        text = re.sub(rf"\binput {number}\b", f"input {number} ({name})", text)
    return text


def constants_of(puzzle: Operation, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inputs that want no gradient."""
    return {name: Tensor(value) for name, value in inputs.items() if name not in (*puzzle.wanted, *puzzle.settings)}


def function(puzzle: Operation, op: type[Op], inputs: Mapping[str, Any],
             constants: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    """The operation as a function of those inputs that want a gradient, under their names."""
    settings = {name: inputs[name] for name in puzzle.settings}

    def f(*leaves: Any) -> Tensor:
        values = {**constants, **dict(zip(puzzle.wanted, leaves))}
        return apply(op, *(values[name] for name in inputs if name in values), **settings)

    f.__signature__ = inspect.Signature([  # type: ignore[attr-defined]  # gradcheck names the leaves after it
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in puzzle.wanted])
    return f


def output(puzzle: Operation, op: type[Op], inputs: Mapping[str, Any]) -> Tensor:
    f = function(puzzle, op, inputs, constants_of(puzzle, inputs))
    return f(*(Parameter(inputs[name]) for name in puzzle.wanted))


def gradients(puzzle: Operation, op: type[Op], inputs: Mapping[str, Any]) -> list[Array]:
    """One for each wanted input, under a cotangent that is always the same."""
    leaves = [Parameter(inputs[name]) for name in puzzle.wanted]
    y = function(puzzle, op, inputs, constants_of(puzzle, inputs))(*leaves)
    y.backward(gradient=numpy.random.default_rng(0).standard_normal(y.shape).astype(y.dtype))
    return [to_host(leaf.grad) for leaf in leaves]


def why(puzzle: Operation, op: type[Op], inputs: Mapping[str, Any]) -> list[str]:
    """The explanation of the known mistake that gives the same gradients, if there is one."""
    try:
        with learners():
            mine = gradients(puzzle, op, inputs)
    except Stopped:
        return []
    for mistake in puzzle.mistakes:
        if mistake.why:
            try:
                with learners():
                    theirs = gradients(puzzle, own(puzzle, mistake.text), inputs)
            except Stopped:
                continue
            if all(map(same, mine, theirs)):
                return [mistake.why]
    return []
