"""The threads of the BLAS that NumPy calls for its products: held to one while several of our own compute."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy

__all__ = ["can_hold", "described", "limit", "one_thread", "threads"]

# OpenBLAS's own calls, by the names that its builds give them: NumPy's wheels have the first.
NAMES = ("scipy_openblas_{}64_", "scipy_openblas_{}", "openblas_{}64_", "openblas_{}64", "openblas_{}")


class _Calls(NamedTuple):
    get: Callable[[], int]
    set: Callable[[int], None]
    core: Callable[[], bytes | None]


@functools.cache
def _calls() -> _Calls | None:
    """OpenBLAS's calls, found behind the part of NumPy that is linked to it; None with another BLAS, or hidden names."""
    try:
        library = ctypes.CDLL(numpy._core._multiarray_umath.__file__)  # type: ignore[attr-defined]
    except (AttributeError, OSError):
        return None
    for name in NAMES:
        try:
            get, put, core = (getattr(library, name.format(call)) for call in
                              ("get_num_threads", "set_num_threads", "get_corename"))
        except AttributeError:
            continue
        core.restype = ctypes.c_char_p
        return _Calls(get, put, core)
    return None


def can_hold() -> bool:
    """Whether the BLAS is one whose threads we can set."""
    return _calls() is not None


def threads() -> int | None:
    """How many threads the BLAS computes with now; None with one that we cannot ask."""
    calls = _calls()
    return None if calls is None else int(calls.get())


def described() -> str:
    """The BLAS, the processor that its products are written for, and its threads: the last bits depend on all three.

    Examples
    --------
    >>> described() == described()
    True
    """
    built = numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]
    calls = _calls()
    here = "" if calls is None else f" for {(calls.core() or b'?').decode('ascii', 'replace')}, threads: {calls.get()}"
    return f"{built.get('name')} {built.get('version')}{here}"


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


def limit(most: int) -> None:
    """Let the BLAS have at most so many threads from now on: for processes that share the cores of a machine.

    Without a known BLAS this does nothing.
    """
    global _found
    calls = _calls()
    if calls is None:
        return
    with _lock:
        if _holders:
            _found = min(_found, most)  # what will be set when the last of them leaves
        else:
            calls.set(min(calls.get(), most))
