"""Grading a function of arrays: beside what the library computes, at several points."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy

from ...testing import compare
from ..draw import Draw
from ..puzzle import Function, called
from .answers import at, changed, kind, learners, own, takes, untouched
from .outcome import BROKEN, UNWRITTEN, WRONG, Stopped

__all__ = ["grade"]

Array = Any
SINGLE_RTOL = 1e-3  # of an element, in float32: ten thousand roundings, and no wrong formula is so near


def grade(puzzle: Function, answer: Any) -> None:
    """Return if the answer is right; `Stopped` says why it is not."""
    before: Any = None
    for place, case in enumerate(puzzle.cases):
        inputs = puzzle.points(Draw(place, case))
        if puzzle.run is called:
            takes(puzzle, answer, list(inputs))
        try:
            with learners():
                mine = outputs(puzzle, answer, inputs)
        except Stopped as stopped:
            where = [at(inputs, case)] if stopped.status == BROKEN else []
            raise Stopped(stopped.status, [*stopped.words, *where]) from None
        right = as_tuple(puzzle, puzzle.right(**copy.deepcopy(inputs)))
        problems = [text for name, a, b in zip(puzzle.outputs, mine, right) for text in differences(name, a, b, puzzle.exact)]
        if problems:
            raise Stopped(WRONG, [*problems, at(inputs, case), *why(puzzle, inputs, mine)])
        if before is not None and changed(*before):
            raise Stopped(WRONG, ["the second call changed what the first had returned: make a new array in every call"])
        before = copy.deepcopy(mine), mine


def outputs(puzzle: Function, answer: Any, inputs: dict[str, Any]) -> tuple[Any, ...]:
    """What the answer gives, one for each name."""
    given = untouched(inputs, lambda copies: puzzle.run(answer, copies))
    if given is None:
        raise Stopped(WRONG, [f"{puzzle.find} gave None: is its return missing?"])
    if given is Ellipsis:
        raise Stopped(UNWRITTEN)
    names = ", ".join(puzzle.outputs)
    if len(puzzle.outputs) == 1:
        if isinstance(given, (tuple, list)):
            raise Stopped(WRONG, [f"{puzzle.find} gave {kind(given)}: return {names} itself"])
    elif not isinstance(given, (tuple, list)) or len(given) != len(puzzle.outputs):
        came = f"{len(given)} values" if isinstance(given, (tuple, list)) else kind(given)
        raise Stopped(WRONG, [f"{puzzle.find} gave {came}: return the {len(puzzle.outputs)} values {names}"])
    return as_tuple(puzzle, given)


def as_tuple(puzzle: Function, given: Any) -> tuple[Any, ...]:
    return (given,) if len(puzzle.outputs) == 1 else tuple(given)


def differences(name: str, mine: Any, right: Any, exact: bool) -> list[str]:
    """What is wrong with one output; nothing if it is right."""
    if isinstance(right, bool):
        if not isinstance(mine, (bool, numpy.bool_)):
            return [f"{name} is {kind(mine)}, and should be True or False"]
        return [] if mine == right else [f"{name} is {bool(mine)}, and should be {right}"]
    if isinstance(right, float):
        return number_differs(name, mine, right)
    if not isinstance(mine, (numpy.ndarray, numpy.generic)):
        return [f"{name} is {kind(mine)}, and should be an array of shape {right.shape}"]
    if mine.dtype.kind not in "fiubc":
        return [f"{name} is an array of dtype {mine.dtype}, and should be {right.dtype}"]
    comparison = compare(name, mine, right, 0.0 if exact else SINGLE_RTOL if right.dtype == "float32" else None)
    if mine.shape != right.shape:
        return [f"{name}: {comparison.guess}"]
    if mine.dtype != right.dtype:
        return [f"{name} is {mine.dtype} although the inputs are {right.dtype}: write constants as Python numbers, and make "
                f"arrays with the dtype of an input, as np.zeros_like(x) does"]
    if comparison.passed:
        return []
    where = f"at {comparison.index} " if comparison.index else ""
    values = f"{where}this is {comparison.mine:.6g} and should be {comparison.reference:.6g}"
    if exact and compare(name, mine, right):
        return [f"{name} is right to rounding, but not to the last bit: {where}it differs by {comparison.max_abs:.1e}"]
    return [f"{name}: {comparison.guess}", f"{name}: {values}"]


def number_differs(name: str, mine: Any, right: float) -> list[str]:
    if isinstance(mine, numpy.generic):
        return [f"{name} is a numpy.{type(mine).__name__}, which turns float32 arrays into float64: make it a Python float, "
                f"with math in place of numpy or with float(...)"]
    if isinstance(mine, bool) or not isinstance(mine, (int, float)):
        return [f"{name} is {kind(mine)}, and should be a number"]
    comparison = compare(name, float(mine), right, 1e-12)
    return [] if comparison.passed else [f"{name} is {mine:.6g} and should be {right:.6g}"]


def why(puzzle: Function, inputs: dict[str, Any], mine: Sequence[Any]) -> list[str]:
    """The explanation of the known mistake that gives the same, if there is one."""
    for mistake in puzzle.mistakes:
        if not mistake.why:
            continue
        try:
            with learners():
                theirs = outputs(puzzle, own(puzzle, mistake.text), inputs)
        except Stopped:
            continue
        if all(same(a, b) for a, b in zip(mine, theirs)):
            return [mistake.why]
    return []


def same(mine: Any, theirs: Any) -> bool:
    """Whether two outputs are of one kind and equal but for rounding."""
    arrays = isinstance(mine, (numpy.ndarray, numpy.generic)), isinstance(theirs, (numpy.ndarray, numpy.generic))
    if arrays != (True, True):
        return type(mine) is type(theirs) and bool(mine == theirs)
    return bool(mine.shape == theirs.shape and mine.dtype == theirs.dtype
                and compare("", mine, theirs, SINGLE_RTOL if mine.dtype == "float32" else None))
