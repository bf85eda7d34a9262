"""Normalisation: every row, or group of channels, is given mean 0 and variance 1, or mean square 1.

All three keep the input itself, which costs nothing where somebody else keeps it too, and one or two numbers a row; the
normalised values are computed again in backward, which is cheaper than a second array of the input's size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..engine import Op, apply, floating, shape_of
from ..errors import ConfigError, ShapeError
from ..settings import number
from .linear import rows

if TYPE_CHECKING:
    from ..tensor import Tensor

Array = Any


def standardise(x: Array, eps: float, xp: Any) -> tuple[Array, Array, Array]:
    """xhat = (x - mean) rstd with rstd = 1 / sqrt(variance + eps), row by row.

    Parameters
    ----------
    x : array, shape (R, M)
    eps : float
    xp : module

    Returns
    -------
    xhat : array, shape (R, M)
    mean, rstd : array, shape (R, 1)
    """
    mean = x.mean(axis=1, keepdims=True)
    xhat = x - mean  # the variance from this, not from the mean of x^2: nothing cancels
    rstd = 1.0 / xp.sqrt((xhat * xhat).mean(axis=1, keepdims=True) + eps)
    xhat *= rstd
    return xhat, mean, rstd


def through_standardise(g: Array, xhat: Array, rstd: Array) -> Array:
    """rstd (g - mean(g) - xhat mean(g xhat)), row by row: the gradient of x from g, that of xhat. Edits xhat."""
    dx = g - g.mean(axis=1, keepdims=True)
    xhat *= (g * xhat).mean(axis=1, keepdims=True)
    dx -= xhat
    dx *= rstd
    return dx


class LayerNorm(Op):
    """y = xhat w + b, where xhat is x (..., D) with mean 0 and variance 1 in every row; w (D), b (D).

    In one row, with m = (1/D) sum_i x_i, v = (1/D) sum_i (x_i - m)^2 and q = (v + eps)^(-1/2):

        xhat_i = q (x_i - m)        y_i = xhat_i w_i + b_i

    x_i meets xhat_j directly if i = j, through m, and through v. Since sum_k (x_k - m) = 0, m's share in v vanishes:
    dv/dx_i = (2/D) (x_i - m), hence dq/dx_i = -(1/2) q^3 dv/dx_i = -(1/D) q^2 xhat_i, and

        dxhat_j/dx_i = q ([i = j] - 1/D) + (x_j - m) dq/dx_i = q ([i = j] - 1/D - xhat_j xhat_i / D)

    With g = dy w, the gradient of xhat:

        dx = q (g - mean(g) - xhat mean(g xhat))        dw = sum over rows of dy xhat        db = sum over rows of dy

    Keeps x, and m and q (2 N), if x or w wants a gradient; nothing for b alone.

    Source: Ba, Kiros and Hinton 2016, arXiv 1607.06450, equation 4.
    """

    eps: float
    in_shape: tuple[int, ...]

    def forward(self, x: Array, w: Array | None, b: Array | None) -> Array:
        self.in_shape = x.shape
        y, mean, rstd = standardise(rows(x), self.eps, self.xp)
        if self.needs[0] or self.needs[1]:
            self.save(x, mean, rstd, w if self.needs[0] else None)
        if w is not None:
            y *= w
        if b is not None:
            y += b
        return y.reshape(x.shape)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        dx = dw = None
        dy = rows(dy)
        if self.needs[0] or self.needs[1]:
            x, mean, rstd, w = self.saved
            xhat = (rows(x) - mean) * rstd
            if self.needs[1]:
                dw = (dy * xhat).sum(axis=0)
            if self.needs[0]:
                dx = through_standardise(dy if w is None else dy * w, xhat, rstd).reshape(self.in_shape)
        return dx, dw, dy.sum(axis=0) if self.needs[2] else None


class RMSNorm(Op):
    """y = x q w, where q = (mean of x^2 + eps)^(-1/2) in every row of x (..., D); w (D).

    With xhat = q x: dq/dx_i = -(1/2) q^3 (2/D) x_i = -(1/D) q^2 xhat_i, so dxhat_j/dx_i = q ([i = j] - xhat_j xhat_i / D).
    With g = dy w, the gradient of xhat:

        dx = q (g - xhat mean(g xhat))        dw = sum over rows of dy xhat

    Keeps x and q (N).

    Source: Zhang and Sennrich 2019, arXiv 1910.07467, equation 4; eps stands inside the root, as in Llama.
    """

    eps: float
    in_shape: tuple[int, ...]

    def forward(self, x: Array, w: Array | None) -> Array:
        self.in_shape = x.shape
        x2 = rows(x)
        q = 1.0 / self.xp.sqrt((x2 * x2).mean(axis=1, keepdims=True) + self.eps)
        self.save(x, q, w if self.needs[0] else None)
        y = x2 * q
        if w is not None:
            y *= w
        return y.reshape(x.shape)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        x, q, w = self.saved
        dx = dw = None
        dy, xhat = rows(dy), rows(x) * q
        if self.needs[1]:
            dw = (dy * xhat).sum(axis=0)
        if self.needs[0]:
            g = dy if w is None else dy * w
            xhat *= (g * xhat).mean(axis=1, keepdims=True)
            dx = g - xhat
            dx *= q
            dx = dx.reshape(self.in_shape)
        return dx, dw


class GroupNorm(Op):
    """y = xhat w + b for x (N, C, ...): mean 0 and variance 1 over each sample's groups of C / groups channels; w, b (C).

    A group, with all positions of its channels, is one row of M numbers of a matrix (N groups, M), and dx follows from
    g = dy w as in `LayerNorm`. w and b belong to channels: dw = sum over samples and positions of dy xhat, db the same of dy.

    Keeps x, and mean and q (2 N groups), if x or w wants a gradient.

    Source: Wu and He 2018, arXiv 1803.08494, equations 1, 2 and 7.
    """

    eps: float
    groups: int
    in_shape: tuple[int, ...]

    def _split(self, x: Array) -> tuple[Array, tuple[int, int, int]]:
        """x as (N groups, M), and its shape as (samples, channels, positions)."""
        n, c, *rest = x.shape
        positions = math.prod(rest)
        return x.reshape(n * self.groups, c // self.groups * positions), (n, c, positions)

    def forward(self, x: Array, w: Array | None, b: Array | None) -> Array:
        self.in_shape = x.shape
        x2, channels = self._split(x)
        y, mean, rstd = standardise(x2, self.eps, self.xp)
        if self.needs[0] or self.needs[1]:
            self.save(x, mean, rstd, w if self.needs[0] else None)
        y = y.reshape(channels)
        if w is not None:
            y *= w[:, None]
        if b is not None:
            y += b[:, None]
        return y.reshape(x.shape)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        dx = dw = None
        _, channels = self._split(dy)
        dy = dy.reshape(channels)
        if self.needs[0] or self.needs[1]:
            x, mean, rstd, w = self.saved
            xhat = (self._split(x)[0] - mean) * rstd
            if self.needs[1]:
                dw = (dy * xhat.reshape(channels)).sum(axis=(0, 2))
            if self.needs[0]:
                g = dy if w is None else dy * w[:, None]
                dx = through_standardise(g.reshape(xhat.shape), xhat, rstd).reshape(self.in_shape)
        return dx, dw, dy.sum(axis=(0, 2)) if self.needs[2] else None


def check_eps(name: str, eps: Any) -> None:
    """Raise `ConfigError` unless eps is a finite number >= 0."""
    number(f"{name}: eps", eps, 0.0)


def check_norm(name: str, x: Any, channels: int, eps: float, **parameters: Any) -> None:
    """Raise `ShapeError` or `ConfigError` unless w and b have shape (channels,), there are channels, and eps is right."""
    check_eps(name, eps)
    if channels == 0:
        raise ShapeError(f"{name}: nothing to normalise in shape {shape_of(x)}")
    for letter, p in parameters.items():
        if p is not None and shape_of(p) != (channels,):
            raise ShapeError(f"{name}: for input {shape_of(x)} expected {letter} of shape ({channels},), got {shape_of(p)}. Is "
                             "it the layer of another width?")


def layer_norm(x: Any, w: Any = None, b: Any = None, eps: float = 1e-5) -> Tensor:
    """Rows with mean 0 and variance 1, times w, plus b; see `LayerNorm`.

    Parameters
    ----------
    x : Tensor, shape (..., D)
    w, b : Tensor, shape (D,), optional
    eps : float
        Added to the variance. GPT-2 and PyTorch take 1e-5, BERT 1e-12.

    Raises
    ------
    ShapeError
        If w or b does not fit, or if there is nothing to normalise.
    ConfigError
        If eps is negative or not finite.

    Examples
    --------
    >>> import minilora
    >>> layer_norm(minilora.tensor([[1.0, 3.0]]), eps=0.0).data
    array([[-1.,  1.]])
    """
    check_norm("layer_norm", x, last("layer_norm", x), eps, w=w, b=b)
    return apply(LayerNorm, floating(x), w, b, eps=float(eps))


def rms_norm(x: Any, w: Any = None, eps: float = 1e-6) -> Tensor:
    """Rows with mean square 1, times w; see `RMSNorm`.

    Parameters
    ----------
    x : Tensor, shape (..., D)
    w : Tensor, shape (D,), optional
    eps : float
        Added to the mean square. Llama 1 takes 1e-6, Llama 2 and 3 take 1e-5.

    Raises
    ------
    ShapeError
        If w does not fit, or if there is nothing to normalise.
    ConfigError
        If eps is negative or not finite.

    Examples
    --------
    >>> import minilora
    >>> rms_norm(minilora.tensor([[1.0, 7.0]]), eps=0.0).data
    array([[0.2, 1.4]])
    """
    check_norm("rms_norm", x, last("rms_norm", x), eps, w=w)
    return apply(RMSNorm, floating(x), w, eps=float(eps))


def last(name: str, x: Any) -> int:
    """The length of x's last axis."""
    if not shape_of(x):
        raise ShapeError(f"{name}: expected an input (..., D), got a single number")
    return int(x.shape[-1])


