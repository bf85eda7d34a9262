"""The functions between the two layers of an MLP, by the names that config.json has for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import ops
from ..errors import ConfigError
from ..tensor import Tensor

__all__ = ["activate", "check_activation"]


def _exact_gelu(x: Any) -> Tensor:
    return ops.gelu(x, "none")


ACTIVATIONS: dict[str, Callable[[Any], Tensor]] = {
    "gelu": _exact_gelu, "gelu_new": ops.gelu, "gelu_pytorch_tanh": ops.gelu, "relu": ops.relu, "silu": ops.silu,
    "swish": ops.silu, "tanh": ops.tanh,
}


def activate(name: str, x: Any) -> Tensor:
    """The function of that name, of every element of x."""
    return ACTIVATIONS[name](x)


def check_activation(config: Any, field: str) -> None:
    """Raise `ConfigError` unless a field of a config names an activation that is here."""
    value = getattr(config, field)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ConfigError(f"{type(config).__name__}: {field} must be one of {', '.join(sorted(ACTIVATIONS))}, got {value!r}")
