"""What the device was asked to do: launches, synchronisations, copies."""
from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

_active: list[Counts] = []


class _Captures(threading.local):
    """Of a graph that this thread records, what its launches do."""

    def __init__(self):
        self.open: list[list | None] = []


_captures = _Captures()


class CaptureError(RuntimeError):
    """A synchronisation or a copy was asked for while a graph was captured."""


@dataclass
class Counts:
    """Launches, synchronisations, copies each way; ``calls`` says which calls made them."""

    launches: int = 0
    syncs: int = 0
    h2d: int = 0
    d2h: int = 0
    calls: Counter[str] = field(default_factory=Counter)


@contextmanager
def counting():
    """Yield a `Counts` of the block; blocks may be nested."""
    counts = Counts()
    _active.append(counts)
    try:
        yield counts
    finally:
        _active[:] = [other for other in _active if other is not counts]


@contextmanager
def capturing():
    """Allow launches only, as while a CUDA graph is captured."""
    _captures.open.append(None)
    try:
        yield
    finally:
        _captures.open.pop()


def perform(action):
    """Let the device do something: at once, or while a stream records at every launch of the graph and not before."""
    if is_recorded():
        _captures.open[-1].append(action)
    else:
        action()


def is_recorded():
    return bool(_captures.open) and _captures.open[-1] is not None


def count(call, *kinds):
    """Note one call; `kinds` names the fields of `Counts` that it raises by one."""
    if _captures.open and kinds != ("launches",):
        raise CaptureError(f"{call}: not permitted while a graph is captured ({', '.join(kinds)})")
    for counts in _active:
        counts.calls[call] += 1
        for kind in kinds:
            setattr(counts, kind, getattr(counts, kind) + 1)


def synchronize():
    """Wait for the device: a counted synchronisation."""
    count("synchronize", "syncs")
