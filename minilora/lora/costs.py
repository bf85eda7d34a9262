"""What training costs: bytes and FLOPs, with adapters and for full fine-tuning. Counted from shapes, nothing is run."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy

from ..errors import ConfigError
from .inventory import Inventory, Layer
from .matching import Match, Target

__all__ = ["Adapter", "Costs", "Storage", "adapters_of", "full_costs", "lora_costs"]


class Storage(NamedTuple):
    """Bytes of one number, by what the number is.

    Attributes
    ----------
    frozen : float
        Of a weight that is not trained. 0.5 for four bits.
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
        is trained, and z. Inputs that layers share are counted in each: an upper bound.
    checkpoint : int
        Bytes of what is saved: the trained numbers; of the whole model in full fine-tuning.
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


class Adapter(NamedTuple):
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
    """

    target: Target
    shape: tuple[int, ...]
    a: int
    b: int
    trained: int
    base: int
    adapter: int


class _Products(NamedTuple):
    """Multiplications a row in the products of one layer with its weight, A and B, and the numbers of its input a row."""

    weight: int
    a: int
    b: int
    input: int


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


def bytes_of(layers: Inventory, per_number: float | None) -> int:
    """Bytes of all parameters: in their own dtypes, or at `per_number` bytes each."""
    return sum(layer.nbytes if per_number is None else round(layer.size * per_number) for layer in layers)


def full_costs(layers: Inventory, batch: int, storage: Storage | None, fan_in_fan_out: bool = False) -> Costs:
    """Full fine-tuning: every number is trained. The products are x W, dy W above the first layer, and dy^T x."""
    total = sum(layer.size for layer in layers)
    forward = backward = activations = 0
    started = False
    for layer in layers:
        if layer.weight is not None:
            p, _, _ = products_of(layer, 0, fan_in_fan_out)
            forward += 2 * batch * p.weight
            backward += 2 * batch * p.weight * (2 if started else 1)
            activations += round(batch * p.input * (storage.activation if storage else layer.weight.itemsize))
        started = started or bool(layer.parameters)
    return Costs(
        trained=total, total=total, weights=bytes_of(layers, storage and storage.trained),
        gradients=bytes_of(layers, storage and storage.gradient), moments=2 * bytes_of(layers, storage and storage.moment),
        activations=activations, checkpoint=bytes_of(layers, storage and storage.saved), forward=forward, backward=backward)


def adapters_of(layers: Inventory, matched: Match, batch: int) -> list[Adapter]:
    """The cost of every adapted layer. Below the first layer in which anything is trained no dx is computed."""
    config = matched.config
    targets = {target.path: target for target in matched.targets}
    adapters, started = [], False
    for layer in layers:
        target = targets.get(layer.path)
        if target is not None and layer.weight is not None:
            p, a, b = products_of(layer, target.r, config.fan_in_fan_out)
            out = b * layer.groups // target.r
            # forward z = x A^T and z B^T; backward u = dy B, dB = dy^T z, dA = u^T x, and for dx: dy W and u A
            base = 2 * batch * p.weight * (2 if started else 1)
            adapter = 2 * batch * ((3 if started else 2) * p.a + 3 * p.b)
            adapters.append(Adapter(target, layer.weight.shape, a, b,
                                    a + b + out * (config.use_dora + config.lora_bias), base, adapter))
        started = started or target is not None or bool(trained_in_place(layer, matched)) or is_saved(layer, matched)
    return adapters


def is_saved(layer: Layer, matched: Match) -> bool:
    """Whether this layer is in modules_to_save, or inside of one that is."""
    return any(layer.path == path or layer.path.startswith(f"{path}.") for path in matched.saved)


def trained_in_place(layer: Layer, matched: Match) -> int:
    """Biases of the base that are trained, in numbers."""
    bias = matched.config.bias
    if bias == "none" or is_saved(layer, matched):
        return 0
    if bias == "lora_only" and all(layer.path != target.path for target in matched.targets):
        return 0
    return sum(p.size for p in layer.parameters if "bias" in p.name)


def lora_costs(layers: Inventory, matched: Match, adapters: list[Adapter], batch: int, storage: Storage | None) -> Costs:
    """Training with adapters on a frozen base."""
    mine = {adapter.target.path: adapter for adapter in adapters}
    cost = dict.fromkeys(Costs._fields, 0)
    started = False
    for layer in layers:
        adapter, saved = mine.get(layer.path), is_saved(layer, matched)
        in_place = trained_in_place(layer, matched)
        copied = layer.size if saved else 0  # the original stays: other adapters need it
        added = copied + (adapter.trained if adapter else 0)
        itemsize = layer.weight.itemsize if layer.weight else max((p.itemsize for p in layer.parameters), default=0)
        size = storage or Storage(*[itemsize] * 6)
        frozen = layer.nbytes - in_place * itemsize if storage is None else (layer.size - in_place) * storage.frozen
        trained = added + in_place
        cost["trained"] += trained
        cost["total"] += layer.size + added
        cost["weights"] += round(frozen + trained * size.trained)
        cost["gradients"] += round(trained * size.gradient)
        cost["moments"] += 2 * round(trained * size.moment)
        cost["checkpoint"] += round(trained * size.saved)
        if layer.weight is not None:
            p, _, _ = products_of(layer, adapter.target.r if adapter else 0, matched.config.fan_in_fan_out)
            kept = p.input + adapter.target.r if adapter else p.input if saved else 0
            cost["activations"] += round(batch * kept * size.activation)
            cost["forward"] += 2 * batch * (p.weight + p.a + p.b)
            cost["backward"] += 2 * batch * (p.weight * (started + saved) + (p.a * (1 + started) + 2 * p.b if adapter else 0))
        started = started or trained > 0
    return Costs(**cost)
