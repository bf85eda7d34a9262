"""Activations: one function applied to every element.

>>> import minilora
>>> from minilora import ops
>>> x = minilora.tensor([-1.0, 0.0, 1.0])
>>> ops.relu(x).numpy().tolist()
[0.0, 0.0, 1.0]
>>> [round(y, 3) for y in ops.sigmoid(x).numpy().tolist()]
[0.269, 0.5, 0.731]
>>> [round(y, 3) for y in ops.silu(x).numpy().tolist()]
[-0.269, 0.0, 0.731]
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..engine import Op, apply, floating
from ..errors import ConfigError
from .erf import normal

if TYPE_CHECKING:
    from ..tensor import Tensor
    from ..typing import TensorLike

Array = Any


class ReLU(Op):
    """y = max(x, 0). dx = dy where y > 0, else 0 (also at x = 0). Keeps y, which the next layer often keeps anyway."""

    moves = True

    def forward(self, x: Array) -> Array:
        y = self.xp.maximum(x, 0)
        self.save(y)
        return y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        (y,) = self.saved
        return (dy * (y > 0),)


class Tanh(Op):
    """y = tanh x. dx = dy (1 - y^2)."""

    def forward(self, x: Array) -> Array:
        y = self.xp.tanh(x)
        self.save(y)
        return y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        (y,) = self.saved
        return (dy * (1.0 - y * y),)


def logistic(x: Array, xp: Any) -> Array:
    """1 / (1 + e^-x), from e^-|x| so that nothing overflows and small values keep their relative precision."""
    positive = x.real >= 0
    e = xp.exp(xp.where(positive, -x, x))  # not -abs(x): this form is analytic, so that a complex step passes through
    return xp.where(positive, xp.ones_like(e), e) / (1.0 + e)


class Sigmoid(Op):
    """y = 1 / (1 + e^-x). dx = dy y (1 - y)."""

    def forward(self, x: Array) -> Array:
        y = logistic(x, self.xp)
        self.save(y)
        return y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        (y,) = self.saved
        return (dy * y * (1.0 - y),)


class SiLU(Op):
    """y = x p with p = 1 / (1 + e^-x). dp/dx = p (1 - p), so dx = dy (p + x p (1 - p)). Keeps x; p is cheap to recompute."""

    def forward(self, x: Array) -> Array:
        self.save(x)
        return x * logistic(x, self.xp)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        (x,) = self.saved
        p = logistic(x, self.xp)
        return (dy * (p + x * p * (1.0 - p)),)


class GELU(Op):
    """y = x (1 + tanh t) / 2 with t = c (x + a x^3), c = sqrt(2 / pi), a = 0.044715: the tanh form, as in GPT-2.

    It differs from `ExactGELU` by 5e-4 at most, near |x| = 2.7.

    dt/dx = c (1 + 3 a x^2), so dx = dy ((1 + tanh t) / 2 + x (1 - tanh^2 t) c (1 + 3 a x^2) / 2). Keeps x.

    Source: Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2.
    """

    c = math.sqrt(2.0 / math.pi)
    a = 0.044715

    def forward(self, x: Array) -> Array:
        self.save(x)
        return 0.5 * x * (1.0 + self._tanh(x))

    def _tanh(self, x: Array) -> Array:
        x = self._near(x)
        return self.xp.tanh(self.c * x * (1.0 + self.a * x * x))

    def _near(self, x: Array) -> Array:
        # Beyond, tanh is 1 to the last bit, and x^2 could overflow. Not clip: CuPy's takes no complex step.
        return self.xp.minimum(self.xp.maximum(x, -10.0), 10.0)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        (x,) = self.saved
        tanh = self._tanh(x)
        near = self._near(x)
        slope = self.c * (1.0 + 3.0 * self.a * near * near)
        return (dy * (0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * slope),)


class ExactGELU(Op):
    """y = x Phi(x), with Phi the normal distribution function (1 + erf(x / sqrt 2)) / 2: the form of BERT.

    Phi'(x) = e^(-x^2/2) / sqrt(2 pi), so dx = dy (Phi(x) + x e^(-x^2/2) / sqrt(2 pi)). Keeps x.

    Source: Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2.
    """

    density = 1.0 / math.sqrt(2.0 * math.pi)

    def forward(self, x: Array) -> Array:
        self.save(x)
        return x * normal(x, self.xp)[0]

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        (x,) = self.saved
        phi, bell = normal(x, self.xp)
        return (dy * (phi + self.density * x * bell),)


def relu(x: TensorLike) -> Tensor:
    """max(x, 0); see `ReLU`."""
    return apply(ReLU, x)


def tanh(x: TensorLike) -> Tensor:
    """Hyperbolic tangent; see `Tanh`."""
    return apply(Tanh, floating(x))


def sigmoid(x: TensorLike) -> Tensor:
    """1 / (1 + e^-x); see `Sigmoid`."""
    return apply(Sigmoid, floating(x))


def silu(x: TensorLike) -> Tensor:
    """x / (1 + e^-x), also called swish; see `SiLU`."""
    return apply(SiLU, floating(x))


def gelu(x: TensorLike, approximate: str = "tanh") -> Tensor:
    """Gaussian error linear unit, in its tanh form unless told otherwise: **PyTorch's default is the other one**.

    Parameters
    ----------
    x : Tensor
    approximate : {"tanh", "none"}
        ``"tanh"``, the default here: `GELU`, as in GPT-2 (``gelu_new`` in transformers). ``"none"``, the default of
        ``torch.nn.functional.gelu``: `ExactGELU`, with erf, as in BERT (``gelu`` in transformers). Values differ by up to 5e-4:
        a checkpoint gives the right numbers only with the form it was trained with.

    Raises
    ------
    ConfigError
        If `approximate` is neither.

    Examples
    --------
    >>> import minilora
    >>> x = minilora.tensor([-2.0, 2.0])
    >>> gelu(x).data.round(5), gelu(x, approximate="none").data.round(5)
    (array([-0.0454,  1.9546], dtype=float32), array([-0.0455,  1.9545], dtype=float32))
    """
    check_gelu(approximate)
    return apply(GELU if approximate == "tanh" else ExactGELU, floating(x))


def check_gelu(approximate: Any) -> None:
    """Raise `ConfigError` unless `approximate` names a form of GELU."""
    if approximate not in ("tanh", "none"):
        raise ConfigError(f'approximate must be "tanh" (GPT-2) or "none" (exact, BERT), got {approximate!r}')
