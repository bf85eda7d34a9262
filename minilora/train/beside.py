"""What the loop calls: everything about a run that is not the update itself is an object with these three methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run import Run, Update

__all__ = ["Beside"]


class Beside:
    """Something beside the loop. Each method does nothing by itself; a subclass writes those that it needs.

    Examples
    --------
    >>> class Losses(Beside):
    ...     def after_step(self, run, made):
    ...         print(f"{run.step}: {made.loss:.2f}")
    """

    def begin(self, run: Run) -> None:
        """Before the first update, or the first after a resume: ``run.step`` says which. What is wrong is said here."""

    def after_step(self, run: Run, made: Update) -> None:
        """After each update."""

    def end(self, run: Run) -> None:
        """Once, however the run ended: ``run.status`` says how."""
