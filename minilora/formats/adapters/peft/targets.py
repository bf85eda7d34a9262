"""target_modules, such that PEFT gives updates to those modules that have one, and to no other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ....errors import ConfigError
from ....lora.adapters.matching import match
from ....lora.config import ALL_LINEAR, Config
from ..saved import Update

__all__ = ["with_targets"]


def with_targets(config: Config, updates: Mapping[str, Update]) -> Config:
    """The config as it is if it names just these modules, else with all their paths in target_modules.

    What lies inside an updated module, such as the output projection of an attention, has its update by PEFT's own doing and
    is not named.
    """
    wanted = [path for path in updates if not any(path.startswith(f"{outer}.") for outer in updates)]
    if not wanted or _names_just(config, wanted):
        return config
    return dataclasses.replace(config, target_modules=wanted, exclude_modules=None, layers_to_transform=None,
                               layers_pattern=None)


def _names_just(config: Config, wanted: list[str]) -> bool:
    targets = config.target_modules
    if targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        return False
    plain = dataclasses.replace(config, modules_to_save=None, trainable_token_indices=None, rank_pattern={}, alpha_pattern={})
    try:
        found = match([(path, (1, 1), 1, "Linear") for path in wanted], plain, allow_unmatched=True)
    except ConfigError:
        return False
    if {target.path for target in found.targets} != set(wanted):
        return False
    return isinstance(targets, str) or all(any(p == entry or p.endswith(f".{entry}") for p in wanted) for entry in targets)
