"""Device-specific versions of reference operations and functions: how `kernels` offers them, how a device finds them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Versions", "override"]

F = TypeVar("F")

_registry: dict[str, dict[Any, Any]] = {}


def override(reference: Any, device: str) -> Callable[[F], F]:
    """Register the decorated class or function as the version of `reference` for one device.

    The version takes the same arguments and keeps the same promises; one test compares every pair.
    """
    def register(version: F) -> F:
        if isinstance(version, type):
            setattr(version, "reference", reference)  # it goes by that name in a ledger
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
    """reference -> the version for one device; filled when first asked, since `kernels` is imported only then."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __missing__(self, reference: Any) -> Any:
        self[reference] = version = load(self.device).get(reference, reference)
        return version
