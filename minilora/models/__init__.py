"""Transformers, whole: GPT-2, BERT and Llama, with the module names of their checkpoints."""

from .bert import Bert, BertConfig, BertLayer
from .cache import Cache
from .causal import CausalLM
from .generation import Generated, generate
from .gpt2 import GPT2, GPT2Block, GPT2Config
from .group import Group
from .llama import Llama, LlamaConfig, LlamaLayer

__all__ = [
    "Bert", "BertConfig", "BertLayer", "Cache", "CausalLM", "GPT2", "GPT2Block", "GPT2Config", "Generated", "Group", "Llama",
    "LlamaConfig", "LlamaLayer", "generate",
]
