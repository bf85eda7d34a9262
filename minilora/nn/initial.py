"""Where a layer's first numbers come from: drawn, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy

from .. import backend
from ..ops.shape import repeated
from ..tensor import Parameter

__all__ = ["drawing", "first", "undrawn"]

_drawing: ContextVar[bool] = ContextVar("minilora.drawing", default=True)


def drawing() -> bool:
    """Whether layers draw their first numbers; False within `undrawn`."""
    return _drawing.get()


@contextmanager
def undrawn() -> Iterator[None]:
    """Within this context, layers are made without numbers, for somebody who has them: nothing is drawn or allocated.

    A parameter then is one zero, repeated by strides of 0 to its shape: on the current device, of its dtype, and read-only on
    the host. `Module.load_state_dict`, or an assignment to `Parameter.data`, puts the real array in its place. The context
    holds for its own thread (and for tasks that it starts), not for others.

    Examples
    --------
    >>> import minilora
    >>> with minilora.nn.undrawn():
    ...     layer = minilora.nn.Linear(10_000, 10_000)
    >>> layer.weight.shape, layer.weight.data.strides
    ((10000, 10000), (0, 0))
    """
    token = _drawing.set(False)
    try:
        yield
    finally:
        _drawing.reset(token)


def first(shape: tuple[int, ...], dtype: Any, draw: Callable[[], numpy.ndarray]) -> Parameter:
    """A parameter of what `draw` makes on the host, on the current device; without numbers within `undrawn`."""
    if drawing():
        return Parameter(backend.asarray(draw().astype(dtype, copy=False)))
    return Parameter(repeated(backend.asarray(numpy.zeros((), dtype)), shape))
