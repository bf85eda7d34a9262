"""Where in a model the LoRA layers and the modules trained as a whole stand."""

from __future__ import annotations

from ... import nn
from ...nn.contents import modules_in
from .base import AdaptedLayer
from .saved import SavedModule
from .tokens import TokenTable

__all__ = ["layers_of", "named_through", "saved_of", "tables_of"]


def named_through(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by path, as if no `SavedModule` wrapped any: originals stand in the places of their wrappers."""
    def through(module: nn.Module) -> nn.Module:
        return module.original if isinstance(module, SavedModule) else module

    return {path: module for path, _, module in modules_in(model, nn.Module, through=through)}


def layers_of(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The LoRA layers of a model by path, each once, at its first place; also originals of which an adapter has a copy."""
    found: dict[int, tuple[str, AdaptedLayer]] = {}
    for path, module in named_through(model).items():
        if isinstance(module, AdaptedLayer):
            found.setdefault(id(module), (path, module))
    return dict(found.values())


def saved_of(model: nn.Module) -> dict[str, SavedModule]:
    """The modules that are trained as a whole by some adapter, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, SavedModule)}


def tables_of(model: nn.Module) -> dict[str, TokenTable]:
    """The tables of which the active adapters replace rows, by the path of the embedding."""
    found = {path: wrapper.copies[wrapper.active] for path, wrapper in saved_of(model).items() if wrapper.active is not None}
    return {path: own for path, own in found.items() if isinstance(own, TokenTable)}
