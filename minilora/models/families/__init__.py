"""Families of models: what each of them has in config.json and calls its weights. One file a family, and one line here."""

from .bert import BERT_FAMILY
from .contract import Family, Head
from .deberta import DEBERTA_FAMILY
from .distilbert import DISTILBERT_FAMILY
from .gpt2 import GPT2_FAMILY
from .llama import LLAMA_FAMILY, MISTRAL_FAMILY, QWEN2_FAMILY, QWEN3_FAMILY
from .roberta import ROBERTA_FAMILY, XLM_ROBERTA_FAMILY

__all__ = ["FAMILIES", "Family", "Head"]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (
    BERT_FAMILY,
    DEBERTA_FAMILY,
    DISTILBERT_FAMILY,
    GPT2_FAMILY,
    LLAMA_FAMILY,
    MISTRAL_FAMILY,
    QWEN2_FAMILY,
    QWEN3_FAMILY,
    ROBERTA_FAMILY,
    XLM_ROBERTA_FAMILY,
)}
