"""The command ``minilora``: finds the verb, runs it, and turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from ..errors import DivergedError, MiniloraError
from .terms import DIVERGED, FAILED, INTERRUPTED

__all__ = ["VERBS", "main"]

# verb: its line in the help of the command. The verb stands in the file of that name, which defines
#     EPILOG: str                          a worked example, which a test runs
#     add_arguments(parser) -> None        imports nothing heavy: it runs for --help too
#     run(args) -> int                     the exit code
VERBS: dict[str, str] = {
}


def verb_named(name: str) -> Any:
    """The module of a verb."""
    return import_module(f".{name}", __package__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code.

    Examples
    --------
    >>> main([])
    2
    """
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="minilora", allow_abbrev=False, description="LoRA you can read, prove and run.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for name, line in VERBS.items():
        child = verbs.add_parser(name, help=line, description=line, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in given[:1]:
            verb = verb_named(name)
            child.epilog = verb.EPILOG
            verb.add_arguments(child)
    if not given:
        parser.print_usage(sys.stderr)
        return 2
    args = parser.parse_args(given)
    try:
        return int(verb_named(args.verb).run(args))
    except DivergedError as error:
        return told(error, DIVERGED)
    except MiniloraError as error:
        return told(error, FAILED)
    except KeyboardInterrupt as error:
        return told(error, INTERRUPTED)


def told(error: BaseException, status: int) -> int:
    """Write an error to stderr; gives the status back."""
    print(f"minilora: {error or 'interrupted'}", file=sys.stderr)
    return status
