"""Adapters that begin with a base of their own (LoftQ): what `inject` says of them, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ... import nn
from ...errors import ConfigError

if TYPE_CHECKING:
    from ..layers.loftq import Begun

__all__ = ["begun_notes", "refuse_shared"]


def begun_notes(begun: Iterable[Begun | None]) -> list[str]:
    """A note on how far from the weights the bases are, without their adapters and with them; none if there are none."""
    found = [one for one in begun if one is not None]
    if not found:
        return []
    before, after = (sum(rests) / len(found) for rests in zip(*((one.rests[0], one.rests[one.turn]) for one in found)))
    turns = sorted({one.turn for one in found})
    return [f"loftq: the adapted weights are held as {found[0].base.kind} now; on average that is {before:.2%} of a weight "
            f"off, and with its adapter {after:.2%} (turn {', '.join(map(str, turns))} was the best). The rest of the model: "
            "minilora.quant.quantize(model)"]


def refuse_shared(model: nn.Module, paths: Sequence[str]) -> None:
    """Raise `ConfigError` if another module shares one of these weights, which would be exchanged for both."""
    modules = dict(model.named_modules())
    owners: dict[int, set[int]] = {}
    for module in modules.values():
        for _, p in module.own_parameters():
            owners.setdefault(id(p), set()).add(id(module))
    shared = [path for path in paths if len(owners[id(getattr(modules[path], "weight", None))]) > 1]
    if shared:
        raise ConfigError(f"init_lora_weights='loftq' quantises the weight too, which other layers share: {', '.join(shared)}. "
                          "Leave them out with exclude_modules, or give them a Parameter of their own")
