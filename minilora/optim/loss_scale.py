"""The factor of a loss whose gradients pass through float16, found while training goes on."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy

from .. import backend, replay
from ..errors import ConfigError, DivergedError, StateDictError, StateError
from ..settings import number, whole
from .optimizer import Optimizer

__all__ = ["LossScale", "power_of_two"]

Array = Any

MOST = 2.0 ** 32  # float16 has nothing to gain from more: its smallest number is 2^-24


class LossScale:
    """Multiplies the loss by S, and divides the gradients by it again: in between they fit into float16.

    Below 6e-8 float16 has nothing, and most gradients of activations are small: without a factor they become 0. With too large
    a one they end at 65504. So S starts large; when a gradient is infinite or NaN, the step is skipped and S halved, and after
    `growth_steps` good steps in a row S is doubled. S is a power of two: in float32 it changes no bit of a gradient.

    Parameters
    ----------
    start : float
        The first S, a power of two from 1 to 2^32. S leaves that range never.
    growth_steps : int
    max_skips : int
        So many skipped steps in a row are no matter of S any more.

    Attributes
    ----------
    value : float
        S.
    good : int
        Good steps since it changed.
    skipped : int
        All steps that were skipped.
    in_a_row : int
        Those since the last good one.

    Raises
    ------
    ConfigError
        If a setting is out of range.

    Notes
    -----
    A loss that is not finite has nothing to do with S, which comes after it: that is for the caller to see. `train.fit` does
    all of this with ``Settings(precision="mixed")``. In a step for `minilora.record` everything but `step` may be recorded;
    S is that of every call.
    Source: Micikevicius et al. 2017, arXiv 1710.03740, section 3.2; S found by itself as in NVIDIA's and PyTorch's programs.

    Examples
    --------
    >>> import minilora
    >>> from minilora.half import mixed
    >>> layer = minilora.nn.Linear(2, 1, rng=0)
    >>> optimizer, scaling = minilora.optim.SGD(layer.parameters(), lr=0.1), LossScale()
    >>> with mixed():
    ...     loss = minilora.ops.mean(layer(minilora.tensor([[1.0, 2.0]])))
    ...     scaling.scaled(loss).backward()
    ...     scaling.unscale(optimizer)
    ...     norm = optimizer.clip_grad_norm(1.0)
    >>> scaling.step(optimizer, norm), scaling.value  # 2^16 is the gradient of the output, and more than float16 holds
    (False, 32768.0)
    """

    def __init__(self, start: float = 2.0 ** 16, growth_steps: int = 2000, max_skips: int = 20) -> None:
        self.value = power_of_two("start", start)
        self.growth_steps, self.max_skips = whole("growth_steps", growth_steps), whole("max_skips", max_skips)
        self.good, self.skipped, self.in_a_row = 0, 0, 0
        self._unscaled: Optimizer | None = None

    def __repr__(self) -> str:
        return f"LossScale({self.value:g}, {self.skipped} skipped)"

    def scaled(self, loss: Any) -> Any:
        """S times the loss, a Tensor, in at least float32."""
        loss = loss if loss.dtype.itemsize >= 4 else loss.astype("float32")
        (factor,) = replay.changing(lambda: (self.value,), loss.dtype)
        return loss * factor

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide an optimizer's gradients by S: once after the last backward of a step, and before they are clipped.

        Raises
        ------
        StateError
            If that was done already since the last `step`.
        """
        self._count(optimizer)
        replay.repeat(lambda: self._count(optimizer), lambda: functools.partial(setattr, self, "_unscaled", self._unscaled))
        for group in optimizer.groups:
            gradients = group.found()
            if gradients:
                (factor,) = replay.changing(lambda: (1.0 / self.value,), gradients[0].dtype)
            for g in gradients:
                g *= factor

    def _count(self, optimizer: Optimizer) -> None:
        if self._unscaled is optimizer:
            raise StateError("LossScale: these gradients were divided by the scale already: call unscale once between the last "
                             "backward and step")
        self._unscaled = optimizer

    def step(self, optimizer: Optimizer, norm: Any) -> bool:
        """Make the optimizer's step if the norm of its gradients is finite; change S. Whether the step was made.

        Parameters
        ----------
        optimizer : Optimizer
        norm : float or array ()
            What `Optimizer.clip_grad_norm` gave. It is read: a sync point.

        Raises
        ------
        DivergedError
            If S can be blamed no longer: it is 1 already, or `max_skips` steps in a row were skipped. Nothing has changed.
        StateError
            Within `minilora.record`.
        """
        replay.refuse_waiting("LossScale.step")
        self._unscaled = None
        taken = math.isfinite(norm if isinstance(norm, (float, int, numpy.generic)) else backend.to_host(norm))
        if taken:
            optimizer.step()
            self.stepped()
        else:
            self.overflowed()
        return taken

    def stepped(self) -> None:
        """Count a good step."""
        self.good, self.in_a_row = self.good + 1, 0
        if self.good >= self.growth_steps:
            self.value, self.good = min(2.0 * self.value, MOST), 0

    @property
    def exhausted(self) -> str:
        """Why one more overflow is not the scale's fault, in words; "" as long as it may be."""
        if self.value <= 1.0:
            return "the loss scale is 1 already, and cannot be halved"
        if self.in_a_row + 1 >= self.max_skips:
            return f"{self.in_a_row + 1} steps in a row were to be skipped; the loss scale is {self.value:g}"
        return ""

    def overflowed(self) -> None:
        """Count a skipped step, and halve S; `DivergedError` if that is of no use, and then nothing has changed."""
        if self.exhausted:
            raise DivergedError(f"the gradients are not finite, and {self.exhausted}: float16 is not what makes them so. Look "
                                "at the loss and the data, or try a smaller learning rate")
        self.value, self.good = max(0.5 * self.value, 1.0), 0
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs: plain numbers."""
        return {"value": self.value, "good": self.good, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, all of it or nothing; `StateDictError` for anything else."""
        names = ("good", "skipped", "in_a_row")
        try:
            value = power_of_two("value", state["value"])
            counts = [whole(name, state[name], 0) for name in names]
            if len(state) != 1 + len(names):
                raise KeyError(*state)
        except (KeyError, TypeError, ConfigError) as error:
            raise StateDictError(f"LossScale: expected {{'value': a power of two, 'good', 'skipped', 'in_a_row': counts}}, got "
                                 f"{state!r:.200}") from error
        self.value, self._unscaled = value, None
        self.good, self.skipped, self.in_a_row = counts


def power_of_two(name: str, value: Any) -> float:
    """A power of two from 1 to 2^32; `ConfigError` for anything else."""
    found = number(name, value, 1.0)
    if found > MOST or math.frexp(found)[0] != 0.5:
        raise ConfigError(f"{name} must be a power of two from 1 to 2^32, got {value!r}: others would round what they multiply")
    return found
