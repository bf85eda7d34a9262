"""Calculus on raw arrays: forward and hand-written backward side by side, one class an operation.

Each operation is a class in CamelCase and a function in snake_case that applies it to tensors.
"""

from .activation import GELU, ReLU, Sigmoid, SiLU, Tanh, gelu, relu, sigmoid, silu, tanh
from .dropout import Dropout, dropout
from .elementwise import Add, Div, Exp, Log, Mul, Neg, Pow, Sqrt, Sub, add, div, exp, log, mul, neg, pow, sqrt, sub
from .linear import Linear, MatMul, linear, matmul
from .loss import MSE, mse
from .reduce import Mean, Sum, mean, sum
from .shape import Concatenate, GetItem, Reshape, Transpose, concatenate, getitem, reshape, transpose
from .softmax import LogSoftmax, Softmax, log_softmax, softmax

__all__ = [
    "GELU", "MSE", "Add", "Concatenate", "Div", "Dropout", "Exp", "GetItem", "Linear", "Log", "LogSoftmax", "MatMul",
    "Mean", "Mul", "Neg", "Pow", "ReLU", "Reshape", "SiLU", "Sigmoid", "Softmax", "Sqrt", "Sub", "Sum", "Tanh",
    "Transpose", "add", "concatenate", "div", "dropout", "exp", "gelu", "getitem", "linear", "log", "log_softmax",
    "matmul", "mean", "mse", "mul", "neg", "pow", "relu", "reshape", "sigmoid", "silu", "softmax", "sqrt", "sub", "sum",
    "tanh", "transpose",
]
