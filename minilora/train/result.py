"""What a run came to."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from ..shown import shown

__all__ = ["Evaluation", "Result"]


@shown
@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The mean loss over the targets of an evaluation, and what else was measured.

    Attributes
    ----------
    step : int
        After how many updates.
    loss : float
    targets : int
        Targets.
    accuracy : float, optional
        Share of them that the model's largest logit names, where targets are classes.
    perplexity : float, optional
        e to the loss, of a model that predicts tokens.
    """

    step: int
    loss: float
    targets: int
    accuracy: float | None = None
    perplexity: float | None = None

    @property
    def accuracy_error(self) -> float | None:
        """The standard error of the accuracy, sqrt(a (1 - a) / n): targets are taken as drawn one by one."""
        a = self.accuracy
        return None if a is None else math.sqrt(a * (1.0 - a) / self.targets)

    def __str__(self) -> str:
        parts = [f"loss {self.loss:.4f}"]
        if self.perplexity is not None:
            parts.append(f"perplexity {self.perplexity:.4g}")
        if self.accuracy is not None:
            parts.append(f"accuracy {self.accuracy:.2%} +- {self.accuracy_error:.2%}")
        return "  ".join([*parts, f"({self.targets:,} targets)"])


@dataclasses.dataclass(frozen=True)
class Result:
    """What `fit` gives back.

    Attributes
    ----------
    step : int
        The last update.
    losses : list of (int, float)
        Step and loss of each report.
    evaluations : list of Evaluation
    best : Evaluation, optional
        The one with the lowest loss; the model holds its weights at the end.
    seconds : float
    folder : Path, optional
        Where the run was written.
    notes : tuple of str
        What deserves a look.
    skipped : int
        In mixed precision: overflows of the gradients, each of which cost a second computation of its update.
    """

    step: int
    losses: list[tuple[int, float]]
    evaluations: list[Evaluation]
    best: Evaluation | None
    seconds: float
    folder: Path | None = None
    notes: tuple[str, ...] = ()
    skipped: int = 0
