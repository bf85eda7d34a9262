"""What a training run is: settings that can be checked, written down and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from ..errors import ConfigError
from ..optim.loss_scale import power_of_two
from ..settings import number, whole
from ..shown import tersely

__all__ = ["Settings"]

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("full", "mixed")


@tersely
@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of a run, checked when they are made.

    Parameters
    ----------
    steps : int, optional
        How many updates; or
    epochs : float, optional
        how many times over the data. One of the two; 1 epoch if neither is given.
    batch_size : int
        Rows of a forward pass, over all processes together.
    accumulation : int
        Batches of an update. Its loss and gradient are means over the targets of all of them.
    learning_rate : float
    schedule : {"cosine", "linear", "constant"}
        What becomes of it: down to 0 at the last step, or nothing.
    warmup : int or float
        Steps in which it rises from 0, or, below 1, their share of the run.
    weight_decay : float
        AdamW's.
    max_grad_norm : float, optional
        Gradients are scaled down to this global norm. None for no clipping.
    loraplus_ratio : float, optional
        Rate of B over that of A. None for one rate.
    steps_per_report : int
    steps_per_eval : int, optional
        None: at the end of each epoch. After the last step in any case.
    eval_batches : int, optional
        Of each evaluation; None for all.
    save_every : int, optional
        Steps between checkpoints. None: where an evaluation would be.
    keep : int
        Checkpoints that stay, the best one besides.
    patience : int, optional
        Evaluations without a better one, after which the run ends. None for never.
    seed : int
        Of the order of the data.
    threads : int, optional
        Of `parallel.backward`. None: `parallel.advised_threads`. The bits of a run depend on it.
    precision : {"full", "mixed"}
        "full": in the dtypes of the model. "mixed": activations and their gradients in float16 (`half.mixed`), what is trained
        in float32, the loss multiplied by a factor that is found as the run goes on (`optim.LossScale`).
    loss_scale : float
        With "mixed": the first such factor, a power of two.
    scale_growth : int
        With "mixed": good steps after which it is doubled.
    max_skips : int
        With "mixed": so many overflows in a row end the run.

    Raises
    ------
    ConfigError
        All settings that are out of range, in one message.

    Examples
    --------
    >>> Settings(steps=100, learning_rate=1e-3).schedule
    'cosine'
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    loraplus_ratio: float | None = None
    steps_per_report: int = 10
    steps_per_eval: int | None = None
    eval_batches: int | None = None
    save_every: int | None = None
    keep: int = 2
    patience: int | None = None
    seed: int = 0
    threads: int | None = None
    precision: str = "full"
    loss_scale: float = 2.0 ** 16
    scale_growth: int = 2000
    max_skips: int = 20

    def __post_init__(self) -> None:
        problems = []
        for field in dataclasses.fields(self):
            try:
                object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))
            except ConfigError as error:
                problems.append(str(error))
        if self.steps is not None and self.epochs is not None:
            problems.append("steps and epochs were both given: one of them says how long the run is")
        if problems:
            raise ConfigError("settings: " + "; ".join(problems))

    def as_dict(self) -> dict[str, Any]:
        """Every setting by its name."""
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Settings:
        """The settings of such a dict; `ConfigError` for names that are none."""
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = []
        for name in sorted(set(fields) - set(names)):
            near = get_close_matches(name, names, 1)
            unknown.append(f"{name!r}" + (f" (do you mean {near[0]!r}?)" if near else ""))
        if unknown:
            raise ConfigError(f"settings: there is none called {', '.join(unknown)}")
        return cls(**fields)


def checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """A setting as one of Python's own values; `ConfigError` if it is out of range."""
    name = field.name
    if value is None and "None" in str(field.type):
        return None
    for one, known in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
        if name == one:
            if value not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}")
            return str(value)
    if name == "loss_scale":
        return power_of_two(name, value)
    if name in ("learning_rate", "max_grad_norm", "loraplus_ratio", "epochs"):
        return number(name, value, 0.0, ends="()")
    if name in ("warmup", "weight_decay"):
        return number(name, value, 0.0)
    return whole(name, value, 0 if name == "seed" else 1)
