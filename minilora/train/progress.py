"""What a run says while it goes on: a header, a line for each report, or a bar on a terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

from ..terminal import columns_of, wrapped
from .beside import Beside
from .header import Header, clock
from .metrics import speed
from .run import Run, Update

__all__ = ["Progress"]

TIMED = 3  # steps after which the whole is predicted; the first one, which also fetches memory, is left out


class Progress(Beside):
    """Writes to stderr: a bar where tqdm is installed and stderr is a terminal, else a line for each report.

    Parameters
    ----------
    header : Header, optional
        Said at the beginning.
    """

    def __init__(self, header: Header | None = None) -> None:
        self.header = header
        self.bar: Any = None
        self.evaluations, self.tokens, self.seconds = 0, 0, 0.0
        self.first, self.timed = 0, 0.0

    def begin(self, run: Run) -> None:
        for line in self.header.lines() if self.header is not None else ():
            self._say(line)
        self.bar = bar_of(run)
        self.evaluations, self.tokens, self.seconds = len(run.evaluations), run.tokens, run.seconds
        self.first = run.step

    def after_step(self, run: Run, made: Update) -> None:
        if self.bar is not None:
            self.bar.update()
        if run.step == self.first + 1:
            self.timed = time.perf_counter()
        elif run.step == self.first + TIMED and run.total > 2 * TIMED:
            a_step = (time.perf_counter() - self.timed) / (TIMED - 1)
            left = clock(a_step * (run.total - run.step))
            self._say(f"time      {left} to go at {a_step:.3g} s a step, evaluations left out")
        if made.mean is not None:
            rate = speed(run, self.tokens, self.seconds)
            self._say(f"step {run.step:,}/{run.total:,}  loss {made.mean:.4f}  lr {made.rate:.3g}  norm {made.norm:.3g}  "
                      f"{rate:,.0f} tokens/s" + scaled(run))
            self.tokens, self.seconds = run.tokens, run.seconds
        for found in run.evaluations[self.evaluations:]:
            best = "  the best so far" if found is run.best and len(run.evaluations) > 1 else ""
            self._say(f"step {found.step:,}  evaluation: {found}{best}")
        self.evaluations = len(run.evaluations)

    def end(self, run: Run) -> None:
        if self.bar is not None:
            self.bar.close()
        if run.finished and run.step < run.total:
            self._say(f"ended after step {run.step:,}: {run.worse} evaluations without a better one")
        for note in run.notes:
            self._say(f"note: {note}")

    def _say(self, line: str) -> None:
        """A line on stderr; on a terminal within its width, and above the bar."""
        line = wrapped(line, columns_of(sys.stderr))
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)


def scaled(run: Run) -> str:
    """In mixed precision: what the loss is multiplied by, and how often it was too much."""
    if run.scaling is None:
        return ""
    skipped = f", {run.scaling.skipped:,} overflows" if run.scaling.skipped else ""
    return f"  scale {run.scaling.value:,.0f}{skipped}"


def bar_of(run: Run) -> Any:
    """A bar of tqdm, where it is installed and there is a terminal; else None."""
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=run.total, initial=run.step, unit="step", file=sys.stderr, leave=False, dynamic_ncols=True)
