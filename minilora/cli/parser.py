"""The parser of one verb: its help on one screen, its mistakes as errors that name the nearest flag."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..terminal import columns_of, wrapped
from .terms import UsageError, nearest, printable

__all__ = ["Parser", "loosen", "options_of"]

ALWAYS = "always: -h, --quiet (no notes), --config FILE.toml|.json, --print-config"


class Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` with a short usage line, which raises `UsageError` and never ends the process by an error.

    Flags are not abbreviated: a script must not change its meaning when a verb gets another flag.
    """

    def __init__(self, verb: str, line: str, epilog: str, command: str = "minilora", config: bool = True) -> None:
        super().__init__(prog=f"{command} {verb}", description=f"{line[:1].upper()}{line[1:]}.", allow_abbrev=False,
                         formatter_class=Formatter, add_help=False,
                         epilog=f"{epilog.strip()}\n\n{ALWAYS if config else ALWAYS.partition(', --config')[0]}")
        self.line = ""  # of the usage, from when parsing has begun
        self.color = False  # of Python 3.14: help is the same everywhere
        for flag, more in {"--quiet": {"action": "store_true"}, "--config": {"metavar": "FILE", "type": Path},
                           "--print-config": {"action": "store_true"}}.items():
            if not config and "config" in flag:
                continue
            self.add_argument(flag, help=argparse.SUPPRESS, **more)  # type: ignore[arg-type]  # told in one line below
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)

    def format_usage(self) -> str:
        return f"usage: {self.brief()}\n"

    def format_help(self) -> str:
        self.usage = self.brief().replace("%", "%%")  # argparse's own lists every flag, which the help does below it
        try:
            return super().format_help()
        finally:
            self.usage = None

    def print_help(self, file: Any = None) -> None:
        print(wrapped(self.format_help(), columns_of(sys.stdout)), end="")

    def brief(self) -> str:
        """The command with what it cannot do without."""
        if self.line:
            return self.line
        words, optional = [self.prog], False
        for action in self._actions:
            name = str(action.metavar or action.dest.upper())
            if not action.option_strings:
                words.append({"?": f"[{name}]", "*": f"[{name}...]", "+": f"{name}..."}.get(str(action.nargs), name))
            elif action.required:
                words.append(f"{action.option_strings[0]} {name}")
            else:
                optional = optional or action.help != argparse.SUPPRESS
        return " ".join([*words, *(["[options]"] if optional else [])])

    def wanted(self) -> list[tuple[str, set[str]]]:
        """What must be given: its name in messages, and the `dest` of each option one of which will do."""
        found = []
        for action in self._actions:
            if action.required if action.option_strings else action.nargs in (None, "+"):
                name = str(action.metavar or action.dest.upper())
                found.append((" ".join([*action.option_strings[:1], name]), {action.dest}))
        for group in self._mutually_exclusive_groups:
            if group.required:
                names = " or ".join(action.option_strings[-1] for action in group._group_actions)
                found.append((names, {action.dest for action in group._group_actions}))
        return found

    def loosen(self) -> None:
        """Take everything as something that may be left out."""
        self.line = self.brief()
        for action in self._actions:
            loosen(action)
        for group in self._mutually_exclusive_groups:
            group.required = False

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n{self.format_usage()}{self.prog} --help tells more")

    def words(self, given: Sequence[str]) -> argparse.Namespace:
        """Parse; unknown flags are told before what is missing, which may be what they were meant for."""
        unknown = [flag for flag in flags(given) if flag.startswith("--") and flag not in self._option_string_actions]
        if unknown:
            self.error("; ".join(f"there is no option {printable(flag)}{nearest(flag, self.shown())}" for flag in unknown))
        wanted = self.wanted()
        self.loosen()  # argparse would tell of one kind of what is missing, and not of the other
        args, extra = self.parse_known_intermixed_args(given)  # adapters may stand before and behind -o OUT
        if extra:
            self.error(f"too many words, or an option that is not there: {' '.join(map(printable, extra))}")
        named = self.named(given)
        missing = [name for name, dests in wanted
                   if not dests & named and all(getattr(args, dest) in (None, []) for dest in dests)]
        if missing:
            self.error(f"missing: {', '.join(missing)}")
        return args

    def shown(self) -> list[str]:
        """All flags by their long names."""
        return [flag for flag in self._option_string_actions if flag.startswith("--")]

    def named(self, given: Sequence[str]) -> set[str]:
        """The `dest` of the options that the words name."""
        short = {flag: action for flag, action in self._option_string_actions.items() if not flag.startswith("--")}
        found = set()
        for flag in flags(given):
            action = self._option_string_actions.get(flag) or short.get(flag[:2])
            if action is not None:
                found.add(action.dest)
        return found


def loosen(action: argparse.Action) -> None:
    """Take an option as one that may be left out."""
    action.required = False
    if not action.option_strings and action.nargs in (None, "+"):
        action.nargs = "*" if action.nargs else "?"


def flags(given: Sequence[str]) -> list[str]:
    """The words that are flags, without ``=VALUE``."""
    end = list(given).index("--") if "--" in given else len(given)
    return [word.partition("=")[0] for word in given[:end] if len(word) > 1 and word[0] == "-" and not word[1].isdigit()
            and word[1] != "."]


def options_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """What a config file may set: the long names of options, and the names of the words in places, with ``_`` for ``-``."""
    found: dict[str, argparse.Action] = {}
    for action in parser._actions:
        if action.dest in ("help", "config", "print_config") or action.dest == argparse.SUPPRESS:
            continue
        long = [flag[2:] for flag in action.option_strings if flag.startswith("--")]
        if isinstance(action, argparse.BooleanOptionalAction):
            long = [flag for flag in long if not flag.startswith("no-")]
        for name in long or [action.dest]:
            found[name.replace("-", "_")] = action
    return found
