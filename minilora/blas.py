"""The threads of the BLAS that NumPy calls for its products: held to one while several of our own compute."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy

__all__ = ["can_hold", "one_thread", "threads"]

# OpenBLAS's own calls, by the names that its builds give them: NumPy's wheels have the first.
NAMES = ("scipy_openblas_{}_num_threads64_", "scipy_openblas_{}_num_threads", "openblas_{}_num_threads64_",
         "openblas_{}_num_threads64", "openblas_{}_num_threads")


class _Calls(NamedTuple):
    get: Callable[[], int]
    set: Callable[[int], None]


@functools.cache
def _calls() -> _Calls | None:
    """OpenBLAS's calls, found behind the part of NumPy that is linked to it; None with another BLAS, or hidden names."""
    try:
        library = ctypes.CDLL(numpy._core._multiarray_umath.__file__)  # type: ignore[attr-defined]
    except (AttributeError, OSError):
        return None
    for name in NAMES:
        try:
            return _Calls(getattr(library, name.format("get")), getattr(library, name.format("set")))
        except AttributeError:
            continue
    return None


def can_hold() -> bool:
    """Whether the BLAS is one whose threads we can set."""
    return _calls() is not None


def threads() -> int | None:
    """How many threads the BLAS computes with now; None with one that we cannot ask."""
    calls = _calls()
    return None if calls is None else int(calls.get())


_lock = threading.Lock()
_holders: set[object] = set()  # one for each open context, of any thread
_found = 0  # threads before the first of them


@contextmanager
def one_thread() -> Iterator[None]:
    """Hold the BLAS to one thread; afterwards, also after an error or an interrupt, it has as many as before.

    The number is one for the whole process. So of several contexts, in this or in other threads, the first sets it and the last
    sets it back. Without a known BLAS this does nothing.
    """
    global _found
    calls, me = _calls(), object()
    if calls is None:
        yield
        return
    try:
        with _lock:
            _found = _found or calls.get()
            _holders.add(me)
            calls.set(1)
        yield
    finally:
        try:
            _leave(calls, me)
        except BaseException:  # interrupted in here: a process left with one thread would be the worse end
            _leave(calls, me)
            raise


def _leave(calls: _Calls, me: object) -> None:
    global _found
    with _lock:
        _holders.discard(me)
        if not _holders and _found:
            calls.set(_found)
            _found = 0
