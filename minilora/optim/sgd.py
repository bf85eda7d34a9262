"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .. import replay
from ..tensor import Parameter
from .group import Group, Run
from .optimizer import Optimizer, check_range

__all__ = ["SGD"]


class SGD(Optimizer):
    """Gradient descent: theta <- theta - lr v with v <- momentum v + g, where g is the gradient plus weight_decay theta.

    Parameters
    ----------
    params : iterable of Parameter, or list of dict
    lr : float
    momentum : float
        In [0, 1).
    weight_decay : float

    Examples
    --------
    >>> import minilora
    >>> w = minilora.Parameter(minilora.backend.asarray([4.0]))
    >>> optimizer = minilora.optim.SGD([w], lr=0.25)
    >>> (w * w).sum().backward()
    >>> optimizer.step()
    >>> w.data
    array([2.], dtype=float32)
    """

    state_names = ("velocity",)
    fresh = frozenset({"lr"})

    def __init__(self, params: Iterable[Parameter] | Iterable[dict[str, Any]], lr: float, momentum: float = 0.0,
                 weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def check_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().check_settings(settings),
                "momentum": check_range("momentum", settings["momentum"], 0.0, 1.0),
                "weight_decay": check_range("weight_decay", settings["weight_decay"], 0.0)}

    def update(self, group: Group, run: Run) -> None:
        theta, g = group.widened(run)
        if group.settings["weight_decay"]:
            g = g + group.settings["weight_decay"] * theta
        if group.settings["momentum"]:
            v = group.state["velocity"][run.start:run.stop]
            v *= group.settings["momentum"]
            v += g
            g = v
        (lr,) = replay.changing(lambda: (group.settings["lr"],), theta.dtype)
        theta -= lr * g
        group.narrowed(run, theta)
