"""All or nothing: what an error or Ctrl-C interrupts, between whichever two instructions, has happened wholly or not at all.

What these calls change are references: attributes of modules, entries of their lists and dicts, fields of parameters. All of
them are written down before, without a copy of any array, and put back if the change does not come to its end. Arrays that are
written in place are named by the caller and copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from ..tensor import Parameter

__all__ = ["all_or_nothing", "rehearse"]

Array = Any
T = TypeVar("T")

FIELDS = (*Parameter.__slots__, "data")


class _Picture(NamedTuple):
    """What some modules hold. The objects in it are those of the modules; only `arrays` has copies."""

    dicts: list[tuple[dict[Any, Any], dict[Any, Any]]]  # attributes of modules too
    lists: list[tuple[list[Any], list[Any]]]
    parameters: list[tuple[Parameter, list[Any]]]
    arrays: list[tuple[Array, Array]]


def all_or_nothing(change: Callable[[], T], modules: Iterable[Any], arrays: Iterable[Array] = ()) -> T:
    """Run `change`; if it does not come to its end, put back all that these modules, and those inside, hold.

    Parameters
    ----------
    change : callable
        Its result is returned. What it makes anew is its own affair.
    modules : iterable of Module
    arrays : iterable of array
        Those whose numbers it writes over.
    """
    before = _picture(modules, arrays)
    try:
        return change()
    except BaseException:
        _put_back(before)
        raise


def rehearse(change: Callable[[], T], modules: Iterable[Any]) -> T:
    """Run `change`, and put back in any case what these modules, and those inside, hold. It writes into no array of theirs."""
    before = _picture(modules, ())
    try:
        return change()
    finally:
        _put_back(before)


def _picture(modules: Iterable[Any], arrays: Iterable[Array]) -> _Picture:
    picture = _Picture([], [], [], [(array, array.copy()) for array in arrays])
    seen: set[int] = set()
    stack = list(modules)
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        _note(picture, vars(module))
        picture.parameters.extend((p, [getattr(p, name) for name in FIELDS]) for _, p in module.own_parameters())
        stack += [child for _, child in module.children()]
    return picture


def _note(picture: _Picture, container: Any) -> None:
    """Write down a list, tuple or dict, and those inside of it; none holds itself, which `nn.contents` refuses."""
    if isinstance(container, dict):
        picture.dicts.append((container, dict(container)))
        container = container.values()
    elif isinstance(container, list):
        picture.lists.append((container, list(container)))
    for value in container:
        if isinstance(value, (list, tuple, dict)):
            _note(picture, value)


def _put_back(picture: _Picture) -> None:
    for now, entries in picture.dicts:
        for key in now.keys() - entries.keys():
            del now[key]
        now.update(entries)
    for items, old in picture.lists:
        items[:] = old
    for p, values in picture.parameters:
        for name, value in zip(FIELDS, values):
            setattr(p, name, value)
    for array, numbers in picture.arrays:
        array[...] = numbers
