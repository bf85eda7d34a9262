"""minilora: LoRA you can read, prove and run, on NumPy or CuPy."""

from typing import TYPE_CHECKING, Any

from .tensor import Parameter, Tensor, tensor  # first: engine and ops need the two classes while they load
from . import backend, engine, errors, lora, nn, ops, optim
from . import typing  # noqa: F401  (not in __all__, where a star would put it before Python's own)
from .backend import current_device, synchronize, to_device, to_host, use
from .engine import backward, no_grad
from .nn import summary

if TYPE_CHECKING:
    from . import testing

__version__ = "0.1.0"

__all__ = [
    "Parameter", "Tensor", "__version__", "backend", "backward", "current_device", "engine", "errors", "lora", "nn",
    "no_grad", "ops", "optim", "summary", "synchronize", "tensor", "testing", "to_device", "to_host", "use",
]


def __getattr__(name: str) -> Any:
    if name == "testing":  # loaded when first used: a third of the import time, and training does not need it
        import importlib

        return importlib.import_module(".testing", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
