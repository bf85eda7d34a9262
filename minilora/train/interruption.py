"""Ctrl-C and SIGTERM in a run: the step that is being made is finished, and the run saved, before the program ends."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupted", "Interruption"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ONE = 0.25  # seconds: what comes within them is one press of Ctrl-C, which launchers pass on once more


class Interrupted(KeyboardInterrupt):
    """A run that was stopped by Ctrl-C or SIGTERM after a whole step. The message says how it goes on."""


class Interruption:
    """While its block runs, Ctrl-C and SIGTERM are written down, for a loop to ask after each step.

    A second Ctrl-C ends the program at once, by a KeyboardInterrupt wherever it is; files are replaced as wholes, so they stay
    whole. Further SIGTERMs change nothing: `timeout`, and launchers of several processes, send two.

    Signals come to the main thread, and only there handlers can be set: in others this does nothing. What a program has had
    for a signal is set again afterwards. If it ignores one (`nohup`, a job in the background), so does the run; if it has a
    handler of its own, that is called in the end.

    Attributes
    ----------
    asked : bool
        Whether such a signal came.

    Examples
    --------
    >>> with Interruption() as interruption:
    ...     for step in range(3):
    ...         if interruption.asked:
    ...             break
    >>> step
    2
    """

    def __init__(self) -> None:
        self.asked = False
        self._came: tuple[int, FrameType | None] | None = None
        self._pressed = float("-inf")
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before is not None and before is not signal.SIG_IGN:  # None: set by other than Python code
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if self._came is not None:
            self._call_before(*self._came)
            if error is None:
                raise Interrupted("interrupted; what was running had come to its end and is complete")

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if number == signal.SIGINT:
            now = time.monotonic()
            since, self._pressed = now - self._pressed, now
            if ONE < since < float("inf"):
                self._came = None
                self._call_before(number, frame)
                raise KeyboardInterrupt("interrupted twice, and stopped at once")
        self.asked, self._came = True, (number, frame)

    def _call_before(self, number: int, frame: FrameType | None) -> None:
        """Call the program's own handler, if it has one."""
        before = self._before[number]
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)
