"""What is inside a module: its attributes, and what lies in lists, tuples and dicts among them, at any depth.

Nothing is registered: the attributes are read anew each time, in the order of their assignment. Sets, other containers and
plain objects are not looked into, so a parameter there is neither trained nor saved.

Everything has a path, as in ``blocks.0.fc``, and a place, as Python writes it: ``.blocks[0].fc``. Paths are what files know,
so two places with one path (the keys 0 and "0" of a dict, or a key with a dot) are refused, both named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ..errors import StateError

__all__ = ["entries", "exchange", "modules_in", "values_in"]

PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None)})  # most of what lists hold: passed over at once

Entry = tuple[str, str, Any]  # the path from the owner, the place there, and what is found


def entries(owner: Any, kind: type) -> Iterator[Entry]:
    """What an object holds of one kind: in its attributes, and in lists, tuples and dicts among them."""
    for name, value in vars(owner).items():
        if isinstance(value, kind):
            yield name, f".{name}", value
        elif isinstance(value, (list, tuple, dict)):
            yield from _inside(name, f".{name}", value, kind, ())


def _inside(path: str, place: str, container: Any, kind: type, above: tuple[Any, ...]) -> Iterator[Entry]:
    if any(container is outer for outer in above):
        raise StateError(f"{place} is a {type(container).__name__} that holds itself, so that it has no end: take it out")
    above = (*above, container)
    for key, item in container.items() if isinstance(container, dict) else enumerate(container):
        if item.__class__ in PLAIN:
            continue
        if isinstance(item, kind):
            yield f"{path}.{key}", f"{place}[{key!r}]", item
        elif isinstance(item, (list, tuple, dict)):
            yield from _inside(f"{path}.{key}", f"{place}[{key!r}]", item, kind, above)


def modules_in(root: Any, kind: type, prefix: str = "", through: Callable[[Any], Any] | None = None) -> Iterator[Entry]:
    """(path, place, module) of every module, the root first; one that is shared comes at each of its places.

    Parameters
    ----------
    root : Module
    kind : type
        The base class of modules.
    prefix : str
        The path of the root.
    through : callable, optional
        What stands in the place of a module: it is given in its stead, and looked into.

    Raises
    ------
    StateError
        If a module is inside itself, or two places have one path.
    """
    seen: dict[str, str] = {}

    def visit(path: str, place: str, module: Any, above: tuple[tuple[Any, str], ...]) -> Iterator[Entry]:
        module = module if through is None else through(module)
        outer = next((name for one, name in above if one is module), None)
        if outer is not None:
            raise StateError(f"{path} is {outer or 'the model itself'} again: a module that is inside itself has no end. Give "
                             f"the {type(module).__name__} to forward, or keep weakref.ref(module) in its place")
        _only_place(seen, path, place)
        yield path, place, module
        above = (*above, (module, path))
        for name, where, child in entries(module, kind):
            yield from visit(f"{path}.{name}" if path else name, place + where, child, above)

    yield from visit(prefix, type(root).__name__, root, ())


def values_in(root: Any, kind: type, *readers: Callable[[Any], Iterable[Entry]]) -> Iterator[tuple[str, Any, Entry]]:
    """(path, module, entry) of what the readers find in each module, module by module.

    Raises
    ------
    StateError
        As `modules_in`.
    """
    seen: dict[str, str] = {}
    for path, place, module in modules_in(root, kind):
        for reader in readers:
            for entry in reader(module):
                name, where, _ = entry
                name = f"{path}.{name}" if path else name
                _only_place(seen, name, place + where)
                yield name, module, entry


def _only_place(seen: dict[str, str], path: str, place: str) -> None:
    other = seen.setdefault(path, place)
    if other is not place:
        raise StateError(f"{other} and {place} have one path, {path!r}, so that a state dict could hold only one of them: "
                         "rename a key")


def exchange(owner: Any, new: Mapping[int, Any]) -> None:
    """Put others in the places of modules, found by identity, wherever `entries` looks: ``new[id(old)]`` for old."""
    for name, value in list(vars(owner).items()):
        other = _exchanged(value, new)
        if other is not value:
            setattr(owner, name, other)


def _exchanged(value: Any, new: Mapping[int, Any]) -> Any:
    """`value` after an exchange: lists and dicts are edited, a tuple is made anew where something in it is another."""
    if id(value) in new:
        return new[id(value)]
    if isinstance(value, dict):
        value.update({key: other for key, item in value.items() if (other := _exchanged(item, new)) is not item})
    elif isinstance(value, list):
        value[:] = [_exchanged(item, new) for item in value]
    elif isinstance(value, tuple):
        items = [_exchanged(item, new) for item in value]
        if any(a is not b for a, b in zip(items, value)):
            return value._make(items) if hasattr(value, "_make") else tuple(items)  # also named tuples
    return value
