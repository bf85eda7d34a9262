"""The tables of docs/coming_from.md, and what the code in a cell needs in order to mean something.

A cell holds code between backticks. It is not run, but resolved: every name must be there, every attribute too, and a call must
fit the signature of what it calls.
"""
import ast
import inspect
import re
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parents[1] / "docs" / "coming_from.md"


class Row(NamedTuple):
    section: str
    line: int
    theirs: list  # the code of each cell
    ours: list
    says: str
    nothing: bool  # whether the middle is a dash


def code(cell):
    return re.findall(r"`([^`]+)`", cell)


def table_rows(text=None):
    """The rows of all tables, with the heading that they stand under."""
    section, rows = "", []
    for number, line in enumerate((text or PAGE.read_text(encoding="utf-8")).splitlines(), 1):
        if line.startswith("#"):
            section = line.lstrip("# ")
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == 3, f"{PAGE.name}:{number}: a row has three cells"
            if not set(cells[0]) <= {"-"} and not cells[2] == "what differs":
                rows.append(Row(section, number, code(cells[0]), code(cells[1]), cells[2], cells[1] == "–"))
    return rows


class Of:
    """An instance of a class, of which only the class is known; `Of(None)` is any value."""

    def __init__(self, cls):
        self.cls = cls


ANY = Of(None)


class Wrong(Exception):
    """What is wrong with a piece of code: the test's message."""


def resolve(text, names, result=lambda function: ANY):
    """Resolve all statements of a piece of code; `Wrong` with the first name that is not there, or call that does not fit.

    `names` are what may be used: objects, and `Of(class)` for their instances. `result` tells what a call of a function gives.
    """
    for statement in ast.parse(text).body:
        for child in ast.iter_child_nodes(statement):
            _value(child, names, result)


def _value(node, names, result):
    if isinstance(node, ast.Name):
        if node.id not in names:
            raise Wrong(f"there is no {node.id}")
        return names[node.id]
    if isinstance(node, ast.Attribute):
        return _attribute(_value(node.value, names, result), node.attr)
    if isinstance(node, ast.Call):
        function = _value(node.func, names, result)
        for part in (*node.args, *(keyword.value for keyword in node.keywords)):
            _value(part, names, result)
        _fits(function, node)
        return Of(function) if isinstance(function, type) else result(function)
    for child in ast.iter_child_nodes(node):
        _value(child, names, result)
    return ANY


def _attribute(thing, name):
    if not isinstance(thing, Of):
        if not hasattr(thing, name):
            raise Wrong(f"{getattr(thing, '__name__', thing)} has no {name}")
        return getattr(thing, name)
    if thing.cls is None:
        return ANY
    fields = {field for cls in thing.cls.__mro__ for field in (*getattr(cls, "__annotations__", ()), *_told(cls))}
    if not hasattr(thing.cls, name):
        if name not in fields:
            raise Wrong(f"{thing.cls.__name__} has no {name}")
        return ANY
    found = getattr(thing.cls, name)
    return found if inspect.isroutine(found) else ANY


def _told(cls):
    """The attributes that a docstring lists."""
    listed = re.search(r"Attributes\n\s*-+\n(.*?)(\n\s*\n\s*\w+\n\s*---|\Z)", cls.__doc__ or "", re.DOTALL)
    return re.findall(r"^\s*(\w+(?:, \w+)*) : ", listed[1], re.MULTILINE) if listed else []


def _fits(function, call):
    if isinstance(function, Of) or any(isinstance(part, ast.Starred) for part in call.args):
        return
    if any(isinstance(part, ast.Constant) and part.value is ... for part in call.args):
        return  # lora.inject(..., exact=True)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # of something built in
    given = [ANY for _ in call.args]
    method = not isinstance(function, type) and "self" in list(signature.parameters)[:1]
    try:
        signature.bind(*([ANY] * method + given), **{keyword.arg: ANY for keyword in call.keywords})
    except TypeError as error:
        raise Wrong(f"{getattr(function, '__name__', function)}: {error}") from None
