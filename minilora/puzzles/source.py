"""A learner's file as a module, and what is said of an error in it: the line, and no traceback of ours."""

from __future__ import annotations

import importlib.abc
import importlib.util
import linecache
import os
import re
import sys
import sysconfig
import traceback
from pathlib import Path
from types import CodeType, ModuleType

from ..errors import MiniloraError

__all__ = ["load", "place_of", "told"]

NAME = "minilora_puzzle"
OURS = Path(__file__).resolve().parents[1]
UNEQUAL = re.compile(r"matmul: Input operand 1 .*\(size (\d+) is different from (\d+)\)", re.DOTALL)


class Text(importlib.abc.InspectLoader):
    """Loads a module from a text that is at hand. No compiled copy is kept: two edits in one second are two files."""

    def __init__(self, text: str | bytes, path: str) -> None:
        self.text, self.path = text, path

    def get_source(self, fullname: str) -> str:
        return self.text if isinstance(self.text, str) else importlib.util.decode_source(self.text)

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.text, self.path)


def load(text: str | bytes, path: str) -> ModuleType:
    """The module that a text is; `path` is what errors in it name. It may raise whatever the text raises."""
    loader = Text(text, path)
    spec = importlib.util.spec_from_loader(NAME, loader, origin=path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(NAME)
    sys.modules[NAME] = module  # dataclasses look there for the module of a class
    try:
        loader.exec_module(module)
    finally:
        if before is None:
            del sys.modules[NAME]
        else:
            sys.modules[NAME] = before
    return module


def told(error: BaseException) -> list[str]:
    """An error in a learner's code: where, what, the line of code, and what the library noted about it."""
    if isinstance(error, SystemExit):
        what = "the code ended the program (sys.exit, exit or quit): leave that out"
    elif isinstance(error, MiniloraError):
        what = str(error)
    elif isinstance(error, SyntaxError):
        what = f"{type(error).__name__}: {error.msg}"
    else:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if unequal := UNEQUAL.search(what):  # NumPy's words are about the indices of a ufunc
        rows, columns = unequal.groups()
        what = f"{type(error).__name__}: a @ b, where a has {columns} columns and b has {rows} rows: they must be equal"
    where, line = place_of(error)
    return [f"{where}: {what}" if where else what, *([f"    {line}"] if line else []), *getattr(error, "__notes__", ())]


def place_of(error: BaseException) -> tuple[str, str]:
    """``file:line`` and the text of the innermost line that is the learner's; empty if there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno or 1}", (error.text or "").strip()
    found: tuple[str, str] = "", ""
    others = installed()
    for frame, number in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_filename
        if name.startswith("<frozen ") or os.path.realpath(name).startswith(others):
            continue
        linecache.checkcache(name)
        found = f"{name}:{number}", linecache.getline(name, number, frame.f_globals).strip()
    return found


def installed() -> tuple[str, ...]:
    """The folders, as beginnings of paths, of this library, Python's own and what is installed beside it."""
    folders = [str(OURS), *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))]
    return tuple(os.path.realpath(folder) + os.sep for folder in folders)
