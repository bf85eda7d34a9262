"""The other ways to train few numbers: vectors in front of the tokens, or of each layer, and a subspace of all weights."""

from typing import TYPE_CHECKING

from ..later import later

if TYPE_CHECKING:
    from .config import PrefixConfig, PromptConfig
    from .switching import activate, disabled, fold, inject, names, remove
    from .virtual import Prefix, Prompt

__all__ = ["Prefix", "PrefixConfig", "Prompt", "PromptConfig", "activate", "disabled", "fold", "inject", "names", "remove"]

__getattr__, __dir__ = later(globals(), {
    "config": "PrefixConfig PromptConfig",
    "switching": "activate disabled fold inject names remove",
    "virtual": "Prefix Prompt",
    "intrinsic": "intrinsic",
})
