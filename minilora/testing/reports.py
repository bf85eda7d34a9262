"""What the checks give back: true or false, and a table to read."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from ..errors import MiniloraError
from ..shown import shown

__all__ = ["WIDTH", "Check", "GradcheckError", "Report", "Row", "Verdict", "paragraph", "table"]

V = TypeVar("V", bound="Verdict")

WIDTH = 80  # columns of a terminal
MOST = 8  # names, or lines of one kind, in a printed report
NOTHING = ("every analytic and every numerical value is 0 at this point, so a wrong factor would not show. Is it multiplied by "
           "zeros, as A is where B = 0? Then fill those first: p.data[...] = rng.standard_normal(p.shape)")

IN_TF32 = ("note: TF32 is on. It changes products of float32 matrices; those of float64, which this check is made of, are what "
           "they are without it. So this report says nothing about the digits that TF32 costs")


class GradcheckError(MiniloraError, AssertionError):
    """A check did not pass; the message is its report."""


class Verdict:
    """Something that passed or did not: true or false, with a ``check()`` that raises."""

    passed: bool

    def __bool__(self) -> bool:
        return self.passed

    def check(self: V) -> V:
        """Return this report if it passed.

        Raises
        ------
        GradcheckError
            If it did not, with the report as its message.
        """
        if not self.passed:
            raise GradcheckError(str(self))
        return self


class Check(NamedTuple):
    """One property of f besides the values of its gradients; `detail` says what was found where it failed."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """One leaf: its hand-written gradient against the numerical one.

    Attributes
    ----------
    name : str
    shape : tuple of int
    compared : str
        ``"35 elements"``, or ``"8 directions"`` where the leaf is big.
    error : float
        The largest relative error, found at `where`.
    where : str
    analytic, numerical : float
        Both values there.
    passed : bool
    guess : str
        What may be wrong; empty if passed.
    kink : bool
        True if the disagreement is only at points where f has no derivative.
    untested : bool
        True if both gradients are 0 everywhere, which says nothing.
    zeros : int
        How many elements are 0 by hand and numerically: a wrong factor would not show there.
    zeros_at : str
        Which ones, if that is easily said: ``"rows 3, 4"``, ``"where x < 0"``.
    """

    name: str
    shape: tuple[int, ...]
    compared: str
    error: float
    where: str
    analytic: float
    numerical: float
    passed: bool
    guess: str = ""
    kink: bool = False
    untested: bool = False
    zeros: int = 0
    zeros_at: str = ""

    @property
    def unchecked(self) -> str:
        """What the check did not see of this leaf; empty if nothing."""
        size = math.prod(self.shape)
        if self.untested:
            return "0 everywhere, by hand and numerically"
        text = []
        if self.zeros:
            at = f" ({self.zeros_at})" if self.zeros_at else ""
            text.append(f"{self.zeros} of {size} elements are 0 by hand and numerically{at}")
        if self.compared.endswith(("direction", "directions")):
            text.append(f"along {self.compared}, not element by element (full_size={size} would)")
        return "; ".join(text)


@shown
@dataclass(frozen=True)
class Report(Verdict):
    """What `gradcheck` found. True if everything passed; ``str(report)`` is a table, ``report.check()`` raises if not.

    Attributes
    ----------
    mode : str
    rtol : float
    rows : tuple of Row
        One for each leaf. Empty if a failed check made comparing pointless.
    checks : tuple of Check
    constants : tuple of str
        What f uses and is not checked: names, and why.
    computed : tuple of (str, str)
        The operations that gradients came through, each with the kernel that stood in for it; "" if it computed itself.
    tf32 : bool
        Whether float32 products of the device are in TF32 at the time: those of float64, which are checked, are not.
    """

    mode: str
    rtol: float
    rows: tuple[Row, ...]
    checks: tuple[Check, ...]
    constants: tuple[str, ...] = ()
    computed: tuple[tuple[str, str], ...] = ()
    tf32: bool = False

    @property
    def passed(self) -> bool:  # type: ignore[override]
        return all(row.passed for row in self.rows) and all(check.passed for check in self.checks)

    @property
    def untested(self) -> tuple[str, ...]:
        """The leaves about which nothing was learnt: their gradients are 0 everywhere, by hand and numerically."""
        return tuple(row.name for row in self.rows if row.untested)

    @property
    def unchecked(self) -> tuple[str, ...]:
        """All that was not tested: of each leaf, and what is no leaf."""
        return (*(f"{row.name}: {row.unchecked}" for row in self.rows if row.unchecked), *self.constants)

    @property
    def error(self) -> float:
        """The largest relative error of all leaves."""
        return max((row.error for row in self.rows), default=0.0)

    def __getitem__(self, name: str) -> Row:
        """The row of a leaf."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}: the leaves are {', '.join(row.name for row in self.rows)}")

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        if self.passed and self.untested:
            verdict += f", but {', '.join(self.untested)} {'was' if len(self.untested) == 1 else 'were'} not tested"
        lines = paragraph(f"gradcheck {verdict}: {self.mode}, relative tolerance {self.rtol:.3g}", "", "    ")
        if self.rows:
            lines += table(("leaf", "shape", "compared", "error", "at", ""),
                           [(row.name, str(row.shape), row.compared, f"{row.error:.1e}", row.where,
                             "NOT TESTED" if row.untested else "ok" if row.passed else "FAILED") for row in self.rows])
        found = [f"FAILED  {row.name} at {row.where}: {row.analytic:.9g} by hand, {row.numerical:.9g} numerically: {row.guess}"
                 for row in self.rows if not row.passed]
        found += [f"FAILED  {check.name}: {check.detail}" for check in self.checks if not check.passed]
        found += [f"NOT TESTED  {row.name}: {NOTHING}" for row in self.rows if row.untested]
        for text in found + self._unseen():
            lines += paragraph(text)
        held = ", ".join(check.name for check in self.checks if check.passed)
        ran = ", ".join(f"{op} (kernel {kernel})" if kernel else f"{op} (reference)" for op, kernel in self.computed)
        for label, text in (("also held", held), ("computed by", ran)):
            lines += paragraph(f"{label}: {text}") if text else []
        lines += paragraph(IN_TF32) if self.tf32 else []
        return "\n".join(lines)

    def _unseen(self) -> list[str]:
        """What else was not tested, in few lines; `unchecked` has it all."""
        partly = [f"not tested  {row.name}: {row.zeros} of {math.prod(row.shape)} elements are 0 by hand and numerically"
                  f"{f' ({row.zeros_at})' if row.zeros_at else ''}: a wrong factor would not show there"
                  for row in self.rows if row.zeros and not row.untested]
        if len(partly) > MOST:
            partly[MOST:] = [f"not tested  elements of {len(partly) - MOST} more leaves: see report.unchecked"]
        big = [row for row in self.rows if row.compared.endswith(("direction", "directions"))]
        if big:
            partly.append(f"not tested  each element of {_named([row.name for row in big])}: {big[0].compared} only. "
                          f"full_size={max(math.prod(row.shape) for row in big)} checks them one by one")
        return partly + ([f"not checked  {_named(list(self.constants))}"] if self.constants else [])


def _named(names: list[str]) -> str:
    return ", ".join(names if len(names) <= MOST else [*names[:MOST - 1], f"{len(names) - MOST + 1} more"])


def paragraph(text: str, first: str = "  ", others: str = "      ") -> list[str]:
    """Lines of a text that fit a terminal."""
    return textwrap.wrap(text, WIDTH - 2, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text with aligned columns. Long names lose their beginning, so that a line fits a terminal."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    room = max(WIDTH - sum(widths[1:]) - 2 * len(widths), len(header[0]), 16)
    if widths[0] > room:
        rows = [(f"...{line[0][3 - room:]}" if len(line[0]) > room else line[0], *line[1:]) for line in rows]
        widths[0] = room
    return [("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths))).rstrip()
            for line in (header, *rows)]
