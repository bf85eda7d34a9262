"""LoRA+: a larger learning rate for B than for A."""

from __future__ import annotations

from typing import Any

from ... import nn
from ...errors import ConfigError
from ..algebra.factors import check_factor
from ..layers.places import layers_of

__all__ = ["lora_plus_groups"]


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 16.0, **settings: Any) -> list[dict[str, Any]]:
    """Groups for an optimizer in which B, and every vector, learns `ratio` times as fast as A.

    Parameters
    ----------
    model : Module
    lr : float
        For A, and for whole modules that are trained.
    ratio : float
        Learning rate of B over that of A; also of biases and of DoRA's lengths, as in the authors' code and in PEFT. Of an
        embedding it is A that starts at 0, and that gets the larger rate.
    **settings
        For both groups, such as weight_decay.

    Returns
    -------
    list of dict
        For `optim.Adam` and the others.

    Raises
    ------
    ConfigError
        If nothing of an adapter is trained, or lr or ratio is not a finite number above 0.

    Notes
    -----
    For features to move by an amount that does not depend on the width n, B must be learned at a rate that is larger than A's
    by a factor that grows with n. The paper takes 2^4 as a start, with lr somewhat lower than without.
    Source: Hayou et al. 2024, arXiv 2402.12354.

    Examples
    --------
    >>> import minilora
    >>> layer = minilora.lora.Linear(4, 3, r=2, rng=0)
    >>> optimizer = minilora.optim.Adam(minilora.lora.lora_plus_groups(layer, lr=1e-3))
    >>> [group.settings["lr"] for group in optimizer.groups]
    [0.001, 0.016]
    """
    for what, value in (("lr", lr), ("ratio", ratio)):
        if check_factor(what, value) <= 0:
            raise ConfigError(f"{what} must be above 0, got {value!r}")
    fast = {id(getattr(adapter, layer.zero)) for layer in layers_of(model).values() for adapter in layer.adapters.values()}
    trained = [p for p in model.parameters() if p.trainable]
    if not any(id(p) in fast for p in trained):
        raise ConfigError("lora_plus_groups: no B of an adapter is trained: inject an adapter, or activate it, first")
    groups = [[p for p in trained if id(p) not in fast and p.ndim != 1], [p for p in trained if id(p) in fast or p.ndim == 1]]
    rates = (float(lr), float(lr) * float(ratio))
    return [{"params": group, "lr": rate, **settings} for group, rate in zip(groups, rates) if group]
