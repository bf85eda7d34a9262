"""``python -m minilora.puzzles``: list, start, check, hint, show."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..cli.main import settled
from ..cli.options import add_json
from ..cli.output import show as put
from ..cli.parser import Parser
from ..cli.terms import CHECK_FAILED, OK, UsageError, nearest, printable
from .catalogue import PUZZLES, named, number_of
from .files import FOLDER, file_name, found_by, inside, usual_folder, write
from .notebook import graded_files, hint_text, show_text
from .puzzle import COMMAND

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code, and never ends the process.

    Examples
    --------
    >>> main(["hint", "dx", "3"])
    dx, hint 3 of 3
      (N, out) times (out, in) is (N, in): nothing has to be transposed.
    the answer: python -m minilora.puzzles show dx --solution
    0
    """
    given = list(sys.argv[1:] if argv is None else argv)
    return settled(COMMAND, lambda: command(given))


def command(given: list[str]) -> int:
    name, words = (given[0], given[1:]) if given else ("list", [])
    if name in ("-h", "--help", "help"):
        print(overview())
        return OK
    if name not in VERBS:
        raise UsageError(f"there is no word '{printable(name)}'{nearest(name, VERBS)}\n{overview()}")
    verb = VERBS[name]
    parser = Parser(name, verb.line, f"example:\n  {COMMAND} {verb.example}", command=COMMAND, config=False)
    verb.add_arguments(parser)
    if "-h" in words or "--help" in words:
        parser.print_help()
        return OK
    args = parser.words(words)
    args.verb = "puzzles"
    return verb.run(args)


def overview() -> str:
    lines = [f"  {name:<6} {verb.line}" for name, verb in VERBS.items()]
    return "\n".join([f"usage: {COMMAND} WORD ...", "", *lines, "", f"{COMMAND} WORD --help shows its options.",
                      "Exit codes: 0 done or all passed, 1 failed, 2 wrong command, 3 not passed yet,", "130 interrupted."])


# -- list -------------------------------------------------------------------------------------------------------------


def list_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, help="with your files (default: puzzles)")
    add_json(parser)


def list_puzzles(args: Namespace) -> int:
    if args.folder is not None and not args.folder.is_dir():
        name = printable(str(args.folder))
        raise UsageError(f"there is no folder {name}: {COMMAND} start {name} makes it")
    folder = args.folder or usual_folder()
    states: dict[str, list[str]] = {}
    for graded in graded_files(inside(folder)):
        states.setdefault(graded.puzzle, []).append(graded.status)
    rows, entries = [], []
    for puzzle in PUZZLES.values():
        state = states.get(puzzle.name, [])
        best = "passed" if "passed" in state else "" if set(state) <= {"unwritten"} else "not yet"
        rows.append(f"{number_of(puzzle):>2}  {puzzle.name:<11}  {puzzle.teaches:<54}  {best}".rstrip())  # needs no NumPy
        entries.append({"number": number_of(puzzle), "puzzle": puzzle.name, "teaches": puzzle.teaches,
                        "begun": bool(best), "passed": best == "passed"})
    solved = sum(bool(entry["passed"]) for entry in entries)
    end = (f"{solved} of {len(rows)} passed in {printable(str(folder))}; {COMMAND} check says more" if states
           else f"{COMMAND} start writes a file for each into the folder {FOLDER}")
    put(args, {"folder": str(folder), "solved": solved, "puzzles": entries},
        "\n".join([*rows, "", end]))
    return OK


# -- start ------------------------------------------------------------------------------------------------------------


def start_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=FOLDER, help="default: puzzles")
    parser.add_argument("--only", metavar="A,B,..", help="these puzzles, by name or number")
    parser.add_argument("--next", action="store_true", help="one: the first that has no file yet")


