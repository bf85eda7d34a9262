"""Calculus on raw arrays: forward and hand-written backward side by side, one class an operation.

Each operation is a class in CamelCase and a function in snake_case that applies it to tensors.
"""

# First: `tensor` needs the names while this file is loaded, if it is what is loaded first.
__all__ = [
    "GELU", "MSE", "Abs", "Add", "Attention", "AvgPool", "Cast", "Clip", "Concatenate", "Conv", "CrossEntropy",
    "DisentangledAttention", "Displace", "Div", "Dropout", "Embedding", "ExactGELU", "Exp", "Fastfood", "GetItem",
    "GroupNorm", "LayerNorm", "Linear", "LinearCrossEntropy", "Log", "LogSoftmax", "MatMul", "Max", "MaxPool", "Maximum",
    "Mean", "Min", "Minimum", "Mul", "Neg", "PackedAttention", "PackedPrefixAttention", "Pow", "PrefixAttention", "RMSNorm",
    "ReLU", "Recompute", "Reshape", "Rotary", "SiLU", "Sigmoid", "Softmax", "Sqrt", "Stack", "Sub", "Sum", "Tanh",
    "Transpose", "Upsample", "Where", "WithWeights", "abs", "add", "argmax", "attention", "avg_pool2d", "cast",
    "check_rotary_scaling", "clip", "concatenate", "conv1d", "conv2d", "cross_entropy", "disentangled_attention", "displace",
    "distance_buckets", "div", "dropout", "embedding", "exp", "fastfood", "gelu", "getitem", "group_norm", "layer_norm",
    "linear", "linear_cross_entropy", "log", "log_softmax", "matmul", "max", "max_pool2d", "maximum", "mean", "min",
    "minimum", "mse", "mul", "neg", "packed_attention", "packed_prefix_attention", "pow", "prefix_attention", "recompute",
    "relu", "reshape", "rms_norm", "rotary", "rotary_frequencies", "rotary_tables", "scaled_rotary_frequencies", "sigmoid",
    "silu", "softmax", "split", "sqrt", "stack", "sub", "sum", "tanh", "transpose", "upsample", "where", "with_weights",
]

from typing import TYPE_CHECKING

from ..later import later
from .activation import GELU, ExactGELU, ReLU, Sigmoid, SiLU, Tanh, gelu, relu, sigmoid, silu, tanh
from .attention import Attention, attention
from .cast import Cast, cast
from .choose import Abs, Clip, Maximum, Minimum, Where, abs, clip, maximum, minimum, where
from .conv import Conv, conv1d, conv2d
from .cross_entropy import CrossEntropy, LinearCrossEntropy, cross_entropy, linear_cross_entropy
from .disentangled import DisentangledAttention, disentangled_attention, distance_buckets
from .displace import Displace, displace
from .dropout import Dropout, dropout
from .elementwise import Add, Div, Exp, Log, Mul, Neg, Pow, Sqrt, Sub, add, div, exp, log, mul, neg, pow, sqrt, sub
from .embedding import Embedding, embedding
from .fastfood import Fastfood, fastfood
from .linear import Linear, MatMul, linear, matmul
from .loss import MSE, mse
from .norm import GroupNorm, LayerNorm, RMSNorm, group_norm, layer_norm, rms_norm
from .packed_attention import PackedAttention, packed_attention
from .pool import AvgPool, MaxPool, Upsample, avg_pool2d, max_pool2d, upsample
from .prefix_attention import PackedPrefixAttention, PrefixAttention, packed_prefix_attention, prefix_attention
from .recompute import Recompute, recompute
from .reduce import Max, Mean, Min, Sum, argmax, max, mean, min, sum
from .rotary import Rotary, rotary, rotary_frequencies, rotary_tables
from .rotary_scaling import check_rotary_scaling, scaled_rotary_frequencies
from .shape import Concatenate, GetItem, Reshape, Stack, Transpose, concatenate, getitem, reshape, split, stack, transpose
from .softmax import LogSoftmax, Softmax, log_softmax, softmax
from .weights import WithWeights, with_weights

APART = ["abs", "add", "cast", "disentangled_attention", "displace", "div", "fastfood", "getitem", "linear_cross_entropy",
         "mul", "neg", "packed_attention", "packed_prefix_attention", "pow", "prefix_attention", "recompute", "rotary", "sub",
         "with_weights"]

if not TYPE_CHECKING:  # a name that is not here is an error to type checkers too
    # Apart: operations themselves, what a tensor spells with a symbol, and what models alone call: these are called most.
    __getattr__, __dir__ = later(globals(), {}, [name for name in __all__ if not name.islower()] + APART)