def group_norm(x: Any, groups: int, w: Any = None, b: Any = None, eps: float = 1e-5) -> Tensor:
    """Groups of channels with mean 0 and variance 1, times w, plus b; see `GroupNorm`.

    Parameters
    ----------
    x : Tensor, shape (N, C, ...)
    groups : int
        Divides C. 1 normalises a whole sample; C, each channel by itself.
    w, b : Tensor, shape (C,), optional
    eps : float

    Raises
    ------
    ShapeError
        If x has fewer than two axes, `groups` does not divide C, or w or b does not fit.
    ConfigError
        If `groups` is not an int >= 1, or eps is negative or not finite.

    Examples
    --------
    >>> import minilora
    >>> group_norm(minilora.tensor([[1.0, 3.0, 5.0, 9.0]]), groups=2, eps=0.0).data
    array([[-1.,  1., -1.,  1.]])
    """
    shape = shape_of(x)
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ConfigError(f"group_norm: groups must be an int >= 1, got {groups!r}")
    if len(shape) < 2 or shape[1] % groups or 0 in shape[1:]:
        raise ShapeError(f"group_norm: expected an input (N, C, ...) with C a multiple of {groups} groups, got {shape}")
    check_norm("group_norm", x, shape[1], eps, w=w, b=b)
    return apply(GroupNorm, floating(x), w, b, groups=groups, eps=float(eps))
