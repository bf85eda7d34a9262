"""Modules: they own parameters and call ops, and contain no arithmetic."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..calls import answered_class, answered_names
from ..unsupported import no_such_name
from .attention import MultiheadAttention, SimpleAttention
from .checkpointing import grad_checkpoint
from .conv import Conv1d, Conv2d
from .embedding import Embedding
from .layers import GELU, CrossEntropyLoss, Dropout, LogSoftmax, MSELoss, ReLU, Sequential, Sigmoid, SiLU, Softmax, Tanh
from .initial import undrawn
from .linear import Linear
from .module import Module
from .norm import GroupNorm, LayerNorm, RMSNorm
from .pool import AvgPool2d, Flatten, MaxPool2d, Upsample
from .rotary import RotaryEmbedding
from .summary import Summary, summary

if TYPE_CHECKING:
    from ..models import GPT2, Bert, BertConfig, GPT2Config, Llama, LlamaConfig

__all__ = [
    "GELU", "GPT2", "AvgPool2d", "Bert", "BertConfig", "Conv1d", "Conv2d", "CrossEntropyLoss", "Dropout", "Embedding",
    "Flatten", "GPT2Config", "GroupNorm", "LayerNorm", "Linear", "Llama", "LlamaConfig", "LogSoftmax", "MSELoss",
    "MaxPool2d", "Module", "MultiheadAttention", "RMSNorm", "ReLU", "RotaryEmbedding", "Sequential", "SiLU", "Sigmoid",
    "SimpleAttention", "Softmax", "Summary", "Tanh", "Upsample", "grad_checkpoint", "summary", "undrawn",
]

METHODS = ("train", "eval", "requires_grad", "to", "parameters", "named_parameters", "state_dict", "load_state_dict")

answered_names(globals(), [name for name in __all__ if name in globals()])
answered_class(Module, METHODS)


def __getattr__(name: str) -> Any:
    if name not in ("GPT2", "Bert", "BertConfig", "GPT2Config", "Llama", "LlamaConfig"):
        raise no_such_name(__name__, name)
    value = globals()[name] = getattr(import_module("..models", __name__), name)  # they live there; loaded when first used
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
