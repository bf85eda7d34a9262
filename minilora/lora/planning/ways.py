"""Ways to train a model, each rehearsed: full fine-tuning, adapters, on a base in low precision, with blocks computed again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy

from ... import backend, nn, optim
from ...errors import ConfigError
from ...hollow import Step
from ...hollow.array import Hollow
from ...hollow.meter import metered
from ...hollow.step import hollowed, step_of
from ...quant.packed import Packed
from ...quant.sixteen import Sixteen
from ...tensor import Parameter
from ..adapters.injection import inject
from ..config import Config
from ..layers.adapter import Adapter
from ..layers.base import AdaptedLayer
from ...tables import table
from .costs import has_start
from .human import human

__all__ = ["BASES", "PLANNED", "WAYS", "Way", "example_for", "rehearsed", "step_table", "ways_for"]

BASES = ("float16", "bfloat16", "int8", "nf4", "nf4-double")
OPTIMIZERS = {"adam": optim.Adam, "sgd": lambda groups: optim.SGD(groups, lr=1.0)}
BLOCK, SUPER = 64, 256  # weights that share a scale in NF4, and scales that share one when they are quantised in their turn


class Way(NamedTuple):
    """One way to train.

    Attributes
    ----------
    name : str
    adapters : bool
        False: full fine-tuning.
    base : str, optional
        One of `BASES`: how the linear layers are held, but for the output head. None: as the model has them.
    again : bool
        Whether blocks are computed again in backward: see `nn.grad_checkpoint`.
    """

    name: str
    adapters: bool
    base: str | None = None
    again: bool = False


WAYS = (
    Way("full fine-tuning", False), Way("full, blocks again", False, again=True),
    Way("LoRA", True), Way("LoRA, blocks again", True, again=True),
    Way("LoRA on bfloat16", True, "bfloat16"), Way("LoRA on int8", True, "int8"),
    Way("QLoRA, nf4", True, "nf4"), Way("QLoRA, nf4-double", True, "nf4-double"),
    Way("QLoRA, nf4-double, blocks again", True, "nf4-double", again=True),
)
PLANNED = tuple(WAYS[i] for i in (0, 2, 3, 7))  # of a plan


class Held(Packed):
    """A matrix without numbers, as int8 or NF4 would hold it: codes and scales, decoded tile by tile into a new array."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, kind: str, arrays: Mapping[str, Any] | None = None) -> None:
        super().__init__((shape[0], shape[1]), dtype)
        self.kind, rows, n = kind, self.shape[0], math.prod(self.shape)
        scales = -(-n // BLOCK)
        if arrays is not None:
            self.held = dict(arrays)
        elif kind == "int8":
            self.held = {"": Hollow(n, "int8"), "scale": Hollow(rows, "float32")}
        elif kind == "nf4":
            self.held = {"": Hollow(-(-n // 2), "uint8"), "absmax": Hollow(scales, "float32")}
        else:
            self.held = {"": Hollow(-(-n // 2), "uint8"), "absmax": Hollow(scales, "uint8"),
                         "nested_absmax": Hollow(-(-scales // SUPER), "float32")}

    def arrays(self) -> dict[str, Any]:
        return self.held

    def with_arrays(self, arrays: Mapping[str, Any]) -> Held:
        return Held(self.shape, self.dtype, self.kind, arrays)

    def decoded(self, start: int, stop: int) -> Any:
        made = Hollow((stop - start, self.shape[1]), "float32")
        made.role = self.held[""].role
        return made


def ways_for(model: nn.Module, ways: Sequence[Way] = WAYS) -> list[Way]:
    """Those that the model can be trained in: blocks again only if it has blocks, in full only if it has no adapters."""
    layers = [module for _, module in model.named_modules()]
    adapted = any(isinstance(module, AdaptedLayer) for module in layers)
    try:
        nn.grad_checkpoint(hollowed(model))
        blocks = True
    except ConfigError:
        blocks = False
    linear = any(isinstance(module, nn.Linear) for module in layers)
    return [way for way in ways
            if (way.adapters or not adapted) and (blocks or not way.again) and (linear or way.base is None)]


def example_for(model: Any, example: Any) -> Any:
    """An example to rehearse with: what was given, or for (rows, length) what a model of `minilora.models` makes of it."""
    sizes = isinstance(example, tuple) and len(example) == 2 and all(type(n) is int for n in example)
    if not sizes:
        return example
    if min(example) < 1:
        raise ConfigError(f"example must be (rows, length), ints >= 1, or arguments of the model, got {example!r}")
    if not hasattr(model, "example"):
        raise ConfigError(f"{type(model).__name__} does not say what its inputs look like: give the arguments of a call, such "
                          "as example=numpy.zeros((8, 100), 'float32'), or define example(rows, length), which returns them")
    return model.example(*example)


def rehearsed(model: nn.Module, config: Config, example: Any, way: Way, *, optimizer: Any = "adam", loss: Any = None,
              max_norm: float | None = None) -> Step:
    """A step of training the model in this way, rehearsed: see `hollow.rehearse`. The model stays as it is.

    Raises
    ------
    ConfigError
        As `inject` and `example_for`.
    """
    made = OPTIMIZERS.get(optimizer, optimizer) if isinstance(optimizer, str) else optimizer
    if isinstance(made, str):
        raise ConfigError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, or a callable that makes one, got {optimizer!r}")
    given = example_for(model, example)
    with metered():
        copy = hollowed(model)
        _prepare(copy, config, way)
        adapters = [p for _, module in copy.named_modules() if isinstance(module, Adapter) for p in module.parameters()]
        return step_of(copy, given, adapters=adapters, loss=loss, optimizer=made, max_norm=max_norm)


def _prepare(model: nn.Module, config: Config, way: Way) -> None:
    """Make of a model without numbers what is trained in this way."""
    with backend.use("hollow"):
        if not way.adapters:
            model.requires_grad()
        else:
            model.requires_grad(False)
            _hold(model, way.base)
            there = [name for _, layer in model.named_modules() if isinstance(layer, AdaptedLayer) for name in layer.adapters]
            begun = dataclasses.replace(config, init_lora_weights=True) if has_start(config) else config
            inject(model, begun, _free(there), rng=0)
        if has_start(config):  # made of the weight's numbers, which nobody has
            for _, module in model.named_modules():
                if isinstance(module, Adapter) and module.start_A is None:
                    for name, factor in (("start_A", module.lora_A), ("start_B", module.lora_B)):
                        setattr(module, name, Parameter(Hollow.like(factor.data), trainable=False))
    if way.again:
        nn.grad_checkpoint(model)


def _free(names: Sequence[str]) -> str:
    return next(name for name in ("default", *(f"planned{i}" for i in range(len(names) + 1))) if name not in names)


def _hold(model: nn.Module, base: str | None) -> None:
    """Hold the linear layers of a model without numbers in low precision, but for the output head."""
    if base is None:
        return
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path.split(".")[-1] != "lm_head" and isinstance(module.weight.data, Hollow):
            weight = module.weight.data
            if base in ("float16", "bfloat16"):
                codes = Hollow(weight.shape, "float16" if base == "float16" else "uint16")
                module.weight.data = Sixteen(codes, numpy.promote_types(weight.dtype, "float32"))
            else:
                module.weight.data = Held(weight.shape, weight.dtype, base)


def step_table(steps: Sequence[tuple[str, Step]]) -> list[str]:
    """Lines of a table of bytes, and a line of FLOPs for each way."""
    cells = [("a whole step", "weights", "grad, m, v", "kept", "scratch", "peak")]
    for name, s in steps:
        trained = human(s.gradients + s.moments)
        cells.append((name, human(s.weights), trained, human(s.activations), human(s.scratch), human(s.peak)))
    lines = [*table(cells, left=(0,)), ""]
    for name, step in steps:
        both = [sum(pair) for pair in zip(step.forward, step.backward)]
        weights, adapters, attention = (f"{n / 1e9:,.3g}" for n in both)
        lines.append(f"GFLOPs, {name}: weights {weights}, adapters {adapters}, attention {attention}")
    return lines