def start(args: Namespace) -> int:
    chosen = list(PUZZLES.values())
    if args.only is not None:
        if args.next:
            raise UsageError("--only and --next exclude each other")
        chosen = [named(word.strip()) for word in args.only.split(",")]
    if args.next:
        chosen = [puzzle for puzzle in chosen if not (args.folder / file_name(puzzle)).exists()][:1]
        if not chosen:
            raise UsageError(f"all {len(PUZZLES)} puzzles have a file in {printable(str(args.folder))} already")
    new, kept = write(args.folder, chosen)
    lines = [f"wrote {count(len(new), 'file')} into {args.folder}"]
    if kept:
        lines.append(f"{count(len(kept), 'file')} was there and stays as it is" if len(kept) == 1 else
                     f"{count(len(kept), 'file')} were there and stay as they are")
    if new:
        first = chosen[[args.folder / file_name(puzzle) for puzzle in chosen].index(new[0])]
        target = first.name if args.folder == FOLDER else new[0]
        lines += [f"open {new[0]} in an editor, write your line, then:", f"  {COMMAND} check {target}"]
    put(args, {}, "\n".join(lines))
    return OK


def count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


# -- check ------------------------------------------------------------------------------------------------------------


def check_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("words", metavar="NAME|FILE|FOLDER", nargs="*",
                        help="puzzles by name or number, files, or folders with all in them (default: all in ./puzzles)")
    add_json(parser)


def check(args: Namespace) -> int:
    graded = graded_files(found_by(args.words))
    passed = [each for each in graded if each.passed]
    lines = []
    for each in graded:
        number = number_of(named(each.puzzle))
        lines += [f"{number:>2}  {each.puzzle:<11}  {each.said:<15}  {each.file}", *(f"  {line}" for line in each.details())]
    files = [{"file": each.file, "puzzle": each.puzzle, "number": number_of(named(each.puzzle)), "status": each.status,
              "words": each.words, "printed": each.printed} for each in graded]
    put(args, {"passed": len(passed) == len(graded), "solved": len(passed), "files": files},
        "\n".join([*lines, "", ending(graded)]))
    return OK if len(passed) == len(graded) else CHECK_FAILED


def ending(graded: Sequence[Any]) -> str:
    """What to do next."""
    names = [puzzle for puzzle in PUZZLES if any(each.puzzle == puzzle for each in graded)]
    open_names = [name for name in names if any(each.puzzle == name and not each.passed for each in graded)]
    said = f"{sum(each.passed for each in graded)} of {len(graded)} passed"
    if open_names:
        return f"{said}\nstuck? {COMMAND} hint {open_names[0]}"
    if len(names) == len(PUZZLES):
        return f"{said}: you have derived a LoRA layer and what trains it"
    rest = [puzzle for puzzle in PUZZLES if number_of(PUZZLES[puzzle]) > number_of(PUZZLES[names[-1]])]
    last = PUZZLES[names[-1]]
    return f"{said}\nthe same in the library: {last.see}" + (f"\nnext: {rest[0]}" if rest else "")


# -- hint and show ----------------------------------------------------------------------------------------------------


def hint_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the puzzle, or its number")
    parser.add_argument("number", metavar="1|2|3", nargs="?", type=int, choices=(1, 2, 3), default=1,
                        help="1 is a nudge, 2 the idea, 3 all but the line (default: 1)")


def hint(args: Namespace) -> int:
    name = named(args.name).name
    more = (f"more: {COMMAND} hint {name} {args.number + 1}" if args.number < 3 else
            f"the answer: {COMMAND} show {name} --solution")
    put(args, {}, f"{hint_text(name, args.number)}\n{more}")
    return OK


def show_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the puzzle, or its number")
    parser.add_argument("--solution", action="store_true", help="the code that solves it, and not the task")


def show(args: Namespace) -> int:
    put(args, {}, show_text(args.name, args.solution))
    return OK


class Verb(NamedTuple):
    """A word of the command."""

    line: str
    example: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]


VERBS = {
    "list": Verb("all puzzles, and which of them you have solved", "list", list_arguments, list_puzzles),
    "start": Verb("write a file for each puzzle; none that exists is changed", "start --only 1,2,3", start_arguments, start),
    "check": Verb("grade your files and say what is wrong", "check dA", check_arguments, check),
    "hint": Verb("one of three hints to a puzzle", "hint dA 2", hint_arguments, hint),
    "show": Verb("the task of a puzzle, or its solution", "show dA --solution", show_arguments, show),
}
