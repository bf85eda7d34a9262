"""The loss of a diffusion model: to tell the noise in an image.

With x_t and eps as in `NoiseSchedule`, and a network e(x_t, t, c) for images of class c,

    L = mean over images, numbers, steps t and noise eps of (eps - e(x_t, t, c))^2

which is the bound on -log p(x_0) with the weights of the steps left out. Now and then c is replaced by "any": then the same
network tells the noise without a class too, and a sampler can go away from that (`ddim`, guidance).

Nothing is drawn on a device, and nothing where threads could take turns: step and noise are numbers of the data, drawn for one
row at a time (`NoisedRow`), so that a run is the same on every device and with every number of processes, also when it is
resumed.

Sources: Ho, Jain and Abbeel 2020, arXiv 2006.11239, equation 14 and algorithm 1; Ho and Salimans 2022, arXiv 2207.12598,
algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy

from ... import ops
from ...settings import number
from ...tensor import Tensor, tensor
from .schedule import NoiseSchedule

__all__ = ["NoisedRow", "noise_loss"]


class NoisedRow:
    """Draws a step and noise for an image: what `train.data.Redrawn` calls for every row.

    Parameters
    ----------
    schedule : NoiseSchedule
    any_class : int, optional
        The label that stands for "any".
    drop : float
        How often a label is replaced by it, in [0, 1).

    Raises
    ------
    ConfigError
        If `drop` is outside its range.

    Examples
    --------
    >>> draw = NoisedRow(NoiseSchedule())
    >>> sorted(draw(numpy.random.default_rng(0), {"x": numpy.zeros((1, 8, 8), "float32"), "labels": numpy.int64(3)}))
    ['labels', 'noise', 't', 'x']
    """

    def __init__(self, schedule: NoiseSchedule, any_class: int | None = None, drop: float = 0.1) -> None:
        self.schedule, self.any_class = schedule, any_class
        self.drop = number("drop", drop, 0.0, 1.0) if any_class is not None else 0.0

    def __repr__(self) -> str:
        return f"NoisedRow({self.schedule!r}, any_class={self.any_class}, drop={self.drop})"

    def __call__(self, rng: numpy.random.Generator, row: Mapping[str, Any]) -> dict[str, Any]:
        """From a row with an image "x" (and "labels") to one with x_t, "t" and "noise"; the draws are t, eps, then the label.

        All three are drawn whatever becomes of them, so that a row's noise does not depend on `drop`.
        """
        x, t = row["x"], int(rng.integers(self.schedule.steps))
        noise = rng.standard_normal(x.shape).astype(x.dtype)
        dropped = rng.random() < self.drop
        drawn = {**row, "x": self.schedule.noised(x, t, noise), "t": numpy.int64(t), "noise": noise}
        if dropped:
            drawn["labels"] = numpy.asarray(self.any_class, row["labels"].dtype)
        return drawn


def noise_loss(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The mean of (eps - e(x_t, t, c))^2 over a batch of such rows: a `loss` for `train.fit`.

    Parameters
    ----------
    model : Module
        Called with x_t, t and, if there are "labels", these.
    inputs : mapping
        Host arrays "x" (N, C, height, width), "t" (N,), "noise" like x, and "labels" (N,) or none.
    """
    told = model(tensor(inputs["x"]), inputs["t"], *([inputs["labels"]] if "labels" in inputs else []))
    return ops.mse(told, tensor(inputs["noise"]))
