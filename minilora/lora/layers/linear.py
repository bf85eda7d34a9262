"""Linear with a low-rank update.

Each layer says what multiplying by A and B means for it, and how its weight looks as a matrix. Everything else is in `base`.
"""

from __future__ import annotations

from typing import Any

import numpy

from ... import nn, ops
from ...tensor import Parameter, Tensor
from .. import gradient
from .base import AdaptedLayer
from .start import new_adapter

__all__ = ["Linear"]


class Linear(AdaptedLayer, nn.Linear):
    """y = x W^T + b + s (x A^T) B^T, with W and b frozen and s = lora_alpha / r.

    Parameters
    ----------
    in_features, out_features : int
    r : int
        Rank of the update.
    lora_alpha : float
    lora_dropout : float
        Probability in [0, 1) with which an element of the adapter's input is dropped in training; the frozen path sees the
        whole input.
    bias : bool
    fan_in_fan_out : bool
        Whether the weight is stored as (in, out), as GPT-2's published matrices are. A and B are the same in both cases.
    dtype : dtype
    rng : numpy.random.Generator or int, optional
        Draws W, b, A and the dropout's seed, on the host.
    **options
        `init_lora_weights`, `use_rslora`, `use_dora`, `lora_bias` and `exact` as in `adapt`.

    Attributes
    ----------
    weight : Parameter, shape (out, in), frozen
    bias : Parameter, shape (out,), frozen, or None
    lora_A : Parameter, shape (r, in)
    lora_B : Parameter, shape (out, r)
    scaling : float
    merged : bool

    Raises
    ------
    ConfigError
        For a setting outside its range.

    Notes
    -----
    Names as in loralib. To adapt a layer that is trained already, use `adapt`; for the layers of a model, `inject`.
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.

    Examples
    --------
    >>> import numpy, minilora
    >>> layer = minilora.lora.Linear(4, 3, r=2, lora_alpha=4, rng=numpy.random.default_rng(0))
    >>> layer
    Linear(in_features=4, out_features=3, bias=True, r=2, lora_alpha=4, scaling=2)
    >>> [name for name, p in layer.named_parameters() if p.trainable]
    ['adapters.default.lora_A', 'adapters.default.lora_B']
    """

    adapts = nn.Linear
    begins_quantised = True

    OWN = AdaptedLayer.OWN | {"fan_in_fan_out"}
    fan_in_fan_out = False

    def __init__(self, in_features: int, out_features: int, r: int = 8, lora_alpha: float = 8, lora_dropout: float = 0.0,
                 bias: bool = True, *, fan_in_fan_out: bool = False, dtype: Any = "float32",
                 rng: numpy.random.Generator | int | None = None, **options: Any) -> None:
        rng = numpy.random.default_rng(rng)
        self.adopt(nn.Linear(in_features, out_features, bias, dtype=dtype, rng=rng).requires_grad(False))
        if fan_in_fan_out:
            self.fan_in_fan_out, self.weight.data = True, self.weight.data.T.copy()
        self.begin(new_adapter(self, r, lora_alpha, lora_dropout, rng=rng, **options))

    def plain(self) -> nn.Module:
        layer: Any = super().plain()
        if self.fan_in_fan_out:
            layer.weight = Parameter(self.weight.data.T, self.weight.trainable)
        return layer  # type: ignore[no-any-return]

    @property
    def W(self) -> Tensor:
        """The weight as (out, in), however it is stored: a view."""
        return self.weight.T if self.fan_in_fan_out else self.weight

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, self.in_features), (self.out_features, r)

    def frozen(self, x: Any, bias: bool = True) -> Tensor:
        return ops.linear(x, self.W, self.bias if bias else None)

    def fused(self, x: Any, A: Any, B: Any, s: float, bias: bool = True) -> Tensor:
        return gradient.lora_linear(x, self.W, self.bias if bias else None, A, B, s)

    def low_rank(self, x: Any, A: Any, B: Any, s: float) -> Tensor:
        return gradient.lora_update(x, A, B, s)

    def as_matrices(self, W: Any, A: Any, B: Any) -> tuple[Any, Any, Any, int]:
        return W.T if self.fan_in_fan_out else W, A, B, 1

    def stored(self, A: Any, B: Any) -> tuple[Any, Any]:
        return (B.T, A.T) if self.fan_in_fan_out else (A, B)  # (s B A)^T = s A^T B^T

    @property
    def rows_are_outputs(self) -> bool:  # type: ignore[override]
        return not self.fan_in_fan_out
