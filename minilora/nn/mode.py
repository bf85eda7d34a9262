"""A model in training or evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .module import Module

__all__ = ["in_mode"]


@contextmanager
def in_mode(model: Module, training: bool) -> Iterator[None]:
    """Within this context all modules are in one mode; afterwards, also after an error, each is in its own again."""
    before = [(module, module.training) for _, module in model.named_modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode
