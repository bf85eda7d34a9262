"""Losses."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..engine import Op, apply, shape_of
from ..errors import ShapeError

if TYPE_CHECKING:
    from ..tensor import Tensor
    from ..typing import TensorLike

Array = Any


class MSE(Op):
    """L = (1/n) sum (p - t)^2 over all n elements.

    dL/dp = (2/n) (p - t) and dL/dt = -dL/dp, each times the scalar dy. Keeps d = p - t.
    """

    rounds = False

    def forward(self, prediction: Array, target: Array) -> Array:
        d = prediction - target
        self.save(d)
        flat = d.reshape(-1)
        return flat @ flat / d.size

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        (d,) = self.saved
        dp = d * (dy * (2.0 / d.size))
        return (dp if self.needs[0] else None, -dp if self.needs[1] else None)


def mse(prediction: TensorLike, target: TensorLike) -> Tensor:
    """Mean of the squared differences over all elements; see `MSE`.

    Raises
    ------
    ShapeError
        If the shapes differ (nothing is broadcast: (N,) against (N, 1) would compare every pair), or are empty.
    """
    p, t = shape_of(prediction), shape_of(target)
    if p != t:
        cure = f"target.reshape{p}" if math.prod(p) == math.prod(t) else "a prediction for every target"
        raise ShapeError(f"mse: expected two equal shapes, got prediction {p} and target {t}: they are not broadcast. "
                         f"Write {cure}")
    if 0 in p:
        raise ShapeError(f"mse: nothing to average in shape {p}: the mean of no elements is not a number. "
                         "Is the batch empty?")
    return apply(MSE, prediction, target)
