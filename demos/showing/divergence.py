"""A loss that is not finite any more stops its loop, with the step, the last good value and what to do."""

from __future__ import annotations

import math
import numbers

from minilora.errors import DivergedError

__all__ = ["Diverged", "Watch"]


class Diverged(DivergedError):
    """A loss is not finite any more.

    Attributes
    ----------
    value : float
        The loss that was read: NaN or an infinity.
    step : int
        When it was read.
    last : tuple of (float, int), optional
        The last finite loss that was read, and when. None if there was none.
    """

    def __init__(self, message: str, value: float, step: int, last: tuple[float, int] | None) -> None:
        super().__init__(message)
        self.value, self.step, self.last = value, step, last

    @property
    def status(self) -> str:
        """What a report says of a run that ended so."""
        return f"diverged: {self}"


class Watch:
    """Looks at each loss that a loop reads, and raises `Diverged` at the first that is not finite.

    It never reads a loss itself: on a GPU that would wait for the device, in every step. It is given numbers that were
    read anyway, for a progress line or a curve. Between two readings a loop may train on for nothing; a NaN does not go away
    again, so that the next reading finds it.

    Parameters
    ----------
    advice : str
        What may help. It follows a colon.
    line : str
        The line to type, at the end of the message; empty if there is none.
    subject : str
        What is not finite, such as ``"pre-training: the loss"``.
    unit : str
        What is counted: a step, an epoch.

    Examples
    --------
    >>> watch = Watch("a smaller lr than 0.1 may help", line="Adam(parameters, lr=0.01)")
    >>> watch.check(0.7, step=10)
    0.7
    >>> watch.check(float("nan"), step=20)
    Traceback (most recent call last):
        ...
    showing.divergence.Diverged: the loss is nan in step 20: a smaller lr than 0.1 may help. It was 0.7 in step 10; steps \
that are too long, or a batch that holds NaN, are the likely causes. Try: Adam(parameters, lr=0.01)
    """

    def __init__(self, advice: str, line: str = "", subject: str = "the loss", unit: str = "step") -> None:
        self.advice, self.line, self.subject, self.unit = advice, line, subject, unit
        self.last: tuple[float, int] | None = None

    def check(self, loss: float, step: int) -> float:
        """Give the loss back if it is finite.

        Parameters
        ----------
        loss : float
            A number on the host, of Python or NumPy. What has still to be fetched (a Tensor, an array) is a TypeError.
        step : int
            When it was read.

        Raises
        ------
        Diverged
            It is NaN or infinite.
        """
        if not isinstance(loss, numbers.Real):
            raise TypeError(f"check takes a number that was read already, got {type(loss).__name__}: to read it here would "
                            "wait for the device in every call. Where the loop reads its loss anyway, write "
                            "watch.check(loss.item(), step)")
        value = float(loss)
        if not math.isfinite(value):
            message = f"{self.subject} is {value} in {self.unit} {step}: {self.advice}. {self._history()}."
            raise Diverged(message + (f" Try: {self.line}" if self.line else ""), value, step, self.last)
        self.last = value, step
        return value

    def _history(self) -> str:
        if self.last is None:
            return ("No finite one was read before; first steps that are too long, or NaN in the data or in the first weights, "
                    "are the likely causes")
        value, step = self.last
        return (f"It was {value:.4g} in {self.unit} {step}; steps that are too long, or a batch that holds NaN, are "
                "the likely causes")
