"""A learner's code while it runs, and what it was given and gave."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy

from ... import backend
from ...errors import MiniloraError
from ..puzzle import Puzzle
from ..source import load, told
from .outcome import BROKEN, UNWRITTEN, WRONG, Stopped, joined

__all__ = ["at", "changed", "described", "found", "learners", "own", "takes"]

Array = Any


@contextmanager
def learners() -> Iterator[None]:
    """In this block a learner's code runs, on the CPU. Its errors become words, and its warnings are not shown."""
    try:
        with backend.use("cpu"), numpy.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Stopped:
        raise
    except NotImplementedError:
        raise Stopped(UNWRITTEN) from None
    except MiniloraError as error:
        raise Stopped(WRONG, told(error)) from None
    except (Exception, SystemExit) as error:
        raise Stopped(BROKEN, told(error)) from None


def found(puzzle: Puzzle, module: ModuleType) -> Any:
    """The function or class of a module that the puzzle asks for."""
    if not hasattr(module, puzzle.find):
        raise Stopped(BROKEN, [f"there is no {puzzle.find} in this file any more: keep that name"])
    return getattr(module, puzzle.find)


def own(puzzle: Puzzle, text: str | tuple[str, ...]) -> Any:
    """What an answer of the puzzle's own is."""
    return getattr(load(puzzle.filled(text), f"<{puzzle.name}>"), puzzle.find)


def takes(puzzle: Puzzle, answer: Any, names: Sequence[str]) -> None:
    """Stop if the answer cannot be called with so many arguments."""
    if not callable(answer):
        raise Stopped(WRONG, [f"{puzzle.find} is {kind(answer)}, and must be a function"])
    try:
        inspect.signature(answer).bind(*names)
    except TypeError as error:
        raise Stopped(WRONG, [f"{puzzle.find} is called with {joined(names)}: {error}. Write def "
                              f"{puzzle.find}({', '.join(names)})"]) from None
    except ValueError:  # a builtin without a signature
        pass


def changed(before: Any, after: Any) -> bool:
    """Whether an input is not what it was, to the bit."""
    if isinstance(before, (list, tuple)):
        return len(before) != len(after) or any(map(changed, before, after))
    if isinstance(before, numpy.ndarray):
        return bool(before.shape != after.shape or before.tobytes() != after.tobytes())
    return bool(before != after)


def untouched(inputs: Mapping[str, Any], use: Callable[[dict[str, Any]], Any]) -> Any:
    """What `use` makes of copies of the inputs; it must not change them."""
    copies = copy.deepcopy(dict(inputs))
    result = use(copies)
    names = [name for name, value in inputs.items() if changed(value, copies[name])]
    if names:
        raise Stopped(WRONG, [f"{joined(names)} changed: others hold the same array and would see it. Make a new array "
                              f"(a = a * b, not a *= b)"])
    return result


def at(inputs: Mapping[str, Any], case: str) -> str:
    """The point, in words."""
    arrays = [value for value in inputs.values() if isinstance(value, numpy.ndarray) and value.dtype.kind == "f"]
    dtype = f", in {arrays[0].dtype}" if arrays else ""
    return f"{'at' if not case else f'the case of {case}:'} {described(inputs)}{dtype}"


def described(inputs: Mapping[str, Any]) -> str:
    """Names with shapes, or with values where those are short."""
    parts = []
    for name, value in inputs.items():
        if isinstance(value, numpy.ndarray):
            few = value.dtype.kind in "iub" and value.size <= 12
            parts.append(f"{name} = {value.tolist()}" if few else f"{name} {value.shape}")
        elif isinstance(value, list) and value and isinstance(value[0], numpy.ndarray):
            parts.append(f"{name} of shapes {', '.join(str(each.shape) for each in value)}")
        else:
            parts.append(f"{name} = {value}")
    return ", ".join(parts)


def kind(value: Any) -> str:
    """``a list``, ``an int``."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
