"""Names of a package that are loaded when they are first used."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any

from .calls import answered_names, answered_value

__all__ = ["later"]


def later(namespace: dict[str, Any], homes: Mapping[str, str],
          apart: Collection[str] = ()) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose names stand in modules that importing it does not load.

    Parameters
    ----------
    namespace : dict
        ``globals()`` of the package.
    homes : mapping of str to str
        The names, separated by spaces, by the module inside the package that has them. One with its own name is a room.
    apart : collection of str
        Public names that are left as they are: all others tell what is wrong with a call whose arguments do not fit, see
        `calls`.
    """
    package = namespace["__name__"]
    home_of = {name: home for home, names in homes.items() for name in names.split()}
    answered_names(namespace, [name for name in namespace["__all__"] if name in namespace and name not in apart])

    def get(name: str) -> Any:
        if name not in home_of:
            from .unsupported import no_such_name

            raise no_such_name(package, name)
        module = import_module(f".{home_of[name]}", package)
        value = namespace[name] = module if name == home_of[name] else answered_value(getattr(module, name))
        return value

    return get, lambda: sorted({*namespace, *namespace["__all__"]})
