"""A SavedAdapter as tensors and config of a PEFT folder, such that PEFT computes the same updates from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ....lora.config import Config
from ....lora.config_checks import KNOWN_ELSEWHERE
from ..dialect import Written
from ..faults import Faults
from ..saved import SavedAdapter, TokenRows, Update
from .keys import spell
from .ranks import with_ranks
from .targets import with_targets

__all__ = ["VERSION", "written"]

VERSION = "0.21.2"  # of PEFT, whose settings these are
MOVING = ("pissa", "olora")  # starts under which A and B are not the update: s B0 A0 was taken out of the base
NAMES = ("adapter_model.safetensors", "adapter_config.json")


def written(adapter: SavedAdapter) -> Written:
    """What PEFT would write.

    Raises
    ------
    FormatError
        If a PEFT folder cannot say it: lengths or biases in some layers only, or an embedding with an update and rows.
    """
    faults = Faults()
    config = _with_start(adapter, _with_flags(adapter, faults), faults)
    config = with_targets(with_ranks(config, adapter.updates), adapter.updates)
    config = dataclasses.replace(config, trainable_token_indices=_tokens(config, adapter.tokens))
    for path in adapter.tokens.keys() & adapter.updates.keys():
        faults.add(path, "PEFT cannot give one embedding an update and rows of its own")
    faults.refuse("a PEFT folder cannot say this")
    own = adapter.metadata if adapter.dialect == "peft" else {}  # what another dialect's metadata say may not hold here
    settings = {**KNOWN_ELSEWHERE, **config.to_dict(), "inference_mode": True, "peft_version": config.peft_version or VERSION}
    return Written(_tensors(adapter), {**own, "format": "pt"}, settings, NAMES)


def _tensors(adapter: SavedAdapter) -> dict[str, Any]:
    updates, tensors = adapter.updates, {}
    for path, update in updates.items():
        table = update.kind == "embedding"
        tensors[spell(path, "lora_embedding_A" if table else "lora_A.weight", updates)] = update.A
        tensors[spell(path, "lora_embedding_B" if table else "lora_B.weight", updates)] = update.B
        if update.bias is not None:
            tensors[spell(path, "lora_B.bias", updates)] = update.bias
        if update.magnitude is not None:
            m = update.magnitude
            shaped = m.reshape(1, len(m), *[1] * (len(update.B.shape) - 2)) if update.kind == "convolution" else m
            tensors[spell(path, "lora_magnitude_vector", updates)] = shaped
    for full, array in {**adapter.saved, **adapter.biases}.items():
        tensors[spell(full, "", updates)] = array
    for path, rows in adapter.tokens.items():
        tensors[spell(path, "token_adapter.trainable_tokens_delta", updates)] = rows.rows
    return tensors


def _with_flags(adapter: SavedAdapter, faults: Faults) -> Config:
    """The config with use_dora and lora_bias as the updates have them."""
    updates: list[tuple[str, Update]] = [*adapter.updates.items()]
    lengths = [path for path, update in updates if update.magnitude is not None]
    biased = [path for path, update in updates if update.bias is not None]
    unbiased = [path for path, update in updates if update.bias is None and update.kind != "embedding"]
    if lengths and len(lengths) < len(updates):
        bare = next(path for path, update in updates if update.magnitude is None)
        faults.add(bare, f"no lengths, which {lengths[0]} has: use_dora is for all layers or for none")
    if biased and unbiased:
        faults.add(unbiased[0], f"no lora_bias, which {biased[0]} has: lora_bias is for all layers or for none")
    if biased and lengths:
        faults.add(biased[0], "lora_bias is not for DoRA")
    if len(faults) or not updates:
        return adapter.config
    return dataclasses.replace(adapter.config, use_dora=bool(lengths), lora_bias=bool(biased))


def _with_start(adapter: SavedAdapter, config: Config, faults: Faults) -> Config:
    """The config with `init_lora_weights`: True if the start is a part of the updates, which have twice the rank then."""
    if config.init_lora_weights not in MOVING:
        return config
    ranks = {path: (update.r, config.rank_at(path)) for path, update in adapter.updates.items()}
    if all(r == wanted for r, wanted in ranks.values()):
        return config
    if all(r == 2 * wanted for r, wanted in ranks.values()):
        return dataclasses.replace(config, init_lora_weights=True)
    path, (r, wanted) = next((path, pair) for path, pair in ranks.items() if pair[0] != pair[1])
    faults.add(path, f"rank {r}, where the config has {wanted} and init_lora_weights={config.init_lora_weights!r}: is the "
               "start part of the updates or not? With init_lora_weights=True it is")
    return config


def _tokens(config: Config, tokens: Mapping[str, TokenRows]) -> Any:
    """trainable_token_indices: as the config has it if that says these rows, else by the path of each embedding."""
    said = config.trainable_token_indices
    if not tokens:
        return None
    for path, rows in tokens.items():
        found = said
        if isinstance(said, Mapping):
            found = next((at for name, at in said.items() if path.endswith(name)), None)
        if found is None or tuple(found) != rows.indices:
            return {path: list(rows.indices) for path, rows in tokens.items()}
    if isinstance(said, Mapping) and not all(any(path.endswith(name) for path in tokens) for name in said):
        return {path: list(rows.indices) for path, rows in tokens.items()}
    return said
