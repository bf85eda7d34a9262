"""The progress of a loop: one line that is drawn again and again on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from types import TracebackType
from typing import TextIO

__all__ = ["Progress"]

WIDTH = 80  # columns where there is no terminal that could be asked
REDRAW = 0.1  # seconds between two drawings of the line on a terminal
LEAST_BAR = 4  # columns; a shorter bar shows nothing


class Progress:
    """How far a loop has come, how fast it is, and how long it will still take.

    On a terminal one line is drawn over and over, and removed at the end. It is never wider than the terminal: where not
    all of it has room, first the bar goes, then the rate, then the time left, and the text of the last `advance` stays
    longest: of its parts, between which are two blanks, the last, for there stands the loss.
    Elsewhere (a pipe, a log file) plain lines of at most 80 columns are printed, seldom.

    Nothing here raises because of the display: a stream that cannot be written any more ends it, and the loop goes on.

    Parameters
    ----------
    label : str
        What is going on, such as ``"pre-training"``.
    total : int
        The units of the whole loop. 0: not known, so that neither percentage nor time left is shown.
    unit : str
        What is counted, in the plural.
    interval : float
        Seconds between two plain lines; the one at `total` always comes. With 0 every `advance` prints one.
    stream : TextIO, optional
        By default `sys.stderr`, so that what a program prints on stdout can be piped on.

    Examples
    --------
    >>> with Progress("training", total=2, interval=0, stream=sys.stdout) as progress:  # doctest: +ELLIPSIS
    ...     for loss in (0.5, 0.25):
    ...         progress.advance(text=f"loss {loss}")
    training  loss 0.5  0:00 left  ... steps/s
    training  loss 0.25  in 0:00  ... steps/s
    """

    def __init__(self, label: str, total: int, unit: str = "steps", interval: float = 10.0,
                 stream: TextIO | None = None) -> None:
        self.label, self.total, self.unit, self.interval = label, total, unit, interval
        self.done, self.text, self.began = 0, "", time.perf_counter()
        self._stream: TextIO | None = stream or sys.stderr  # None: nobody looks (any more)
        self._last = self.began  # when a line was shown; the first plain line comes after an interval
        self._drawn = 0  # columns of the line that stands on the terminal
        try:
            self._terminal = self._stream is not None and self._stream.isatty()
        except ValueError:  # a closed stream
            self._terminal, self._stream = False, None

    def advance(self, amount: int = 1, text: str | None = None) -> None:
        """Count `amount` units. `text` says what is known now (without it, the last one stays).

        A call that shows nothing costs a reading of the clock; give a `text` only where its numbers are on the host already.
        """
        self.done += amount
        self.text = self.text if text is None else printable(text).rstrip()
        now = time.perf_counter()
        if self._terminal:
            if now - self._last >= REDRAW or self._drawn == 0:
                self._draw(self._terminal_line(self._columns() - 1))  # in the last column the cursor might wrap
                self._last = now
        elif now - self._last >= self.interval or self.done == self.total:
            self._write(self._plain_line(WIDTH) + "\n")
            self._last = now

    def close(self) -> None:
        """Remove the line from the terminal. Plain lines stay."""
        if self._drawn:
            self._draw("")
            self._write("\r")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    # -- the line -----------------------------------------------------------------------------------------------------

    def _figures(self) -> tuple[str, str]:
        """The time left (at the end: the time taken), and the rate."""
        seconds = max(time.perf_counter() - self.began, 1e-9)
        rate = self.done / seconds
        speed = f"{rate:.{1 if rate < 100 else 0}f} {printable(self.unit)}/s"
        if self.total <= 0 or self.done <= 0:
            return "", speed
        if self.done >= self.total:
            return f"in {clock(seconds)}", speed
        return f"{clock((self.total - self.done) / rate)} left", speed

    def _plain_line(self, width: int) -> str:
        label, (left, rate) = printable(self.label), self._figures()
        parts = ((label, self.text, left, rate), (label, self.text, rate), (label, self.text), (self.text or label,))
        lines = ["  ".join(filter(None, row)) for row in parts]
        return next((line for line in lines if len(line) <= width), last_parts(lines[-1], width))

    def _terminal_line(self, width: int) -> str:
        left, rate = self._figures()
        head = printable(self.label)
        if self.total > 0:
            share = min(max(self.done / self.total, 0.0), 1.0)
            head += f": {100.0 * share:.0f}%"
            tail = ", ".join(filter(None, (left, rate, self.text)))
            room = width - len(head) - len(tail) - 3
            if room >= LEAST_BAR:
                return f"{head}|{'#' * round(share * room):<{room}}| {tail}"
        parts = ((head, left, rate, self.text), (head, left, self.text), (head, self.text), (self.text or head,))
        lines = [", ".join(filter(None, row)) for row in parts]
        return next((line for line in lines if len(line) <= width), last_parts(lines[-1], max(width, 0)))

    # -- the stream ---------------------------------------------------------------------------------------------------

    def _columns(self) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no file behind it, or no terminal
            if self._stream is not None:
                return os.get_terminal_size(self._stream.fileno()).columns or WIDTH
        return WIDTH

    def _draw(self, line: str) -> None:
        """Put a line in the place of the last one. Blanks cover what is left of it: every terminal knows them."""
        before, self._drawn = self._drawn, max(self._drawn, len(line))  # first: Ctrl-C may come in the middle of the writing
        self._write("\r" + line.ljust(before))
        self._drawn = len(line)

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            self._stream.write(text.encode(encoding, "replace").decode(encoding))
            self._stream.flush()
        except (OSError, ValueError, LookupError):  # closed, a reader that has gone, a full disk
            self._stream = None


def printable(text: str) -> str:
    """A text on one line: no line break, no escape sequence."""
    return "".join(character if character.isprintable() else " " for character in str(text))


def last_parts(text: str, width: int) -> str:
    """As many of the last parts of a text as have room; of one that has none, the beginning."""
    parts = text.split("  ")
    rows = ("  ".join(parts[first:]).strip() for first in range(len(parts)))
    return next((row for row in rows if row and len(row) <= width), parts[-1].strip()[:width])


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
