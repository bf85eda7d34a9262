"""The command ``minilora``: finds the verb, runs it, and turns errors into one line and an exit code.

A verb is a file of this folder with

    EPILOG: str                        "example:" and below it lines that begin with "  minilora ", which a test runs one after
                                       the other in a folder with the things that tests/example_folder.py lists by name: base,
                                       adapter, other, tuned, encoder, data, texts.txt ...; what they write is new there
    add_arguments(parser) -> None      imports nothing heavy: it runs for --help too
    run(args) -> int                   the exit code; errors are raised. args.verb is the verb, args.words the words behind it

and a line in `VERBS`. --quiet, --config, --print-config and --help are here for all of them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import DivergedError, MiniloraError
from ..flags import on_command_line
from ..terminal import columns_of, fitting, wrapped
from .terms import DIVERGED, FAILED, INTERRUPTED, OK, READER_GONE, USAGE, UsageError, nearest, printable

if TYPE_CHECKING:
    from argparse import Namespace
    from pathlib import Path

    from .parser import Parser

__all__ = ["VERBS", "main"]

# verb: its line in the help of the command. A group a paragraph.
VERBS: dict[str, str] = {
    # look
    "inspect": "what an adapter, a model or a file of tensors is",
    "plan": "what a config would touch in a model, and what training would cost",
    "check": "does an adapter fit a base, and which programs can read it",

    # train and use
    "train": "train an adapter, or a whole model, on rows of text",
    "eval": "the loss of a model on rows of text, its perplexity or accuracy",
    "generate": "a text from a model with adapters, as it comes",
    "embed": "a vector for every text of a file, or how alike a few texts are",

    # bases in low precision
    "quantize": "a model's linear layers in 4 bits, file to file, and back",

    # merge
    "merge": "adapters into the files of a base, in bounded memory",
    "unmerge": "the base again, bit for bit, from a merged folder and its patch",
    "verify": "compute a merge again and compare it with what was written",

    # change adapters
    "extract": "a low-rank adapter of what a fine-tuning changed",
    "combine": "several adapters into one: exact sums, svd, ties, dare",
    "resize": "an adapter of lower ranks, with the error that it costs",
    "convert": "an adapter in another program's dialect",
    "diff": "whether two adapters are the same function, and how far apart",

    # this machine
    "demo": "a small training in seconds, and where the larger demos are",
    "gradcheck": "the gradients of low-rank updates against numerical ones",
    "doctor": "what is here, what works, and what to install where it does not",

}


def verb_named(name: str) -> Any:
    """The module of a verb."""
    return import_module(f".{name}", __package__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code, and never ends the process.

    Examples
    --------
    >>> main([])
    2
    """
    given = list(sys.argv[1:] if argv is None else argv)
    return settled(f"minilora {given[0]}" if given and given[0] in VERBS else "minilora", lambda: command(given))


def settled(name: str, work: Callable[[], int]) -> int:
    """The exit code of a command's work, whatever it raises; what is told of an error begins with the name."""
    with careful():
        try:
            status = guarded(name, work)
            if sys.stdout is not None:  # it was closed before the program began
                sys.stdout.flush()
        except BrokenPipeError:
            nothing_more()
            return READER_GONE
        except OSError as error:
            nothing_more()
            return told(name.partition(" ")[0], f"the output could not be written: {error.strerror or error}", FAILED)
        return status


def guarded(name: str, work: Callable[[], int]) -> int:
    """Run a command with its errors told."""
    try:
        return work()
    except UsageError as error:
        return told(name, error, USAGE)
    except DivergedError as error:
        return told(name, error, DIVERGED)
    except MiniloraError as error:
        return told(name, error, FAILED)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        return told(name, f"{where}{error.strerror or error}", FAILED)
    except MemoryError as error:
        return told(name, str(error) or "out of memory", FAILED)
    except KeyboardInterrupt as error:
        return told(name, str(error) or "interrupted", INTERRUPTED)
    except SystemExit as error:  # --help
        return int(error.code or 0)


