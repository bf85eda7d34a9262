"""Transformers, whole: GPT-2, BERT and Llama, with the module names of their checkpoints."""

from .bert import Bert, BertConfig, BertLayer
from .causal import CausalLM
from .gpt2 import GPT2, GPT2Block, GPT2Config
from .group import Group
from .llama import Llama, LlamaBody, LlamaLayer
from .llama_configs import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

__all__ = [
    "Bert", "BertConfig", "BertLayer", "CausalLM", "GPT2", "GPT2Block", "GPT2Config", "Group", "Llama", "LlamaBody",
    "LlamaConfig", "LlamaLayer", "MistralConfig", "Qwen2Config", "Qwen3Config",
]
