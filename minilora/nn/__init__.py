"""Modules: they own parameters and call ops, and contain no arithmetic."""

from .layers import GELU, Dropout, LogSoftmax, MSELoss, ReLU, Sequential, Sigmoid, SiLU, Softmax, Tanh
from .linear import Linear
from .module import Module
from .summary import Summary, summary

__all__ = [
    "GELU", "Dropout", "Linear", "LogSoftmax", "MSELoss", "Module", "ReLU", "Sequential", "SiLU", "Sigmoid", "Softmax",
    "Summary", "Tanh", "summary",
]
