"""Files in and out: tensors of checkpoints, and adapters in the dialects of other programs. Files are untrusted input.

    tensors    names, shapes and numbers: safetensors, mapped and not copied; written in one piece or not at all
    adapters   an adapter file as a value, without a model: PEFT's folders, and the other dialects
    placing    that value and a model: which module is meant, load and save

Nothing here is imported by `import minilora`; each room is read when it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .tensors.reading import load_state, open_state
    from .tensors.writing import save_state

__all__ = ["load_state", "open_state", "save_state"]

_LATER = {name: place for place, names in {
    "tensors.reading": "load_state open_state",
    "tensors.writing": "save_state",
}.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_LATER[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
