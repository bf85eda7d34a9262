"""Transformers, whole: GPT-2, BERT, RoBERTa, DistilBERT and Llama, with the module names of their checkpoints.

`load` reads a checkpoint, `save` writes one. Everything here is read when it is used: `import minilora` reads none of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bert import Bert, BertConfig, BertLayer
    from .causal import CausalLM
    from .checkpoints.reading import Origin, load
    from .checkpoints.writing import save
    from .distilbert import DistilBert, DistilBertConfig, DistilBertLayer
    from .gpt2 import GPT2, GPT2Block, GPT2Body, GPT2Config
    from .group import Group
    from .heads.bert import BertClassifier, BertMaskedLM, BertTokenClassifier
    from .heads.distilbert import DistilBertClassifier, DistilBertMaskedLM, DistilBertTokenClassifier
    from .heads.gpt2 import GPT2Classifier, GPT2TokenClassifier
    from .heads.labels import Labels
    from .heads.roberta import RobertaClassifier, RobertaMaskedLM, RobertaTokenClassifier
    from .llama import Llama, LlamaConfig, LlamaLayer
    from .roberta import Roberta, RobertaConfig, XLMRobertaConfig

# Where what is public lives.
HOMES = {
    "bert": ("Bert", "BertConfig", "BertLayer",),
    "causal": ("CausalLM",),
    "checkpoints.reading": ("Origin", "load"),
    "checkpoints.writing": ("save",),
    "distilbert": ("DistilBert", "DistilBertConfig", "DistilBertLayer",),
    "gpt2": ("GPT2", "GPT2Block", "GPT2Body", "GPT2Config",),
    "group": ("Group",),
    "heads.bert": ("BertClassifier", "BertMaskedLM", "BertTokenClassifier",),
    "heads.distilbert": ("DistilBertClassifier", "DistilBertMaskedLM", "DistilBertTokenClassifier",),
    "heads.gpt2": ("GPT2Classifier", "GPT2TokenClassifier",),
    "heads.labels": ("Labels",),
    "heads.roberta": ("RobertaClassifier", "RobertaMaskedLM", "RobertaTokenClassifier",),
    "llama": ("Llama", "LlamaConfig", "LlamaLayer",),
    "roberta": ("Origin", "Roberta", "RobertaConfig", "XLMRobertaConfig",),
}

__all__ = [
    "Bert", "BertClassifier", "BertConfig", "BertLayer", "BertMaskedLM", "BertTokenClassifier", "CausalLM", "DistilBert",
    "DistilBertClassifier", "DistilBertConfig", "DistilBertLayer", "DistilBertMaskedLM", "DistilBertTokenClassifier",
    "GPT2", "GPT2Block", "GPT2Body", "GPT2Classifier", "GPT2Config", "GPT2TokenClassifier", "Group", "Labels", "Llama",
    "LlamaConfig", "LlamaLayer", "Origin", "Roberta", "RobertaClassifier", "RobertaConfig", "RobertaMaskedLM",
    "RobertaTokenClassifier", "XLMRobertaConfig", "load", "save",
]


def __getattr__(name: str) -> Any:
    home = next((home for home, names in HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{home}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
