"""minilora: LoRA you can read, prove and run, on NumPy or CuPy.

What is public is loaded when it is first used: ``minilora --help`` needs neither the engine nor NumPy.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .release import __version__

if TYPE_CHECKING:
    from . import (
        backend, drawing, engine, errors, formats, lora, models, nn, ops, optim, parallel, quant, testing, train, tuners,
    )
    from .backend import current_device, synchronize, to_device, to_host, use
    from .drawing import draw
    from .engine import backward, no_grad
    from .graphs import record
    from .nn.summary import summary
    from .tensor import Parameter, Tensor, tensor

__all__ = [
    "Parameter", "Tensor", "__version__", "backend", "backward", "current_device", "draw", "drawing", "engine", "errors",
    "formats", "lora", "models", "nn", "no_grad", "ops", "optim", "parallel", "quant", "record", "summary", "synchronize",
    "tensor", "testing", "to_device", "to_host", "train", "tuners", "use",
]

_HOMES = {name: home for home, names in {
    "tensor": "Parameter Tensor",
    "backend": "current_device synchronize to_device to_host use",
    "drawing": "draw",
    "engine": "backward no_grad",
    "graphs": "record",
    "nn": "summary",
}.items() for name in names.split()}
_ROOMS = ("backend", "drawing", "engine", "errors", "formats", "lora", "models", "nn", "ops", "optim", "parallel", "puzzles",
          "quant", "testing", "train", "tuners",
          "typing")  # not in __all__, where a star would put it before Python's own; nor is puzzles


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    if name not in _HOMES:
        from .unsupported import no_such_name

        raise no_such_name(__name__, name)
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Has ``minilora.tensor``, the function, although the import of the file of that name would put the file in its place."""

    @property
    def tensor(self) -> Any:
        from .tensor import tensor as function

        return function

    @tensor.setter
    def tensor(self, file: ModuleType) -> None:
        """What the import of the file sets."""


sys.modules[__name__].__class__ = _Package
