"""The table of dialects: a name, and the class that reads and writes it. Each is loaded when it is used."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, cast

from ...errors import ConfigError
from .dialect import Dialect

__all__ = ["DIALECTS", "check_options", "dialect_named"]

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


def check_options(dialect: str, call: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for options that this call of a dialect, `read` or `write`, does not have."""
    known = [p.name for p in inspect.signature(call).parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise ConfigError(f"the dialect {dialect!r} has no option {', '.join(map(repr, unknown))} to {call.__name__}: it takes "
                          f"{', '.join(known) or 'none'}")
