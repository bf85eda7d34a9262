"""A vector of weights: where they start, and by how much each part of them is moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..engine import Op, apply, shape_of
from ..errors import ShapeError

if TYPE_CHECKING:
    from ..tensor import Tensor
    from ..typing import TensorLike

__all__ = ["Displace", "displace"]

Array = Any


class Displace(Op):
    """θ = (θ0_1 + λ_1 z_1 ... θ0_m + λ_m z_m), parts of one vector (D,); without λ each is 1.

        dz_i = λ_i dθ_i        dλ_i = <z_i, dθ_i>        dθ0_i = dθ_i

    z (D,) and λ (m,) have one dtype, that of θ; θ0_i may have any shape with as many numbers as its part, and another dtype:
    it is widened on the way. Keeps λ for dz, and z for dλ.
    Source: Aghajanyan et al. 2020, arXiv 2012.13255, section 3: DID without λ, structure-aware (SAID) with it.
    """

    composed = True  # the dtypes of θ0
    scaled: bool

    def forward(self, z: Array, *rest: Array) -> Array:
        scales, start = (rest[0], rest[1:]) if self.scaled else (None, rest)
        self.shapes = [(array.shape, array.dtype) for array in start]
        theta = self.xp.empty(z.shape, dtype=self.xp.result_type(z, *rest[:self.scaled]))
        at = 0
        for i, array in enumerate(start):
            part = slice(at, at := at + array.size)
            theta[part] = z[part] if scales is None else z[part] * scales[i]
            theta[part] += array.reshape(-1)
        self.save(*((scales if self.needs[0] else None, z if self.needs[1] else None) if self.scaled else ()))
        return theta

    def backward(self, dtheta: Array) -> list[Array | None]:
        scales, z = self.saved if self.scaled else (None, None)
        dz = self.xp.empty(dtheta.shape, dtype=dtheta.dtype) if scales is not None else dtheta
        dscales: list[Array] = []
        dstart: list[Array | None] = []
        at = 0
        for i, (shape, dtype) in enumerate(self.shapes):
            part = slice(at, at := at + math.prod(shape))
            if scales is not None:
                dz[part] = dtheta[part] * scales[i]
            if z is not None:
                dscales.append(self.xp.dot(z[part], dtheta[part]))
            dstart.append(dtheta[part].reshape(shape).astype(dtype, copy=False) if self.needs[1 + self.scaled + i] else None)
        own: Array | None = self.xp.stack([self.xp.asarray(d) for d in dscales]) if dscales else None
        return [dz if self.needs[0] else None, *([own] if self.scaled else []), *dstart]


def displace(z: TensorLike, scales: TensorLike | None, start: Sequence[TensorLike]) -> Tensor:
    """Weights as one vector, each part moved by its part of z; see `Displace`.

    Parameters
    ----------
    z : Tensor or array, shape (D,)
    scales : Tensor or array, shape (m,), or None
        A factor for each part of z.
    start : sequence of m tensors or arrays
        Of D numbers together.

    Returns
    -------
    Tensor, shape (D,)

    Raises
    ------
    ShapeError
        If these do not go together.

    Examples
    --------
    >>> import numpy
    >>> displace(numpy.array([1.0, 2.0, 3.0]), numpy.array([1.0, 0.5]), [numpy.array([[10.0, 20.0]]), numpy.array(30.0)])
    Tensor([11.  22.  31.5], dtype=float64)
    """
    shapes = [shape_of(array) for array in start]
    total, given = (sum(map(math.prod, shapes)),), None if scales is None else shape_of(scales)
    if shape_of(z) != total or given not in (None, (len(shapes),)) or not shapes:
        raise ShapeError(f"displace: expected z {total} and scales ({len(shapes)},) or None, for parts of shapes {shapes}, got "
                         f"z {shape_of(z)} and scales {given}")
    return apply(Displace, z, *(() if scales is None else (scales,)), *start, scaled=scales is not None)
