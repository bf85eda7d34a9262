"""A sampler that takes few steps and draws nothing but its start.

At step t the network's noise e gives a guess of the image, and the guess the image a step further on, with less noise:

    x0 = (x_t - sqrt(1 - abar_t) e) / sqrt(abar_t)          cut to [-1, 1], where images lie
    e' = (x_t - sqrt(abar_t) x0) / sqrt(1 - abar_t)         the noise that goes with the cut guess; e where nothing was cut
    x_u = sqrt(abar_u) x0 + sqrt(1 - abar_u) e'             u the next step of the path; after the last one x0 itself

This is DDIM with eta = 0: between two steps nothing is drawn, so that an image is a function of the noise it starts from, of
its class and of the weights, and two adapters can be compared on the same digit.

With guidance w the network is asked twice, and what the class changes is made stronger:

    e = e(x_t, t, any) + w (e(x_t, t, c) - e(x_t, t, any))  w = 1: e(x_t, t, c), asked once

Sources: Song, Meng and Ermon 2021, arXiv 2010.02502, equations 12 and 16; Ho and Salimans 2022, arXiv 2207.12598, equation 6
(there w is one less).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy

from ... import backend, ops, parallel
from ...engine import no_grad
from ...errors import ConfigError, ShapeError
from ...ops.indices import integers
from ...settings import number, whole
from ...tensor import Tensor, tensor
from .schedule import NoiseSchedule
from .unet import UNet

__all__ = ["ddim"]


def ddim(model: UNet, schedule: NoiseSchedule, labels: Any, *, steps: int = 50, guidance: float = 1.0, noise: Any = None,
         rng: numpy.random.Generator | int | None = 0, batch_size: int = 32, threads: int | None = None) -> numpy.ndarray:
    """Images of these classes; see the formulas at the top of this file.

    Parameters
    ----------
    model : UNet
    schedule : NoiseSchedule
        That of its training.
    labels : array or list of int, shape (N,), or int
        Of each image. Of a model without classes: how many images.
    steps : int
        Of the path from noise to image: as often, or with guidance twice as often, each image goes through the network.
    guidance : float
        w >= 0. Other values than 1 need a model with a class for "any" (`UNetConfig.any_class`).
    noise : array, shape (N, C, height, width), optional
        To start from. By default drawn by `rng`.
    rng : numpy.random.Generator or int
        Draws on the host, for all images at once: one seed gives one start on every device.
    batch_size : int
        Images that are computed at once.
    threads : int, optional
        Batches that are computed at once. None: `parallel.advised_threads`.

    Returns
    -------
    numpy.ndarray, shape (N, C, height, width)
        On the host, numbers in [-1, 1].

    Raises
    ------
    ConfigError
        If a setting is out of its range, or the model has no class for "any" and guidance needs it.
    OutOfRangeError
        If a label is none of the model's.
    ShapeError
        If `noise` or `labels` have another shape.

    Examples
    --------
    >>> from minilora.models import UNet, UNetConfig
    >>> config = UNetConfig(sample_size=4, block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=8, classes=2)
    >>> ddim(UNet(config, rng=0), NoiseSchedule(), [0, 1], steps=2).shape
    (2, 1, 4, 4)
    """
    guidance = number("guidance", guidance, 0.0)
    path, batch_size = schedule.path(steps), whole("batch_size", batch_size)
    labels, count = _labels(model, labels, guidance)
    start = _start(model, count, noise, rng)
    dtype = next(iter(model.parameters())).dtype
    made = numpy.empty(start.shape, dtype)

    def compute(rows: slice) -> None:
        with no_grad():
            x = tensor(start[rows].astype(dtype))
            chosen = None if labels is None else labels[rows]
            for t, after in itertools.pairwise([*path.tolist(), None]):
                x = _further(x, _noise(model, x, t, chosen, guidance), schedule, t, after)
            made[rows] = backend.to_host(x.data)

    pieces = [slice(low, low + batch_size) for low in range(0, count, batch_size)]
    parallel.spread_out(compute, pieces, threads or parallel.advised_threads(model.parameters()))
    return made


def _labels(model: UNet, labels: Any, guidance: float) -> tuple[numpy.ndarray | None, int]:
    """The labels on the host, checked, and their number."""
    config = model.config
    if guidance != 1.0 and config.any_class is None:
        raise ConfigError(f"guidance={guidance:g} needs a model that knows images without their class: make it with "
                          "classes=... and guided=True, and train it with some labels dropped (NoisedRow)")
    if config.classes is None:
        if not isinstance(labels, (int, numpy.integer)) or isinstance(labels, bool):
            raise ConfigError(f"this model has no classes: expected the number of images, got {labels!r:.60}")
        return None, whole("the number of images", labels, 0)
    given = labels if hasattr(labels, "shape") or len(labels) else numpy.zeros(0, "int64")  # [] is no list of floats here
    labels = backend.to_host(integers("ddim: label", given, config.embedded))
    if labels.ndim != 1:
        raise ShapeError(f"ddim: expected a label for each image, (N,), got shape {labels.shape}")
    return labels, len(labels)


def _start(model: UNet, count: int, noise: Any, rng: Any) -> numpy.ndarray:
    config = model.config
    shape = (count, config.in_channels, config.sample_size, config.sample_size)
    if noise is None:
        return numpy.random.default_rng(rng).standard_normal(shape)
    given: numpy.ndarray = numpy.asarray(noise)
    if given.shape != shape:
        raise ShapeError(f"ddim: expected noise of shape {shape}, for {count} images of this model, got {given.shape}")
    return given


def _noise(model: UNet, x: Tensor, t: int, labels: numpy.ndarray | None, guidance: float) -> Tensor:
    """e for a batch at step t."""
    n = len(x)
    if labels is None:
        return model(x, numpy.full(n, t))  # type: ignore[no-any-return]
    if guidance == 1.0:
        return model(x, numpy.full(n, t), labels)  # type: ignore[no-any-return]
    unknown = numpy.full(n, model.config.any_class)
    both = model(ops.concatenate([x, x]), numpy.full(2 * n, t), numpy.concatenate([labels, unknown]))
    known, unknown = both[:n], both[n:]
    return unknown + (known - unknown) * guidance  # type: ignore[no-any-return]


def _further(x: Tensor, e: Tensor, schedule: NoiseSchedule, t: int, after: int | None) -> Tensor:
    """The images a step further on."""
    signal, sigma = float(schedule.signal[t]), float(schedule.noise[t])
    guess = ops.clip((x - e * sigma) / signal, -1.0, 1.0)
    if after is None:
        return guess
    e = (x - guess * signal) / sigma
    left = float(schedule.alphas_cumprod[after])
    return guess * math.sqrt(left) + e * math.sqrt(1.0 - left)
