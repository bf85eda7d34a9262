"""What a run came to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

__all__ = ["Evaluation", "Result"]


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
    """

    step: int
    loss: float
    targets: int
    accuracy: float | None = None


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
    """

    step: int
    losses: list[tuple[int, float]]
    evaluations: list[Evaluation]
    best: Evaluation | None
    seconds: float
    folder: Path | None = None