def command(given: list[str]) -> int:
    """Run a command; errors go to the caller."""
    if not given:
        text = f"usage: minilora VERB ...\nverbs: {', '.join(VERBS)}\nminilora --help tells more"
        print(wrapped(text, columns_of(sys.stderr)), file=sys.stderr)
        return USAGE
    verb, words = given[0], given[1:]
    if verb in ("-h", "--help", "help"):
        print(wrapped(overview(), columns_of(sys.stdout)))
        return OK
    if verb == "--version":
        from ..release import __version__

        print(f"minilora {__version__}")
        return OK
    if verb not in VERBS:
        what = "the verb comes first, not" if verb.startswith("-") else "there is no verb"
        raise UsageError(f"{what} '{printable(verb)}'{nearest(verb, VERBS)}\nminilora --help lists the verbs")
    args = arguments(verb, words)
    if args is None:
        return OK
    with fitting(None if getattr(args, "json", False) else columns_of(sys.stdout)), on_command_line():
        return int(verb_named(verb).run(args))


def arguments(verb: str, words: list[str]) -> Namespace | None:
    """The words of a verb, parsed; None if they only asked for the config that they make, which is printed."""
    from .parser import Parser

    module = verb_named(verb)
    parser = Parser(verb, VERBS[verb], module.EPILOG)
    module.add_arguments(parser)
    if "-h" in words or "--help" in words:
        parser.print_help()
        raise SystemExit(OK)
    named = parser.named(words)
    if {"config", "print_config"} & named:
        from . import config_file

        if "print_config" in named:
            config_file.keep_texts(parser)
        if "config" in named:
            config_file.apply(parser, verb, VERBS, config_path(parser, words), named)
        if "print_config" in named:
            print(config_file.as_toml(parser, verb, words))
            return None
    args = parser.words(words)
    args.verb, args.words = verb, words
    return args


def config_path(parser: Parser, words: list[str]) -> Path:
    """FILE of ``--config FILE``; the last, if there are several."""
    from pathlib import Path

    for at in range(len(words) - 1, -1, -1):
        flag, sign, value = words[at].partition("=")
        if flag == "--config":
            if not sign and at + 1 < len(words):
                value = words[at + 1]
            if value:
                return Path(value)
    parser.error("argument --config: expected one argument")


def overview() -> str:
    """The help of the command."""
    wide = max(map(len, VERBS), default=0)
    return "\n".join(["usage: minilora VERB ...", "", "LoRA you can read, prove and run.", "",
                      *(f"  {name:<{wide}}  {line}" for name, line in VERBS.items()), "",
                      "minilora VERB --help shows the options of a verb and an example. Tables go to",
                      "stdout (--json: one object), notes to stderr. Exit codes: 0 done, 1 failed,",
                      "2 wrong command, 3 a check failed, 4 the training diverged, 130 interrupted.",
                      "minilora --version says which version this is."])


def told(name: str, error: object, status: int) -> int:
    """Write an error to stderr; gives the status back."""
    words = "\n".join([str(error), *getattr(error, "__notes__", ())])
    text = "\n".join(map(printable, words.split("\n")))
    print(wrapped(f"{name}: {text}", columns_of(sys.stderr)), file=sys.stderr)
    return status


@contextlib.contextmanager
def careful() -> Iterator[None]:
    """For the time of a command: what a stream cannot encode is written as an escape, and warnings are one line each."""
    changed = []
    for stream in (sys.stdout, sys.stderr):
        before = getattr(stream, "errors", None)
        if before == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
            changed.append((stream, before))
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _one_line
            yield
    finally:
        for stream, before in changed:
            with contextlib.suppress(OSError, ValueError):  # a reader that has gone, a stream that is closed
                stream.reconfigure(errors=before)


def _one_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None,
              line: str | None = None) -> None:
    told("minilora: warning", message, OK)


def nothing_more() -> None:
    """stdout takes nothing: write what is left of it nowhere, at the end of the process either."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
