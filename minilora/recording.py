"""Whether operations are remembered for backward: a matter of the thread, switched off by `no_grad`.

>>> from minilora import engine
>>> with engine.no_grad():
...     off = engine.is_recording()
...     with engine.recording():
...         on = engine.is_recording()
>>> engine.is_recording(), off, on
(True, False, True)
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import types
from collections.abc import Callable, Generator, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

from .errors import ConfigError

__all__ = ["is_recording", "no_grad", "recording", "watcher"]

F = TypeVar("F", bound=Callable[..., Any])


class _State(threading.local):
    def __init__(self) -> None:  # runs once in every thread
        self.recording = True
        self.before: list[bool] = []  # what each open no_grad found


_state = _State()

# Called with each operation that is applied, its inputs and its output: for looking at a pass, in its threads too.
watcher: ContextVar[Callable[[Any, tuple[Any, ...], Any], None] | None] = ContextVar("minilora.watcher", default=None)


class no_grad:
    """Within this context nothing is remembered for backward. Also a decorator; per thread; restored after errors.

    A generator or a coroutine function that it decorates remembers nothing in its own body, from its start to its end; what
    runs between two of its items is recorded as it would be without it.

    Examples
    --------
    >>> import minilora
    >>> w = minilora.Parameter(minilora.backend.asarray([1.0]))
    >>> with minilora.no_grad():
    ...     print((w * 2.0).node)
    None
    """

    def __enter__(self) -> None:
        _state.before.append(_state.recording)
        _state.recording = False

    def __exit__(self, *error: object) -> None:
        _state.recording = _state.before.pop()

    def __call__(self, function: F) -> F:
        if inspect.isasyncgenfunction(function):
            raise ConfigError(f"no_grad cannot decorate the asynchronous generator {function.__qualname__}: write "
                              "`with no_grad():` inside it, around what it computes and not around its yield")
        wrapper: Any
        if inspect.isgeneratorfunction(function):
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                return (yield from _resumed_without_graph(function(*args, **kwargs)))
        elif inspect.iscoroutinefunction(function):
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                return await types.coroutine(_resumed_without_graph)(function(*args, **kwargs))
        else:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                with no_grad():
                    return function(*args, **kwargs)
        return functools.wraps(function)(wrapper)  # type: ignore[return-value]


def _resumed_without_graph(body: Any) -> Generator[Any, Any, Any]:
    """What a generator or coroutine yields and returns. Recording is off while it runs, and what it was while it waits."""
    resume, value = body.send, None
    inside: list[bool] = []  # the body's own open contexts: those of its caller may close while it waits
    while True:
        outside = _state.recording, _state.before
        _state.recording, _state.before = False, inside
        try:
            item = resume(value)
        except StopIteration as stop:
            return stop.value
        finally:
            _state.recording, _state.before = outside
        try:
            resume, value = body.send, (yield item)
        except BaseException as error:  # thrown in, or GeneratorExit from close(): the body's to handle
            resume, value = body.throw, error


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Within this context operations are remembered, also within `no_grad`: for what backward itself computes again."""
    before, _state.recording = _state.recording, True
    try:
        yield
    finally:
        _state.recording = before


def is_recording() -> bool:
    """Whether operations on trainable parameters are being remembered (False within `no_grad`)."""
    return _state.recording
