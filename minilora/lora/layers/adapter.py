"""Adapter: what one name stands for in one layer: A and B, how they are scaled, and what may belong to them besides."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ... import nn, ops
from ...errors import ConfigError
from ...tensor import Parameter, Tensor
from .. import gradient
from .precision import trained_dtype

if TYPE_CHECKING:
    from ..config import Config
    from .loftq import Begun

__all__ = ["Adapter", "BASE", "check_name", "large_note"]

BASE = "__base__"  # in a batch with several adapters: the row gets none
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def check_name(name: Any) -> None:
    """Raise `ConfigError` unless this can name an adapter: it becomes a part of paths and of file names."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == BASE or not name.strip("."):
        raise ConfigError(f"an adapter's name consists of 1 to 64 of the characters A-Z a-z 0-9 . _ - and is not {BASE!r}, "
                          f"got {name!r}")


def large_note(path: str, r: int, numbers: int, size: int) -> list[str]:
    """A note, if an adapter has at least as many numbers in A and B as its weight has."""
    if numbers < size:
        return []
    return [f"large: {path} has {numbers:,} numbers in A and B and {size:,} in its weight: r={r} saves nothing there"]


class Adapter(nn.Module):
    """The trained part of one layer: D = s B A, and what its configuration adds to that. The layer computes with it.

    Parameters
    ----------
    lora_A, lora_B : Parameter
        Their shapes are the layer's affair; for a linear layer (r, in) and (out, r).
    r : int
    lora_alpha : float
    lora_dropout : nn.Dropout
        Applied to the adapter's input.
    use_rslora : bool
        s = lora_alpha / sqrt(r) in place of lora_alpha / r.

    Attributes
    ----------
    scaling : float
        s.
    lora_bias : Parameter, shape (out,), or None
        Added to B's output: the update is s (x A^T B^T + lora_bias).
    magnitude : Parameter, shape (out,), or None
        DoRA's lengths m.
    exact : bool
        Whether DoRA's gradient goes through the lengths of V too; see `gradients.dora`.
    start_A, start_B : Parameter, frozen, or None
        Where A started, and minus where B started, if that was not at B A = 0. The update is s (B A + start_B start_A), which
        is 0 at the start, so that the base needs no change: one update of rank 2 r, with [A; start_A] and [B, start_B].
    keeps_A : bool
        LoRA-FA: A is never trained.
    in_head : bool
        Of an embedding whose table makes the logits too: whether the update takes part in them. PEFT's does not.
    begun : loftq.Begun or None
        Until the adapter is attached: the base that it starts beside, which takes the place of the layer's weight then.
    config : Config or None
        What the adapter was made from.
    origin : mapping of str to str
        What the file that it came from says of it besides, and what is to stand in its next one.
    """

    def __init__(self, lora_A: Parameter, lora_B: Parameter, r: int, lora_alpha: float, lora_dropout: nn.Dropout,
                 use_rslora: bool = False) -> None:
        self.scaling = gradient.scaling(lora_alpha, r, use_rslora)
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.lora_A, self.lora_B, self.lora_dropout = lora_A, lora_B, lora_dropout
        self.lora_bias: Parameter | None = None
        self.magnitude: Parameter | None = None
        self.exact = False
        self.start_A: Parameter | None = None
        self.start_B: Parameter | None = None
        self.keeps_A = False
        self.in_head = True
        self.begun: Begun | None = None
        self.config: Config | None = None
        self.origin: Mapping[str, str] = {}

    @property
    def dtype(self) -> Any:
        """Of all its parameters: at least float32, see `precision`."""
        return self.lora_A.dtype

    def dtype_for(self, dtype: Any) -> Any:
        return trained_dtype(dtype)

    def set_trainable(self, mode: bool) -> None:
        """Let its parameters be trained or not. The start of A and B never is, nor A under LoRA-FA."""
        for name, p in self.own_parameters():
            p.trainable = mode and not name.startswith("start") and not (self.keeps_A and name == "lora_A")
            if not p.trainable:
                p.grad = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole update; where it has a start, [A; start_A] and [B, start_B], of rank 2 r."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return ops.concatenate([self.lora_A, self.start_A]), ops.concatenate([self.lora_B, self.start_B], axis=1)

    def extra_repr(self) -> str:
        text = f"r={self.r}, lora_alpha={self.lora_alpha:g}, scaling={self.scaling:g}"
        if self.lora_dropout.p:
            text += f", lora_dropout={self.lora_dropout.p:g}"
        for name in ("lora_bias", "magnitude", "start_A"):
            text += f", {name}" if getattr(self, name) is not None else ""
        return text

    def __repr__(self) -> str:
        return f"Adapter({self.extra_repr()})"
