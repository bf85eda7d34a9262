"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .. import backend, replay
from ..tensor import Parameter
from .group import Group, Run
from .optimizer import Optimizer, check_range

__all__ = ["SGD", "sgd_update"]

Array = Any


def sgd_update(theta: Array, g: Array, v: Array | None, lr: float, momentum: float, weight_decay: float) -> None:
    """One pass of gradient descent over flat arrays, in place on theta and, where there is one, v.

        h = g + weight_decay theta
        v <- momentum v + h
        theta <- theta - lr v          without v: theta - lr h

    Parameters
    ----------
    theta, g : array, shape (n,)
    v : array, shape (n,), or None
        The velocity; None without momentum.
    lr : float, or array, shape ()
        An array of the device in a recorded step.
    momentum, weight_decay : float
    """
    if weight_decay:
        g = g + weight_decay * theta
    if v is not None:
        v *= momentum
        v += g
        g = v
    theta -= lr * g


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
        settings = group.settings
        v = group.part(run, group.state["velocity"]) if settings["momentum"] else None
        (lr,) = replay.changing(lambda: (group.settings["lr"],), theta.dtype)
        rule = backend.device_of(theta).resolve(sgd_update)
        rule(theta, g, v, lr, settings["momentum"], settings["weight_decay"])
        group.narrowed(run, theta)
