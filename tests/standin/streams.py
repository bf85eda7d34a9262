"""`cupy.cuda`, as far as minilora asks for it: streams that record, graphs, events, pinned memory, pools.

Everything is done at once, so that nothing shows a wait that is missing. What a stream records is not done at all before the
graph is launched, as on a card: the arrays that it makes hold NaN until then.
"""
from __future__ import annotations

from contextlib import contextmanager

from .counts import CaptureError, _captures, count, is_recorded


class Stream:
    """A queue."""

    def __init__(self, ptr=None, non_blocking=False):
        self.ptr, self.non_blocking = id(self) if ptr is None else ptr, non_blocking

    def __enter__(self):
        _current.append(self)
        return self

    def __exit__(self, *error):
        _current.remove(self)

    def synchronize(self):
        count("synchronize", "syncs")

    def is_capturing(self):
        return is_recorded()

    def wait_event(self, event):
        count("event")

    def begin_capture(self):
        if self is default:
            raise CaptureError("the default stream cannot be recorded")
        _captures.open.append([])

    def end_capture(self):
        return Graph(_captures.open.pop())


class Graph:
    def __init__(self, actions):
        self.actions = actions

    def launch(self, stream=None):
        count("graph", "launches")
        for action in self.actions:
            action()


class Event:
    def __init__(self, disable_timing=False):
        pass

    def record(self, stream=None):
        count("event")

    def synchronize(self):
        count("event")


class MemoryPool:
    """Keeps nothing: the arrays of a graph are kept by what it does."""

    def __init__(self, allocator=None):
        pass

    def malloc(self, size):
        raise NotImplementedError


@contextmanager
def using_allocator(allocator):
    yield


default = Stream(0)
_current = [default]
cuda = {"get_current_stream": lambda: _current[-1], "Stream": Stream, "Event": Event, "MemoryPool": MemoryPool,
        "using_allocator": using_allocator, "alloc_pinned_memory": bytearray}
