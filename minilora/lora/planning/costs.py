"""What training costs: bytes and FLOPs, with adapters and for full fine-tuning. Counted from shapes, nothing is run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy

from ...errors import ConfigError
from ..adapters.inventory import Layer, Numbers
from ..adapters.matching import Target
from ..config import Config

__all__ = ["AdapterCost", "Costs", "Part", "Storage", "adapters_of", "full_costs", "lora_costs"]


class Storage(NamedTuple):
    """Bytes of one number, by what the number is.

    Attributes
    ----------
    frozen : float
        Of what is not trained, the frozen start of an adapter included. 0.5 for four bits.
    trained : float
        Of a weight that is trained, all its copies together: 6 for float16 with a float32 master copy.
    gradient : float
        0 if every gradient is used up as soon as it is known.
    moment : float
        Of Adam's m, and again of its v.
    activation : float
        Of what a layer keeps from the forward for the backward pass.
    saved : float
        In a checkpoint.

    Examples
    --------
    >>> Storage.of("float16")._replace(moment=4)
    Storage(frozen=2, trained=2, gradient=2, moment=4, activation=2, saved=2)
    """

    frozen: float
    trained: float
    gradient: float
    moment: float
    activation: float
    saved: float

    @classmethod
    def of(cls, dtype: Any) -> Storage:
        """Every number in one dtype, as minilora trains; ``"bfloat16"`` counts as its 2 bytes.

        Raises
        ------
        ConfigError
            If it is no floating-point type.
        """
        try:
            kind = numpy.dtype("float16" if str(dtype) == "bfloat16" else dtype)
        except TypeError:
            kind = numpy.dtype(object)
        if kind.kind != "f":
            raise ConfigError(f"dtype must be a floating-point type or a Storage, got {dtype!r}")
        return cls(*[kind.itemsize] * 6)


class Costs(NamedTuple):
    """One way of training.

    Attributes
    ----------
    trained, total : int
        Numbers that are trained, and all numbers of the model with its adapters.
    weights, gradients, moments : int
        Bytes while training; the moments are Adam's m and v.
    activations : int
        Bytes that the layers with a weight matrix or kernel keep for the backward pass: the input of a layer whose weight or A
        is trained, and z; under DoRA also the output before it is stretched; with a frozen start also A and B joined with it.
        Inputs that layers share are counted in each: an upper bound.
    checkpoint : int
        Bytes of what is saved: the trained numbers, and the frozen start of A and B where there is one; of the whole model in
        full fine-tuning.
    forward, backward : int
        FLOPs of the products with weights, a multiplication and an addition counted as 2.
    """

    trained: int
    total: int
    weights: int
    gradients: int
    moments: int
    activations: int
    checkpoint: int
    forward: int
    backward: int

    @property
    def memory(self) -> int:
        """Bytes of weights, gradients and moments: what does not depend on the batch."""
        return self.weights + self.gradients + self.moments


class AdapterCost(NamedTuple):
    """The cost of one adapted layer.

    Attributes
    ----------
    target : Target
    shape : tuple of int
        Of the base weight.
    a, b : int
        Numbers in A and in B.
    trained : int
        a + b, and DoRA's lengths and the bias of the update where the config has them.
    base, adapter : int
        FLOPs of forward and backward: of the frozen weight, and of A and B.
    start : int
        Numbers of the frozen start: a + b with "pissa" and "olora", else 0.
    """

    target: Target
    shape: tuple[int, ...]
    a: int
    b: int
    trained: int
    base: int
    adapter: int
    start: int = 0


class Part(NamedTuple):
    """A layer as a config sees it.

    Attributes
    ----------
    layer : Layer
        Without its weight where no product is formed with it: in what belongs to another adapter.
    target : Target, or None
    saved : bool
        Whether a copy of this layer takes its place.
    copied : tuple of Numbers
        What `modules_to_save` copies, listed at the module that it names.
    biases : tuple of Numbers
        Those of the base that are trained where they are.
    above : bool
        Whether anything is trained in a layer below, so that this one computes dx.
    of_base : bool
        Whether no other adapter owns it.
    """

    layer: Layer
    target: Target | None
    saved: bool
    copied: tuple[Numbers, ...]
    biases: tuple[Numbers, ...]
    above: bool
    of_base: bool


class _Products(NamedTuple):
    """Multiplications a row in the products of one layer with its weight, A and B, and the numbers of its input a row."""

    weight: int
    a: int
    b: int
    input: int


class _Flops(NamedTuple):
    forward: int
    backward: int


def products_of(layer: Layer, r: int, fan_in_fan_out: bool) -> tuple[_Products, int, int]:
    """The products of an adaptable layer; and the numbers in A and B."""
    assert layer.weight is not None
    shape = layer.weight.shape
    if layer.kind == "Embedding":  # rows of the table and columns of A are looked up, which multiplies nothing
        a, b = r * shape[0], r * shape[1]
        return _Products(0, 0, b, 0), a, b
    if layer.kind.startswith("Conv"):
        a, b = r * math.prod(shape[1:]), shape[0] * r // layer.groups
        return _Products(layer.weight.size, a, b, shape[1] * layer.groups), a, b
    out, n_in = shape[::-1] if fan_in_fan_out else shape
    return _Products(out * n_in, r * n_in, out * r, n_in), r * n_in, out * r


def _flops(part: Part, config: Config, batch: int) -> tuple[_Flops, _Flops]:
    """Of the frozen weight, or of the copy in its place; and of A and B, joined with their start where there is one."""
    if part.layer.weight is None:
        return _Flops(0, 0), _Flops(0, 0)
    rank = _rank(part, config)
    p, _, _ = products_of(part.layer, rank, config.fan_in_fan_out)
    # With dropout DoRA multiplies W by the whole input, and by the dropped one both in its own output and to subtract it.
    times = 3 if part.target and config.use_dora and config.lora_dropout else 1
    # Of the weight: forward x W^T, backward dy W for dx, and dy^T x if it is trained.
    base = _Flops(2 * batch * p.weight * times, 2 * batch * p.weight * (part.above * times + part.saved))
    # Of A and B: forward z = x A^T and z B^T; backward u = dy B, dB = dy^T z, dA = u^T x, and u A for dx.
    forward, backward = 2 * batch * (p.a + p.b), 2 * batch * ((1 + part.above) * p.a + 2 * p.b)
    if part.target and config.use_dora:  # B A, for the lengths
        forward += 2 * part.layer.weight.size * rank // part.layer.groups
    return base, _Flops(forward, backward)


def _rank(part: Part, config: Config) -> int:
    """The rank at which the products with A and B run; 0 for a layer that is not adapted."""
    return 0 if part.target is None else part.target.r * (2 if has_start(config) else 1)


def has_start(config: Config) -> bool:
    """Whether adapters of this config keep a frozen start: see `layers.start`."""
    return config.init_lora_weights in ("pissa", "olora")


def adapters_of(parts: Iterable[Part], config: Config, batch: int) -> list[AdapterCost]:
    """The cost of every adapted layer. Below the first layer in which anything is trained no dx is computed."""
    adapters = []
    for part in parts:
        if part.target is not None and part.layer.weight is not None:
            _, a, b = products_of(part.layer, part.target.r, config.fan_in_fan_out)
            out = b * part.layer.groups // part.target.r
            base, adapter = _flops(part, config, batch)
            adapters.append(AdapterCost(part.target, part.layer.weight.shape, a, b,
                                        a + b + out * (config.use_dora + config.lora_bias), sum(base), sum(adapter),
                                        (a + b) * has_start(config)))
    return adapters


def nbytes(numbers: Iterable[Numbers], per_number: float | None) -> float:
    """Bytes of these parameters: in their own dtypes, or at `per_number` bytes each."""
    return sum(p.nbytes if per_number is None else p.size * per_number for p in numbers)


def full_costs(parts: Iterable[Part], config: Config, batch: int, storage: Storage | None) -> Costs:
    """Full fine-tuning: every number of the base is trained. The products are x W, dy W above the first layer, and dy^T x."""
    costs, above = [], False
    for part in (part for part in parts if part.of_base):
        whole = part._replace(target=None, saved=True, copied=(), biases=part.layer.parameters, above=above)
        costs.append(_layer_costs(whole, None, config, batch, storage))
        above = above or bool(part.layer.parameters)
    return _sum(costs)


def lora_costs(parts: Iterable[Part], adapters: Iterable[AdapterCost], config: Config, batch: int,
               storage: Storage | None) -> Costs:
    """Training with adapters on a frozen base."""
    mine = {adapter.target.path: adapter for adapter in adapters}
    return _sum([_layer_costs(part, mine[part.target.path] if part.target else None, config, batch, storage) for part in parts])


def _sum(costs: list[Costs]) -> Costs:
    return Costs(*map(sum, zip(*costs)))


def _layer_costs(part: Part, adapter: AdapterCost | None, config: Config, batch: int, storage: Storage | None) -> Costs:
    layer, weight = part.layer, part.layer.weight
    in_frozen, in_trained, in_gradient, in_moment, in_activation, in_saved = storage or (None,) * 6
    trained, start = [*part.copied, *part.biases], []
    if adapter is not None and weight is not None:  # stored as the weight beside it
        trained.append(Numbers("adapter", (adapter.trained,), weight.itemsize))
        start.append(Numbers("start", (adapter.start,), weight.itemsize))
    frozen = [p for p in layer.parameters if p not in part.biases] + start
    numbers = sum(p.size for p in trained)
    base, update = _flops(part, config, batch)
    return Costs(
        trained=numbers, total=numbers + sum(p.size for p in frozen),
        weights=round(nbytes(frozen, in_frozen) + nbytes(trained, in_trained)),
        gradients=round(nbytes(trained, in_gradient)), moments=2 * round(nbytes(trained, in_moment)),
        activations=_kept(part, config, batch, in_activation),
        checkpoint=round(nbytes(trained, in_saved) + nbytes(start, in_saved)),
        forward=base.forward + update.forward, backward=base.backward + update.backward)


def _kept(part: Part, config: Config, batch: int, per_number: float | None) -> int:
    """Bytes that a layer with a weight keeps for the backward pass."""
    weight, target = part.layer.weight, part.target
    if weight is None or not (target or part.saved):
        return 0
    rank = _rank(part, config)
    p, a, b = products_of(part.layer, rank, config.fan_in_fan_out)
    size = per_number if per_number is not None else weight.itemsize
    numbers = batch * (p.input + rank)
    if target and has_start(config):  # [B, start_B] for u = dy B, and [A; start_A] for dx
        numbers += b + part.above * a
    bytes_kept = numbers * size
    if target and config.use_dora:  # the output before it is stretched; rho; and 1 / c, in float32 at least
        out = b * part.layer.groups // rank
        bytes_kept += (batch + 1) * out * size + out * max(size, 4)
    return round(bytes_kept)
