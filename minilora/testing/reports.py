"""What the checks give back: true or false, and a table to read."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from ..errors import MiniloraError

__all__ = ["Check", "GradcheckError", "Report", "Row", "Verdict", "table"]

V = TypeVar("V", bound="Verdict")

NOTHING = ("every analytic and every numerical value is 0 at this point, so a wrong factor would not show. Is it multiplied by "
           "zeros, as A is where B = 0? Then fill those first: p.data[...] = rng.standard_normal(p.shape)")


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
    computed : tuple of (str, str)
        The operations that gradients came through, each with the kernel that stood in for it; "" if it computed itself.
    """

    mode: str
    rtol: float
    rows: tuple[Row, ...]
    checks: tuple[Check, ...]
    computed: tuple[tuple[str, str], ...] = ()

    @property
    def passed(self) -> bool:  # type: ignore[override]
        return all(row.passed for row in self.rows) and all(check.passed for check in self.checks)

    @property
    def untested(self) -> tuple[str, ...]:
        """The leaves about which nothing was learnt: their gradients are 0 everywhere, by hand and numerically."""
        return tuple(row.name for row in self.rows if row.untested)

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
        lines = [f"gradcheck {verdict}: {self.mode}, relative tolerance {self.rtol:.3g}"]
        if self.rows:
            lines += table(("leaf", "shape", "compared", "worst error", "at", "analytic", "numerical", ""),
                           [(row.name, str(row.shape), row.compared, f"{row.error:.1e}", row.where,
                             f"{row.analytic:.9g}", f"{row.numerical:.9g}",
                             "NOT TESTED" if row.untested else "ok" if row.passed else "FAILED")
                            for row in self.rows])
        found = [f"FAILED  {row.name}: {row.guess}" for row in self.rows if not row.passed]
        found += [f"NOT TESTED  {row.name}: {NOTHING}" for row in self.rows if row.untested]
        found += [f"FAILED  {check.name}: {check.detail}" for check in self.checks if not check.passed]
        held = ", ".join(check.name for check in self.checks if check.passed)
        ran = ", ".join(f"{op} (kernel {kernel})" if kernel else f"{op} (reference)" for op, kernel in self.computed)
        for text in found + ([f"also held: {held}"] if held else []) + ([f"computed by: {ran}"] if ran else []):
            lines += textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="      ")
        return "\n".join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text with aligned columns."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    return [("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths))).rstrip()
            for line in (header, *rows)]
