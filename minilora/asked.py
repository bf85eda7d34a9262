"""What a piece of code asks for by name: variables of the functions around it, globals, attributes, modules."""

from __future__ import annotations

import dis
import functools
import types
from typing import NamedTuple

__all__ = ["Names", "names_in"]


class Names(NamedTuple):
    """What one piece of code asks for, with the functions that are written inside of it.

    Attributes
    ----------
    globals, cells, attributes : set of str
        Of attributes only the names: of which object they are taken, the code does not say where it goes through a variable
        of its own, an argument or a loop.
    modules : set of str
        What it imports when it runs.
    """

    globals: set[str]
    cells: set[str]
    attributes: set[str]
    modules: set[str]


@functools.lru_cache(maxsize=256)
def names_in(code: types.CodeType) -> Names:
    found = Names(set(), set(), set(), set())
    before = None
    for step in dis.get_instructions(code):
        kind, name = step.opname, step.argval
        if kind == "IMPORT_NAME":
            found.modules.add(name)
        elif kind == "MATCH_CLASS" and isinstance(before, tuple):  # case Settings(rate=r)
            found.attributes.update(before)
        elif not isinstance(name, str):
            pass
        elif "ATTR" in kind or "METHOD" in kind or kind == "IMPORT_FROM":
            found.attributes.add(name)
        elif "GLOBAL" in kind or kind == "LOAD_NAME":
            found.globals.add(name)
        elif "DEREF" in kind or "CLOSURE" in kind:
            found.cells.add(name)
        before = name
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            for own, more in zip(found, names_in(inner)):
                own.update(more)
    return found
