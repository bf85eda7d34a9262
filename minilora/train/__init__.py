"""The training loop, and what stands beside it, each a small object that a run may do without.

    loop           `fit`: the loop itself
    settings       what a run is: numbers only, so that they can be written down and compared
    batch          what the loop asks of data
    data           files of texts, and arrays, as such data
    checkpoints    the whole state of a run, on the disk and back to the bit
    distributed    the same run in several processes
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import Batch, Data
    from .loop import fit
    from .result import Result
    from .settings import Settings

__all__ = ["Batch", "Data", "Result", "Settings", "fit"]

_LATER = {"Batch": "batch", "Data": "batch", "Result": "result", "Settings": "settings", "fit": "loop"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_LATER[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
