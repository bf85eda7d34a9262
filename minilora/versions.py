"""Device-specific versions of reference operations and functions: how `kernels` offers them, how a device finds them.

Whether they are used at all is one switch for the whole process: `minilora.use` turns it, `MINILORA_KERNELS` sets where it
starts. Off, each reference answers for itself, and no file of `kernels` is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from .choice import Choice

__all__ = ["KERNELS", "Versions", "kernels", "override"]

F = TypeVar("F")

# What devices have found is theirs to forget after a change (`Device.renew`).
KERNELS = Choice("MINILORA_KERNELS", lambda: True, "Type export MINILORA_KERNELS=off to run the reference operations alone, "
                 "unset MINILORA_KERNELS for the usual ones")
_registry: dict[str, dict[Any, Any]] = {}


def kernels() -> bool:
    """Whether the versions of `minilora/kernels` run: as `use` chose, else as MINILORA_KERNELS says, else yes.

    Raises
    ------
    ConfigError
        If nobody has chosen, and MINILORA_KERNELS is none of on, off, 1, 0.

    Examples
    --------
    >>> import minilora
    >>> with minilora.use("cpu", kernels=False):
    ...     minilora.backend.kernels()
    False
    """
    return KERNELS.on()


def override(reference: Any, device: str) -> Callable[[F], F]:
    """Register the decorated class or function as the version of `reference` for one device.

    The version takes the same arguments and keeps the same promises; one test compares every pair.
    """
    def register(version: F) -> F:
        if isinstance(version, type):
            setattr(version, "reference", reference)  # it goes by that name in a ledger
            setattr(version, "kernel", version.__name__)
        _registry.setdefault(device, {})[reference] = version
        return version
    return register


def load(device: str) -> dict[Any, Any]:
    # Speed only: without the folder kernels/ every reference still runs.
    name = f"{__package__}.kernels.{device}"
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, f"{__package__}.kernels"):
            raise
    return _registry.setdefault(device, {})


class Versions(dict[Any, Any]):
    """reference -> the version for one device; filled when first asked, since `kernels` is imported only then.

    A later look is a look into a dict: with kernels switched off it finds the reference there, at the same price.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __missing__(self, reference: Any) -> Any:
        found = load(self.device) if kernels() else {}
        self[reference] = version = found.get(reference, reference)
        return version
