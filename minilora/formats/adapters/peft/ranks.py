"""r, lora_alpha and their patterns, such that PEFT finds the rank and the scaling that each update has."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ....lora.config import Config
from ..saved import Update

__all__ = ["alpha_for", "with_ranks"]


def with_ranks(config: Config, updates: Mapping[str, Update]) -> Config:
    """The config with patterns under which every update has its rank and, to the last bit where a float can say it, its s.

    Patterns that do so already are kept. PEFT sorts them when it writes, and the first key that fits counts: so they are
    looked at in that order.
    """
    if not updates:
        return config
    config = dataclasses.replace(config, rank_pattern=_sorted(config.rank_pattern), alpha_pattern=_sorted(config.alpha_pattern))
    ranks = {path: update.r for path, update in updates.items()}
    if any(config.rank_at(path) != r for path, r in ranks.items()):
        r, pattern = _split(ranks, config.r)
        config = dataclasses.replace(config, r=r, rank_pattern=pattern)
    if any(config.scaling_for(u.r, config.alpha_at(path)) != u.s for path, u in updates.items()):
        alphas = {path: alpha_for(u.s, u.r, config, config.alpha_at(path)) for path, u in updates.items()}
        alpha, pattern = _split(alphas, config.lora_alpha)
        config = dataclasses.replace(config, lora_alpha=alpha, alpha_pattern=pattern)
    return config


def alpha_for(s: float, r: int, config: Config, likely: float) -> float:
    """The lora_alpha from which the config's rule makes s at rank r: the likely one, a whole number, or the nearest float.

    For some s no float does, since lora_alpha / r is rounded: then s is off by its last bit.
    """
    product = s * math.sqrt(r) if config.use_rslora else s * r
    tried = [likely, product, math.nextafter(product, math.inf), math.nextafter(product, -math.inf)]
    if abs(product) < 2 ** 53 and round(product):
        tried.insert(1, round(product))
    exact = [alpha for alpha in tried if alpha and config.scaling_for(r, alpha) == s]
    return exact[0] if exact else product


def _sorted(pattern: Mapping[str, Any]) -> dict[str, Any]:
    return {key: pattern[key] for key in sorted(pattern)}


def _split(values: Mapping[str, Any], default: Any) -> tuple[Any, dict[str, Any]]:
    """One value for most modules, and a pattern for the others, whose keys are the whole paths and fit nothing else."""
    counts = Counter(values.values())
    common = default if default in counts else counts.most_common(1)[0][0]
    return common, {f"^{re.escape(path)}": value for path, value in sorted(values.items()) if value != common}
