"""The other ways to train few numbers: vectors in front of the tokens, or of each layer, and a subspace of all weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import PrefixConfig, PromptConfig
    from .switching import activate, disabled, fold, inject, names, remove
    from .virtual import Prefix, Prompt

__all__ = ["Prefix", "PrefixConfig", "Prompt", "PromptConfig", "activate", "disabled", "fold", "inject", "names", "remove"]

_LATER = {name: place for place, names_ in {
    "config": "PrefixConfig PromptConfig",
    "switching": "activate disabled fold inject names remove",
    "virtual": "Prefix Prompt",
}.items() for name in names_.split()}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_LATER[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
