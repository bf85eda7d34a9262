"""The table of dialects: a name, and the class that reads and writes it. Each is loaded when it is used."""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

from ...errors import ConfigError
from .dialect import Dialect

__all__ = ["DIALECTS", "dialect_named"]

# What `dialect=` may say: the module below this room, and its class.
DIALECTS = {
    "peft": ("peft.folder", "Peft"),
    "loralib": ("loralib", "Loralib"),
    "mlx": ("mlx", "Mlx"),
    "kohya": ("kohya.file", "Kohya"),
    "diffusers": ("diffusers", "Diffusers"),
    "gguf": ("gguf.file", "Gguf"),
}


def dialect_named(name: str) -> Dialect:
    """The dialect of this name.

    Raises
    ------
    ConfigError
        If there is none.
    """
    if not isinstance(name, str) or name not in DIALECTS:
        raise ConfigError(f"dialect: expected one of {', '.join(map(repr, DIALECTS))}, got {name!r}")
    module, cls = DIALECTS[name]
    made: Any = getattr(import_module(f".{module}", __package__), cls)()
    return cast(Dialect, made)
