"""Dropout whose mask is recomputed, not stored.

>>> import minilora
>>> from minilora import ops
>>> y = ops.dropout(minilora.tensor([1.0] * 1000), 0.5, seed=0)
>>> sorted(set(y.numpy().tolist())), abs(y.mean().item() - 1.0) < 0.2
([0.0, 2.0], True)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..engine import Op, apply, floating
from ..errors import ConfigError
from ..settings import number
from .philox import random_bits

if TYPE_CHECKING:
    from ..tensor import Tensor
    from ..typing import TensorLike

Array = Any


class Dropout(Op):
    """y = x m / (1 - p), where each m is 0 with probability p, else 1, so that E[y] = x. dx = dy m / (1 - p).

    The mask is a pure function of (seed, step, position): backward draws it again and nothing is kept. The same bits come
    out on the CPU and on the GPU.
    """

    p: float
    seed: int
    step: int

    def _mask(self, like: Array) -> Array:
        threshold = math.ceil(self.p * 2 ** 24)  # compared as integers: no rounding that could differ between devices
        bits = random_bits(self.xp, like.size, self.seed, self.step)
        return (((bits >> 8) >= threshold).reshape(like.shape)).astype(like.dtype) * (1.0 / (1.0 - self.p))

    def forward(self, x: Array) -> Array:
        return x * self._mask(x)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        return (dy * self._mask(dy),)


def dropout(x: TensorLike, p: float, seed: int, step: int = 0) -> Tensor:
    """Set each element to 0 with probability p and divide the others by 1 - p; see `Dropout`.

    Parameters
    ----------
    x : Tensor
    p : float
        In [0, 1).
    seed, step : int
        In [0, 2^64). Equal pairs give equal masks; take another `step` for every forward pass.

    Raises
    ------
    ConfigError
        If p is outside [0, 1), or seed or step is not an int in [0, 2^64).
    """
    check_dropout(p)
    for name, value in (("seed", seed), ("step", step)):
        if name == "step" and getattr(value, "dtype", None) == "uint64" and getattr(value, "shape", None) == ():
            continue  # on the device, from a recorded step
        if not (isinstance(value, int) and 0 <= value < 2 ** 64):
            raise ConfigError(f"dropout: {name} must be an int in [0, 2^64), got {value!r}")
    return apply(Dropout, floating(x), p=float(p), seed=seed, step=step)


def check_dropout(p: float) -> None:
    """Raise `ConfigError` unless p is a probability below 1."""
    number("dropout", p, 0.0, 1.0, why=": 1 would drop everything")
