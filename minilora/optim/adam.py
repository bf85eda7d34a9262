"""Adam and AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from .. import backend, replay
from ..errors import ConfigError
from ..tensor import Parameter
from .group import Group, Run
from .optimizer import Optimizer, check_range

__all__ = ["Adam", "AdamW", "adam_update"]

Array = Any


def adam_update(theta: Array, g: Array, m: Array, v: Array, beta1: float, beta2: float, size: float, eps: float,
                keep: float) -> None:
    """One pass of Adam over flat arrays, in place on theta, m and v.

        m <- beta1 m + g
        v <- beta2 v + g^2
        theta <- keep theta - size m / (sqrt(v) + eps)

    m and v are weighted sums, not means: the factors (1 - beta1) and (1 - beta2) of the means, and the bias corrections of
    step t, are the same for every element, so they go into two numbers, and each element is spared four multiplications. With
    p = (1 - beta1) / (1 - beta1^t) and q^2 = (1 - beta2) / (1 - beta2^t), Adam's step is

        lr (p m) / (sqrt(q^2 v) + eps0) = (lr p / q) m / (sqrt(v) + eps0 / q),

    hence size = lr p / q and eps = eps0 / q.
    """
    m *= beta1
    m += g
    v *= beta2
    v += g * g
    step = m / (v ** 0.5 + eps)
    step *= size
    if keep != 1.0:
        theta *= keep
    theta -= step


class Adam(Optimizer):
    """Adam: theta <- theta - lr m' / (sqrt(v') + eps), with m' and v' the bias-corrected means of g and g^2.

        m <- beta1 m + (1 - beta1) g          m' = m / (1 - beta1^t)
        v <- beta2 v + (1 - beta2) g^2        v' = v / (1 - beta2^t)

    Parameters
    ----------
    params : iterable of Parameter, or list of dict
    lr : float
    betas : tuple of two floats
        Each in [0, 1).
    eps : float
    weight_decay : float
        Added to the gradient as weight_decay theta (L2); `AdamW` decays the weights themselves.

    Notes
    -----
    The state holds m / (1 - beta1) as ``"m"`` and v / (1 - beta2) as ``"v"``, for the reason given in `adam_update`. Beside
    float16 parameters it is float32, as is the arithmetic: there eps would be 0, and g^2 overflow from 256 on.
    Source: Kingma and Ba 2014, arXiv 1412.6980, algorithm 1. The defaults are the paper's and PyTorch's.

    Examples
    --------
    >>> import minilora
    >>> w = minilora.Parameter(minilora.backend.asarray([4.0]))
    >>> optimizer = minilora.optim.Adam([w], lr=0.5)
    >>> (w * w).sum().backward()
    >>> optimizer.step()  # the first step moves by lr, whatever the gradient's size
    >>> round(float(w.data[0]), 6)
    3.5
    """

    state_names = ("m", "v")
    fresh = frozenset({"lr", "eps"})
    decoupled = False

    def __init__(self, params: Iterable[Parameter] | Iterable[dict[str, Any]], lr: float = 1e-3,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def check_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        betas = settings["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ConfigError(f"betas must be a pair of numbers in [0, 1), got {betas!r}")
        return {**super().check_settings(settings),
                "betas": tuple(check_range(f"betas[{i}]", beta, 0.0, 1.0) for i, beta in enumerate(betas)),
                "eps": check_range("eps", settings["eps"], 0.0),
                "weight_decay": check_range("weight_decay", settings["weight_decay"], 0.0)}

    def update(self, group: Group, run: Run) -> None:
        settings, (beta1, beta2) = group.settings, group.settings["betas"]
        theta, g = group.widened(run)
        if settings["weight_decay"] and not self.decoupled:
            g = g + settings["weight_decay"] * theta
        numbers = replay.changing(lambda: self.numbers(group.settings, group.steps[run.first]), theta.dtype)
        rule = backend.device_of(theta).resolve(adam_update)
        rule(theta, g, group.part(run, group.state["m"]), group.part(run, group.state["v"]), beta1, beta2, *numbers)
        group.narrowed(run, theta)

    def numbers(self, settings: Mapping[str, Any], step: int) -> tuple[float, float, float]:
        """`size`, `eps` and `keep` of `adam_update` in this step: all that changes from step to step."""
        beta1, beta2 = settings["betas"]
        p = (1.0 - beta1) / (1.0 - beta1 ** step)
        q = math.sqrt((1.0 - beta2) / (1.0 - beta2 ** step))
        keep = 1.0 - settings["lr"] * settings["weight_decay"] if self.decoupled else 1.0
        return settings["lr"] * p / q, settings["eps"] / q, keep


class AdamW(Adam):
    """Adam with decoupled weight decay: theta <- (1 - lr weight_decay) theta, then Adam's step without decay.

    Notes
    -----
    Source: Loshchilov and Hutter 2017, arXiv 1711.05101, algorithm 2.
    """

    decoupled = True

    def __init__(self, params: Iterable[Parameter] | Iterable[dict[str, Any]], lr: float = 1e-3,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)
