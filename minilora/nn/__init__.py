"""Modules: they own parameters and call ops, and contain no arithmetic."""

from .attention import MultiheadAttention, RotaryEmbedding, SimpleAttention
from .conv import Conv1d, Conv2d
from .embedding import Embedding
from .layers import GELU, CrossEntropyLoss, Dropout, LogSoftmax, MSELoss, ReLU, Sequential, Sigmoid, SiLU, Softmax, Tanh
from .linear import Linear
from .module import Module
from .norm import GroupNorm, LayerNorm, RMSNorm
from .pool import AvgPool2d, Flatten, MaxPool2d, Upsample
from .summary import Summary, summary

__all__ = [
    "GELU", "AvgPool2d", "Conv1d", "Conv2d", "CrossEntropyLoss", "Dropout", "Embedding",
    "Flatten", "GroupNorm", "LayerNorm", "Linear", "LogSoftmax", "MSELoss",
    "MaxPool2d", "Module", "MultiheadAttention", "RMSNorm", "ReLU", "RotaryEmbedding", "Sequential", "SiLU", "Sigmoid",
    "SimpleAttention", "Softmax", "Summary", "Tanh", "Upsample", "summary",
]
