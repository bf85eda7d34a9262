"""``--config FILE`` and ``--print-config``: the options of a verb as a file, TOML or JSON.

A key is the long name of a flag, or the name of a word in its place, with ``-`` or ``_``. What stands in the section of a verb,
``[train]``, holds for that verb alone; what stands above the first section holds for whichever verb is given the file. Values
are defaults: a flag on the command line goes before them. Paths are seen from the current folder, as on the command line.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .parser import Parser, loosen, options_of
from .terms import UsageError, nearest, printable

__all__ = ["apply", "as_toml", "keep_texts", "read"]

LONGEST = 1 << 20  # bytes


def read(path: Path) -> dict[str, Any]:
    """The table in a file.

    Raises
    ------
    FileError
        If the operating system cannot give it.
    FormatError
        If it is no JSON.
    UsageError
        If it is no TOML, or of neither kind.
    """
    if path.suffix == ".json":
        from ..formats.adapters.found import read_json

        return read_json(path)
    if path.suffix != ".toml":
        raise UsageError(f"--config {path}: expected a file with the ending .toml or .json")
    try:
        if path.stat().st_size > LONGEST:
            raise UsageError(f"--config {path}: {path.stat().st_size:,} bytes, far more than a config has")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {path}: no text in UTF-8 at byte {error.start}") from None
    toml = _toml()
    try:
        return toml.loads(text.replace("\r\n", "\n"))  # type: ignore[no-any-return]
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--config {path}: no TOML: {error}") from None


def _toml() -> Any:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib  # type: ignore[import-not-found, no-redef, unused-ignore]
        except ImportError:
            raise UsageError("reading TOML needs Python 3.11 or the package tomli: pip install tomli. Or give the same as "
                             ".json") from None
    return tomllib


def apply(parser: Parser, verb: str, verbs: Collection[str], path: Path, given: Collection[str]) -> None:
    """Make the values of a file the defaults of a parser. `given` are the options on the command line, which go before.

    Raises
    ------
    UsageError
        With every key that is not known and every value of a wrong kind.
    """
    table, options = read(path), options_of(parser)
    wrong: list[str] = []
    found: dict[str, tuple[argparse.Action, Any]] = {}
    for name, value in _of_verb(table, verb, verbs, wrong):
        action = options.get(name.replace("-", "_"))
        if action is None:
            known = [*options, *(verbs if isinstance(value, Mapping) else ())]
            wrong.append(f"{printable(name)} is no option of minilora {verb}{nearest(name.replace('-', '_'), known)}")
        elif value is not None:  # null: not said
            try:
                found[action.dest] = action, _value(action, value)
            except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
                wrong.append(f"{printable(name)}: {error}")
    if wrong:
        raise UsageError(f"--config {path}: {'; '.join(wrong)}")
    for group in parser._mutually_exclusive_groups:
        members = {action.dest for action in group._group_actions}
        if members & set(given):  # the command line says which
            found = {dest: pair for dest, pair in found.items() if dest not in members}
        both = sorted(members & found.keys())
        if len(both) > 1:
            raise UsageError(f"--config {path}: {' and '.join(both)} exclude each other")
        group.required = group.required and not both
    for action, value in found.values():
        action.default = value
        loosen(action)


def _of_verb(table: Mapping[str, Any], verb: str, verbs: Collection[str], wrong: list[str]) -> list[tuple[str, Any]]:
    """The keys and values that hold for a verb: its own after those for all."""
    own = table.get(verb, {})
    if not isinstance(own, Mapping):
        wrong.append(f"[{verb}]: expected a section of options, got {own!r:.60}")
        own = {}
    every = [(key, value) for key, value in table.items() if not (key in verbs and (isinstance(value, Mapping) or key == verb))]
    return [*every, *own.items()]


def _value(action: argparse.Action, value: Any) -> Any:
    """A value of a file as the option's own. ValueError says what was expected."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {value!r:.60}")
        on = value if isinstance(action, argparse.BooleanOptionalAction) else action.const
        return on if value else False if isinstance(action, argparse.BooleanOptionalAction) else action.default
    if isinstance(action, argparse._AppendAction) or action.nargs in ("*", "+") or isinstance(action.nargs, int):
        if not isinstance(value, list):
            raise ValueError(f"expected a list, got {value!r:.60}")
        return [_one(action, each) for each in value]
    return _one(action, value)


def _one(action: argparse.Action, value: Any) -> Any:
    kind = action.type or str
    whole, number = type(value) is int, type(value) in (int, float)
    if kind is int:
        fits, expected = whole, "a whole number"
    elif kind is float:
        fits, expected = number, "a number"
    elif kind in (str, Path):
        fits, expected = isinstance(value, str), "a text"
    else:  # a kind of its own, which reads texts, such as a share or a count
        fits, expected = isinstance(value, str) or number, "a text or a number"
    if not fits:
        raise ValueError(f"expected {expected}, got {value!r:.60}")
    made = kind(value) if kind in (int, float, str, Path) else kind(str(value))  # type: ignore[operator]
    if action.choices is not None and made not in action.choices:
        raise ValueError(f"expected one of {', '.join(map(str, action.choices))}, got {value!r:.60}"
                         f"{nearest(str(value), map(str, action.choices))}")
    return made


def keep_texts(parser: Parser) -> None:
    """Before the rest for ``--print-config``: values of kinds of their own stay as they were typed."""
    for action in parser._actions:
        if action.type not in (None, int, float):
            action.type = _kept(action.type)


def as_toml(parser: Parser, verb: str, given: list[str]) -> str:
    """What the words and a config file applied before make of the options, as a file for ``--config``; what must be given and
    is not stands there as a comment."""
    parser.loosen()
    args, lines, done = parser.words(given), [f"[{verb}]"], set()
    for name, action in options_of(parser).items():
        value = getattr(args, action.dest)
        if action.nargs == 0 and not isinstance(action, argparse.BooleanOptionalAction):
            value = value == action.const
        elif action.dest in done:  # a second name of the same option
            continue
        elif action.type not in (None, int, float) and value is not None:  # a kind of its own reads texts, of its default too
            value = [str(each) for each in value] if isinstance(value, (list, tuple)) else str(value)
        done.add(action.dest)
        said = value is not None and value != []
        lines.append(f"{name.replace('_', '-')} = {_toml_value(value)}" if said else f"# {name.replace('_', '-')} =")
    return "\n".join(lines)


def _kept(kind: Any) -> Any:
    """A kind that checks a text, and leaves it as it was typed."""
    def keep(text: str) -> str:
        kind(text)
        return text
    return keep


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)  # inf and nan are TOML's words too
    text = str(value)
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UsageError(f"{text!r}: not in UTF-8, which no TOML file can hold")
    kept = (c if c.isprintable() and c.isascii() and c not in '\\"' else f"\\U{ord(c):08x}" for c in text)
    return f'"{"".join(kept)}"'
