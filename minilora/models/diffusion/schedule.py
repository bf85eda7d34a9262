"""How much noise an image has at each step of a diffusion."""

from __future__ import annotations

import math
from typing import Any

import numpy

from ...errors import ConfigError, OutOfRangeError, ShapeError
from ...settings import whole

__all__ = ["KINDS", "NoiseSchedule"]

KINDS = ("linear", "cosine")
OFFSET = 0.008  # of the cosine: as much noise at step 0 as the steps between two grey levels
LARGEST = 0.999  # beta, which would be 1 where nothing is left of the image


class NoiseSchedule:
    """How much of the image, and how much noise, x_t holds at step t = 0 ... T - 1.

    An image x_0 with numbers in [-1, 1] is mixed with noise eps of the same shape, from N(0, 1):

        x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps          abar_t = product of 1 - beta_u over u <= t

    so that x_t has the variance 1 if x_0 has. "linear" lets beta rise evenly from 0.1 / T to 20 / T, which is 1e-4 to 0.02
    for 1000 steps. "cosine" gives abar_t = g(t + 1) / g(0) with g(u) = cos^2(pi / 2 (u / T + 0.008) / 1.008), and no beta
    above 0.999: it leaves more steps to middling noise.

    Parameters
    ----------
    steps : int
        T; at least 20.
    kind : {"cosine", "linear"}

    Attributes
    ----------
    betas, alphas_cumprod : numpy.ndarray of float64, shape (T,), read-only
        beta_t and abar_t, on the host.
    signal, noise : numpy.ndarray of float64, shape (T,), read-only
        sqrt(abar_t) and sqrt(1 - abar_t).

    Raises
    ------
    ConfigError
        If `steps` is no int >= 20, or the kind is none of the two.

    Notes
    -----
    Sources: Ho, Jain and Abbeel 2020, arXiv 2006.11239, equation 4 and section 4; Nichol and Dhariwal 2021, arXiv 2102.09672,
    equation 17.

    Examples
    --------
    >>> schedule = NoiseSchedule(1000, "linear")
    >>> schedule.betas[[0, -1]].round(6).tolist()
    [0.0001, 0.02]
    """

    def __init__(self, steps: int = 1000, kind: str = "cosine") -> None:
        self.steps = whole("steps", steps, 20)  # with fewer the linear kind has a beta above 1
        if kind not in KINDS:
            raise ConfigError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind = str(kind)
        if kind == "linear":
            betas = numpy.minimum(numpy.linspace(0.1, 20.0, self.steps) / self.steps, LARGEST)
        else:
            angles = (numpy.arange(self.steps + 1) / self.steps + OFFSET) / (1.0 + OFFSET) * (math.pi / 2)
            left = numpy.cos(angles) ** 2
            betas = numpy.minimum(1.0 - left[1:] / left[:-1], LARGEST)
        abar = numpy.cumprod(1.0 - betas)
        self.betas, self.alphas_cumprod = betas, abar
        self.signal, self.noise = numpy.sqrt(abar), numpy.sqrt(1.0 - abar)
        for array in (self.betas, self.alphas_cumprod, self.signal, self.noise):
            array.flags.writeable = False

    def __repr__(self) -> str:
        return f"NoiseSchedule({self.steps}, {self.kind!r})"

    def noised(self, x: numpy.ndarray, t: Any, noise: numpy.ndarray) -> numpy.ndarray:
        """x_t of images on the host, in their dtype.

        Parameters
        ----------
        x, noise : numpy.ndarray, shape (N, ...)
            x_0, and eps of the same shape.
        t : int, or array of int of shape (N,)

        Raises
        ------
        ShapeError
            If the shapes do not fit together.
        OutOfRangeError
            If a step is outside [0, T).
        """
        t = numpy.asarray(t)
        if x.shape != noise.shape or t.shape not in ((), x.shape[:1]):
            raise ShapeError(f"noised: expected images (N, ...), noise of their shape and steps () or (N,), got {x.shape}, "
                             f"{noise.shape} and {t.shape}")
        if t.dtype.kind not in "iu" or ((t < 0) | (t >= self.steps)).any():
            raise OutOfRangeError(f"noised: steps are ints from 0 to {self.steps - 1}, got {t.min()} to {t.max()} ({t.dtype})")
        shape = t.shape + (1,) * (x.ndim - t.ndim) if t.ndim else ()
        signal, sigma = (table[t].astype(x.dtype).reshape(shape) for table in (self.signal, self.noise))
        return signal * x + sigma * noise  # type: ignore[no-any-return]

    def path(self, steps: int) -> numpy.ndarray:
        """The steps of a sampler that takes so few: from T - 1 down to 0, evenly.

        Raises
        ------
        ConfigError
            If there are not so many.
        """
        if whole("steps", steps) > self.steps:
            raise ConfigError(f"a sampler takes at most the {self.steps} steps of its schedule, got {steps}")
        return numpy.linspace(self.steps - 1, 0, int(steps)).round().astype("int64") if steps > 1 else \
            numpy.array([self.steps - 1])
