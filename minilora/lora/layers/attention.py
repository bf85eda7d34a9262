"""Attention whose keys and values have updates behind them, as one article describes it; see `projected` for the form."""

from __future__ import annotations

from typing import Any

import numpy

from ... import nn
from ...errors import DTypeError
from ...tensor import Parameter
from .kinds import adapt

__all__ = ["ProjectedAttention"]


class ProjectedAttention(nn.SimpleAttention):
    """Single-head attention with updates on its projected keys and values: K <- K + s B_k(A_k K), V likewise.

    Parameters
    ----------
    embed_size : int
    r : int
    lora_alpha, lora_dropout : float
    dtype : dtype
    rng : numpy.random.Generator or int, optional

    Attributes
    ----------
    keys, values : Projected
    queries, fc_out : nn.Linear, frozen

    Raises
    ------
    ConfigError
        For a setting outside its range.

    Notes
    -----
    Everything but A and B is frozen. For attention that is trained already use `ProjectedAttention.of`; for the usual
    placement, adapters on the inputs, ``lora.inject(model, lora.Config(target_modules=["keys", "values"]))``. How the two
    differ is told in `projected`.

    Examples
    --------
    >>> import numpy, minilora
    >>> base = minilora.nn.SimpleAttention(6, rng=0)
    >>> layer = minilora.lora.ProjectedAttention.of(base, r=2, rng=1)
    >>> x = minilora.tensor(numpy.ones((2, 5, 6), "float32"))
    >>> bool((layer(x, x, x).data == base(x, x, x).data).all())  # B = 0: the same output
    True
    """

    def __init__(self, embed_size: int, r: int = 8, lora_alpha: float = 16, lora_dropout: float = 0.0, *,
                 dtype: Any = "float32", rng: numpy.random.Generator | int | None = None) -> None:
        rng = numpy.random.default_rng(rng)
        super().__init__(embed_size, dtype=dtype, rng=rng)
        self._adapt(self, r, lora_alpha, lora_dropout, rng)

    @classmethod
    def of(cls, base: nn.SimpleAttention, r: int = 8, lora_alpha: float = 16, lora_dropout: float = 0.0, *,
           rng: numpy.random.Generator | int | None = None) -> ProjectedAttention:
        """The same on attention that exists: its arrays are shared, not copied, and `base` is left as it is."""
        if type(base) is not nn.SimpleAttention:
            raise DTypeError(f"ProjectedAttention.of: expected an nn.SimpleAttention, got {type(base).__name__}")
        layer = cls.__new__(cls)
        layer._adapt(base, r, lora_alpha, lora_dropout, rng)
        return layer

    def _adapt(self, base: nn.SimpleAttention, r: int, lora_alpha: float, lora_dropout: float, rng: Any) -> None:
        rng = numpy.random.default_rng(rng)
        layers = {name: getattr(base, name) for name in ("values", "keys", "queries", "fc_out")}
        for name, linear in layers.items():
            if name in ("values", "keys"):
                setattr(self, name, adapt(linear, r, lora_alpha, lora_dropout, on_output=True, rng=rng))
            else:
                setattr(self, name, _frozen(linear))


def _frozen(linear: nn.Linear) -> nn.Linear:
    """A linear layer on the same arrays, with frozen Parameters of its own."""
    layer = nn.Linear.__new__(nn.Linear)
    vars(layer).update(vars(linear))
    for name, p in linear.own_parameters():
        setattr(layer, name, Parameter(p.data, trainable=False))
    return layer
