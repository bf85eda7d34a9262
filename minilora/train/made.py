"""What a run's settings make: its optimizer, and the schedule of its learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import optim
from ..errors import ConfigError
from ..flags import option
from ..lora.adapters.learning_rates import lora_plus_groups
from ..nn.module import Module
from ..optim.optimizer import Optimizer
from .settings import Settings

__all__ = ["made_optimizer", "made_scaling", "made_schedule", "made_scheduler"]


def made_optimizer(model: Module, settings: Settings, made_by: Callable[[list[Any]], Optimizer] | None = None) -> Optimizer:
    """AdamW over what is trained, or what a user's function makes of (name, parameter) pairs.

    With LoRA+ there are groups of two rates; where parameters have several dtypes, groups of each.

    Raises
    ------
    ConfigError
        If nothing is trained, or a user's optimizer and a setting that only AdamW knows were both given.
    """
    named = list(model.named_parameters())
    if not any(p.trainable for _, p in named):
        raise ConfigError(f"nothing to train: all {sum(p.size for _, p in named):,} numbers of the model are frozen. Put an "
                          "adapter into it first, lora.inject(model, lora.Config(...)), or for full fine-tuning write "
                          "model.requires_grad()")
    if made_by is not None:
        if settings.loraplus_ratio is not None or settings.weight_decay:
            raise ConfigError("loraplus_ratio and weight_decay are settings of AdamW, and an optimizer of your own was given: "
                              "make its groups yourself, with lora.lora_plus_groups(...), and leave these two out")
        return made_by(named)
    groups: list[dict[str, Any]] = [{"params": [p for _, p in named if p.trainable], "lr": settings.learning_rate}]
    if settings.loraplus_ratio is not None:
        groups = lora_plus_groups(model, settings.learning_rate, settings.loraplus_ratio)
    names = {id(p): name for name, p in named}
    return optim.AdamW([{**group, "params": [(names[id(p)], p) for p in group["params"] if p.dtype == dtype]}
                        for group in groups for dtype in dict.fromkeys(p.dtype for p in group["params"])],
                       lr=settings.learning_rate, weight_decay=settings.weight_decay)


def made_schedule(settings: Settings, total: int) -> Callable[[int], float]:
    """The factor of the learning rate at each step."""
    warmup = int(settings.warmup) if settings.warmup >= 1 else round(settings.warmup * total)
    if settings.schedule == "constant":
        return optim.constant(warmup)
    return (optim.cosine if settings.schedule == "cosine" else optim.linear)(max(total, warmup + 1), warmup)


def made_scheduler(optimizer: Optimizer, settings: Settings, total: int) -> optim.Scheduler:
    """What writes the rate of each step into the optimizer."""
    return optim.Scheduler(optimizer, made_schedule(settings, total))


def made_scaling(optimizer: Optimizer, settings: Settings) -> optim.LossScale | None:
    """The factor of the loss in mixed precision; None without.

    Raises
    ------
    ConfigError
        If something else than float32 is trained in mixed precision.
    """
    if settings.precision == "full":
        return None
    found = {str(group.data.dtype): name or "a parameter" for group in optimizer.groups for name in group.names[:1]
             if group.data.dtype != "float32"}
    if found:
        which = ", ".join(f"{name} is {dtype}" for dtype, name in found.items())
        mixed = option("precision='mixed'", "--precision mixed")
        convert = option("model.to(dtype='float32')", "--dtype float32")
        raise ConfigError(f"{mixed} trains float32 weights, and {which}: convert the model first, {convert}, or leave it out")
    return optim.LossScale(settings.loss_scale, settings.scale_growth, settings.max_skips)
