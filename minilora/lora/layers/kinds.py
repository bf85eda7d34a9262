"""A LoRA layer of a layer that exists: `adapt`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Optional, Union, overload

import numpy

from ... import nn
from ...errors import ConfigError, DTypeError
from ...tensor import Parameter
from .base import AdaptedLayer
from .linear import Linear
from .start import new_adapter

if TYPE_CHECKING:
    from .convolution import Conv1d, Conv2d
    from .embedding import Embedding
    from .fused import MergedLinear
    from .projected import Projected

    Rng = Optional[Union[numpy.random.Generator, int]]  # not at run time: reading numpy.random costs 20 ms

__all__ = ["adapt", "adapted_layer"]


def adapted_layer(base: nn.Module) -> AdaptedLayer:
    """The LoRA layer for a layer, with its Parameters and no adapter yet.

    Raises
    ------
    DTypeError
        If it is no layer that can be adapted, or one that computes its output in a way of its own.
    """
    from .convolution import Conv1d, Conv2d  # here, because most programs adapt linear layers only
    from .embedding import Embedding

    kinds: tuple[type[AdaptedLayer], ...] = (Linear, Embedding, Conv1d, Conv2d)
    if isinstance(base, AdaptedLayer):
        raise DTypeError(f"adapt: this {type(base).__name__} has an update already. For another adapter beside it use "
                         "lora.inject(model, config, name=...)")
    for kind in kinds:
        if isinstance(base, kind.adapts):
            if type(base).forward is not kind.adapts.forward:
                raise DTypeError(f"adapt: {type(base).__name__} has a forward of its own, which an adapted one would not run: "
                                 f"only nn.{kind.adapts.__name__}'s can be taken over")
            layer = kind.__new__(kind)
            layer.adopt(base)
            return layer
    names = ", ".join(f"nn.{kind.adapts.__name__}" for kind in kinds)
    raise DTypeError(f"adapt: expected one of {names}, got {type(base).__name__}: only those can be adapted")


@overload
def adapt(base: nn.Linear, r: int = ..., lora_alpha: float = ..., lora_dropout: float = ..., *,
          enable_lora: Sequence[bool], rng: Rng = ..., **options: Any) -> MergedLinear: ...


@overload
def adapt(base: nn.Linear, r: int = ..., lora_alpha: float = ..., lora_dropout: float = ..., *,
          on_output: Literal[True], rng: Rng = ..., **options: Any) -> Projected: ...


@overload
def adapt(base: nn.Linear, r: int = ..., lora_alpha: float = ..., lora_dropout: float = ..., *,
          rng: Rng = ..., **options: Any) -> Linear: ...


@overload
def adapt(base: nn.Embedding, r: int = ..., lora_alpha: float = ..., lora_dropout: float = ..., *,
          rng: Rng = ..., **options: Any) -> Embedding: ...


@overload
def adapt(base: nn.Conv1d, r: int = ..., lora_alpha: float = ..., lora_dropout: float = ..., *,
          rng: Rng = ..., **options: Any) -> Conv1d: ...


@overload
def adapt(base: nn.Conv2d, r: int = ..., lora_alpha: float = ..., lora_dropout: float = ..., *,
          rng: Rng = ..., **options: Any) -> Conv2d: ...


@overload
def adapt(base: nn.Module, r: int = ..., lora_alpha: float = ..., lora_dropout: float = ..., *,
          enable_lora: Sequence[bool] | None = ..., on_output: bool = ..., rng: Rng = ..., **options: Any) -> AdaptedLayer: ...


def adapt(base: nn.Module, r: int = 8, lora_alpha: float = 8, lora_dropout: float = 0.0, *,
          enable_lora: Sequence[bool] | None = None, on_output: bool = False,
          rng: numpy.random.Generator | int | None = None, **options: Any) -> Any:
    """A layer with a low-rank update on one that exists already.

    Parameters
    ----------
    base : nn.Linear, nn.Embedding, nn.Conv1d or nn.Conv2d
        Its arrays are shared, not copied; the base layer itself is left as it is.
    r : int
    lora_alpha, lora_dropout : float
        As in `Linear`.
    enable_lora : sequence of bool, optional
        Of an nn.Linear that is a fused projection: the slots that get an update of their own; see `MergedLinear`.
    on_output : bool
        Of an nn.Linear: let the update read its output; see `projected`.
    rng : numpy.random.Generator or int, optional
        Draws A (of an embedding B) and the dropout's seed.
    **options
        init_lora_weights : True, "gaussian", "pissa", "olora" or "orthogonal"; how A and B start, see `start`.
        use_rslora : bool; s = lora_alpha / sqrt(r).
        use_dora : bool; train the length of each row of the weight apart from its direction, see `gradients.dora`.
        exact : bool; with use_dora, let the gradient go through the lengths too.
        lora_bias : bool; give the update a bias.

    Returns
    -------
    Linear, Embedding, Conv1d, Conv2d, MergedLinear or Projected of this package

    Raises
    ------
    ConfigError
        For a setting outside its range.
    DTypeError
        If `base` is none of these layers.

    Examples
    --------
    >>> import numpy, minilora
    >>> base = minilora.nn.Linear(4, 3, rng=numpy.random.default_rng(0))
    >>> adapted = minilora.lora.adapt(base, r=2, lora_alpha=4, rng=numpy.random.default_rng(1))
    >>> x = minilora.tensor(numpy.ones((5, 4), "float32"))
    >>> bool((adapted(x).data == base(x).data).all())  # B = 0: the same output
    True
    """
    layer: Any = adapted_layer(base)
    if enable_lora is not None or on_output:
        layer = _special(base, enable_lora, on_output)
    # Handles of our own on the base's arrays: freezing them, and merging, leave the base layer as it is.
    for name, p in base.own_parameters():
        setattr(layer, name, Parameter(p.data, trainable=False))
    layer.begin(new_adapter(layer, r, lora_alpha, lora_dropout, rng=rng, **options))
    return layer


def _special(base: nn.Module, enable_lora: Sequence[bool] | None, on_output: bool) -> Any:
    """A linear layer with its update in slots, or behind it."""
    if not isinstance(base, nn.Linear) or (on_output and enable_lora is not None):
        raise ConfigError(f"adapt: enable_lora and on_output are for an nn.Linear, and one of them at a time, got "
                          f"{type(base).__name__}")
    if on_output:
        from .projected import Projected

        layer: Any = Projected.__new__(Projected)
        layer.adopt(base)
        return layer
    from .fused import MergedLinear

    layer = MergedLinear.__new__(MergedLinear)
    layer.adopt(base)
    layer.enable(enable_lora)
    return layer
