"""Updates behind a linear layer: y0 = x W^T + b, then y = y0 + s (y0 A^T) B^T. Attention with such keys and values.

**How this differs from the usual placement.** Usually A reads the layer's input, and y = x (W + s B A)^T: the update is *added*
to W, its rows are combinations of the rows of A, and they may be any directions of the input. Here A reads the output:

    y = y0 (I + s B A)^T = x ((I + s B A) W)^T + b (I + s B A)^T

so W is *multiplied* by a matrix that differs from I by one of rank r. Merged, that is W + s B (A W): again an update of rank r,
but its rows are combinations of rows of W. What W maps to 0, or nearly so, stays there: if W has lost a direction of the input,
this placement cannot bring it back, the usual one can. And A is (r, out), not (r, in). The article that describes this form
puts it on the projected keys and values of an attention layer.

**Gradients**, with z = y0 A^T, as in `gradient` but for W's place:

    u = dy B            (N, r)
    dB = s dy^T z       (out, r)
    dA = s u^T y0       (r, out)
    dy0 = dy + s u A    (N, out)
    dx = dy0 W          (N, in)

The layer composes this from plain linear operations.
"""

from __future__ import annotations

from typing import Any

import numpy

from .. import backend, nn, ops
from ..errors import ConfigError, DTypeError, StateError
from ..tensor import Parameter, Tensor
from .adapted import AdaptedLayer
from .adapter import Adapter
from .adapting import adapt

__all__ = ["Projected", "ProjectedAttention"]

Array = Any


class Projected(AdaptedLayer, nn.Linear):
    """A linear layer whose update reads its output; made by ``lora.adapt(layer, r, lora_alpha, on_output=True)``.

    Attributes
    ----------
    weight : Parameter, shape (out, in), frozen
    lora_A : Parameter, shape (r, out)
    lora_B : Parameter, shape (out, r)

    Examples
    --------
    >>> import minilora
    >>> layer = minilora.lora.adapt(minilora.nn.Linear(6, 4, rng=0), r=2, on_output=True, rng=1)
    >>> layer.lora_A.shape, layer.lora_B.shape
    ((2, 4), (4, 2))
    """

    takes_more = False
    only_factors = True

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, self.out_features), (self.out_features, r)

    def frozen(self, x: Any, bias: bool = True) -> Tensor:
        return ops.linear(x, self.weight, self.bias if bias else None)

    def down(self, x: Any, A: Any) -> Tensor:
        return ops.linear(x, A)

    def up(self, z: Any, B: Any) -> Tensor:
        return ops.linear(z, B)

    def forward(self, x: Any) -> Tensor:
        y0 = self.frozen(x)
        if self.merged:
            self.refuse_training()
            return y0
        return y0 if self.off else self.with_updates(y0, y0, self._update)

    def update(self, x: Any) -> Tensor:
        self._base()
        return super().update(self.frozen(x))

    def _base(self) -> Array:
        if self.merged:
            raise StateError("this layer is merged: its weight is W', and the update reads W x. Call unmerge() first")
        return self.weight.data

    def as_update(self, A: Array, B: Array) -> tuple[Array, Array]:
        return backend.device_of(A).xp.dot(A, self._base()), B

    def stored(self, A: Array, B: Array) -> tuple[Array, Array]:
        return numpy.dot(A, backend.to_host(self._base())), B

    def bias_update(self, adapter: Adapter) -> Array | None:
        if self.bias is None:
            return None
        dot = self.bias.device.xp.dot
        return dot(adapter.lora_B.data, dot(adapter.lora_A.data, self.bias.data))

    def from_update(self, A: Array, B: Array) -> tuple[Array, Array]:
        raise ConfigError("an update given as factors of D is added to the weight: put it on a plain linear layer, not on one "
                          "whose update reads its output")


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
    differ is told at the top of this file.

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
