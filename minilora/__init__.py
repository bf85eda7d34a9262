"""minilora: LoRA you can read, prove and run, on NumPy or CuPy."""

from typing import TYPE_CHECKING, Any

from .tensor import Parameter, Tensor, tensor  # first: engine and ops need the two classes while they load
from . import backend, engine, errors, lora, nn, ops, optim
from . import typing  # noqa: F401  (not in __all__, where a star would put it before Python's own)
from .backend import current_device, synchronize, to_device, to_host, use
from .engine import backward, no_grad
from .graphs import record
from .nn import summary

if TYPE_CHECKING:
    from . import formats, models, parallel, testing, train

__version__ = "0.1.0"

__all__ = [
    "Parameter", "Tensor", "__version__", "backend", "backward", "current_device", "engine", "errors", "formats", "lora",
    "models", "nn", "no_grad", "ops", "optim", "parallel", "record", "summary", "synchronize", "tensor", "testing", "to_device",
    "to_host", "train", "use",
]


def __getattr__(name: str) -> Any:
    if name in ("formats", "models", "parallel", "testing", "train"):
        # Loaded when first used: half of the import time, not needed by most.
        import importlib

        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
