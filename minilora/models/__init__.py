"""Transformers, whole: GPT-2, BERT and Llama, with the module names of their checkpoints, which `load` reads and `save` writes.

Everything here is read when it is used: `import minilora` reads none of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bert import Bert, BertConfig, BertLayer
    from .causal import CausalLM
    from .checkpoints.reading import load
    from .deberta import DebertaV2, DebertaV2Layer
    from .deberta_config import DebertaV2Config
    from .gpt2 import GPT2, GPT2Block, GPT2Body, GPT2Classifier, GPT2Config
    from .group import Group
    from .heads.labels import Labels
    from .llama import Llama, LlamaBody, LlamaLayer
    from .llama_configs import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

HOMES = {
    "Bert": "bert", "BertConfig": "bert", "BertLayer": "bert", "CausalLM": "causal", "DebertaV2": "deberta",
    "DebertaV2Config": "deberta_config", "DebertaV2Layer": "deberta", "GPT2": "gpt2", "GPT2Block": "gpt2",
    "GPT2Body": "gpt2", "GPT2Classifier": "gpt2", "GPT2Config": "gpt2", "Group": "group", "Labels": "heads.labels",
    "Llama": "llama", "LlamaBody": "llama", "LlamaConfig": "llama_configs", "LlamaLayer": "llama",
    "MistralConfig": "llama_configs", "Qwen2Config": "llama_configs", "Qwen3Config": "llama_configs",
    "load": "checkpoints.reading",
}

__all__ = [
    "Bert", "BertConfig", "BertLayer", "CausalLM", "DebertaV2", "DebertaV2Config", "DebertaV2Layer", "GPT2", "GPT2Block",
    "GPT2Body", "GPT2Classifier", "GPT2Config", "Group", "Labels", "Llama", "LlamaBody", "LlamaConfig", "LlamaLayer",
    "MistralConfig", "Qwen2Config", "Qwen3Config", "load",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
