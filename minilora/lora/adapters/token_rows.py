"""Which rows of which embeddings a config trains in place of the base's: `trainable_token_indices`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ...errors import ConfigError
from ..config import Config
from ..gradients.tokens import check_indices
from ..layers.saved import SavedModule
from .inventory import Inventory, Layer

__all__ = ["TokenRows", "token_rows"]

INPUTS = ("embed_tokens", "wte", "word_embeddings")  # what models call the embedding of their tokens


class TokenRows(NamedTuple):
    """The rows by path, a line for every entry that hits nothing, and one for whatever else is wrong."""

    found: dict[str, tuple[int, ...]]
    unmatched: list[str]
    unsound: list[str]


def token_rows(layers: Inventory, config: Config, targets: Iterable[str], saved: Iterable[str]) -> TokenRows:
    """The embeddings that `trainable_token_indices` means: those of its names, or the one that the model's tokens go through.

    Parameters
    ----------
    layers : Inventory
    config : Config
    targets, saved : iterable of str
        Paths that the same config adapts, or trains as a whole.
    """
    said, result = config.trainable_token_indices, TokenRows({}, [], [])
    tables = [layer for layer in layers if layer.kind == "Embedding"]
    if said is None:
        return result
    names = f"The embeddings of the model are {', '.join(layer.path for layer in tables) or 'none'}"
    if isinstance(said, Mapping):
        for name, indices in said.items():
            hits = [layer for layer in tables if layer.path == name or layer.path.endswith(f".{name}")]
            if not hits:
                result.unmatched.append(f"trainable_token_indices: {name!r} matches no embedding. {names}")
            for layer in hits:
                _add(result, layer, indices, targets, saved)
        return result
    inputs = _inputs(layers, tables)
    if len(inputs) == 1:
        _add(result, inputs[0], said, targets, saved)
    else:
        first = tables[0].path if tables else "embed_tokens"
        result.unsound.append("trainable_token_indices: a list is for the embedding of the tokens, and it is not plain which "
                              f"that is. {names}: name one, as in {{{first!r}: {list(said)}}}")
    return result


def _inputs(layers: Inventory, tables: list[Layer]) -> list[Layer]:
    """The embedding of the tokens: what the model says it is, else by its usual name, else the only one."""
    model: Any = next((layer.module for layer in layers if not layer.path), None)
    own = getattr(model, "embedding", None)
    own = own.original if isinstance(own, SavedModule) else own
    found = [layer for layer in tables if own is not None and layer.module is own]
    return found or [layer for layer in tables if layer.path.split(".")[-1] in INPUTS] or tables


def _add(result: TokenRows, layer: Layer, indices: Sequence[int], targets: Iterable[str], saved: Iterable[str]) -> None:
    path, here = layer.path, f"trainable_token_indices: {layer.path}"
    assert layer.weight is not None
    if path in result.found:
        result.unsound.append(f"{here} is named twice")
    if path in targets:
        result.unsound.append(f"{here} is adapted too (target_modules): an embedding has an update or rows of its own, not "
                              "both, as in PEFT. exclude_modules can leave it out")
    outer = next((other for other in saved if path == other or path.startswith(f"{other}.")), None)
    if outer is not None:
        result.unsound.append(f"{here} is trained as a whole already ({outer} in modules_to_save)")
    elif layer.whole is not None and layer.whole.path != path:
        result.unsound.append(f"{here} lies inside {layer.whole}")
    try:
        result.found[path] = check_indices(indices, layer.weight.shape[0])
    except ConfigError as error:
        result.unsound.append(f"{here}: {error}")
