"""Training steps that a GPU repeats without Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import backend
from .errors import ConfigError

__all__ = ["Recorded", "played", "record"]


def played(step: Callable[..., Any]) -> Callable[..., Any]:
    """How a device calls a step that may be recorded. This is the reference: it calls it."""
    return step


class Recorded:
    """A step that `record` has taken over: called like the step itself."""

    def __init__(self, step: Callable[..., Any]) -> None:
        self.step = step
        self._made_for: Any = None  # the device, whether kernels run, and TF32: a recording holds for these
        self._play: Callable[..., Any] = step

    def __call__(self, *arguments: Any) -> Any:
        now = backend.current_device(), backend.kernels(), backend.tf32()
        if now != self._made_for:
            self._made_for, self._play = now, now[0].resolve(played)(self.step)
        return self._play(*arguments)

    def forget(self) -> None:
        """Record again at the next calls: needed when the step would now do other things than when it was recorded."""
        self._made_for = None


def record(step: Callable[..., Any]) -> Recorded:
    """Make a training step cheap on a GPU: its launches are recorded once, as a CUDA graph, and then repeated.

    On the CPU nothing changes. On a GPU the first call runs the step, the second records it, and all further ones replay it:
    the same launches on the same memory in the same order, hence the same bits, with little Python between two steps.

    Parameters
    ----------
    step : callable
        Takes arrays (of the host or the device), tensors, and whatever else it needs; does a whole step, forward to
        ``optimizer.step()``; gives back tensors, arrays, tuples of them, or None.

    Returns
    -------
    Recorded
        To be called like `step`. What it gives back is the caller's: no later call overwrites it.

    Raises
    ------
    ConfigError
        If `step` cannot be called.
    StateError
        From the second call on a GPU, if the step cannot be recorded: it waits for the GPU, copies between host and device, or
        calls what CUDA does not record. Nothing has changed then.

    Notes
    -----
    Learning rates, step numbers of Adam and dropout masks are those of every call. What else the step reads from Python is
    read when it is recorded: other branches, ``train()`` and ``eval()``, adapters that are injected or merged. After such a
    change call ``forget()``. Arguments of other shapes, such as a smaller last batch, run the step as it is, and so does the
    call after another optimizer setting or gradient has been changed by hand; then the step is recorded anew.

    Integers on the host are checked by an operation that gets them; those among the arguments are copied to the device first,
    where nobody looks at them.

    Examples
    --------
    >>> import minilora, numpy
    >>> layer = minilora.nn.Linear(2, 1, rng=0)
    >>> optimizer = minilora.optim.Adam(layer.parameters(), lr=0.1)
    >>> @minilora.record
    ... def step(x, y):
    ...     loss = minilora.ops.mse(layer(x), y)
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     optimizer.step()
    ...     return loss
    >>> x, y = minilora.tensor([[1.0, 2.0]]), minilora.tensor([[3.0]])
    >>> losses = [step(x, y).item() for _ in range(100)]
    >>> losses[-1] < 0.001 * losses[0]
    True
    """
    if not callable(step):
        raise ConfigError(f"record takes a function that does a step, got {type(step).__name__}")
    return Recorded(step)
