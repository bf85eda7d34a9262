"""Plan: what a config would touch in a model, and what training would cost, before anything is changed or run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from ... import nn
from ...errors import ConfigError, MiniloraError
from ...hollow import Step
from ...nn.linear import check_size
from ...shown import shown
from ..adapters.injection import refuse_full
from ..adapters.inventory import Described, Inventory, Layer, Numbers, inventory, kind_of, pattern_of
from ..adapters.matching import Match, match_layers
from ..config import Config
from ..layers.adapter import Adapter, large_note
from ..layers.start import check_start
from ...tables import table
from .costs import AdapterCost, Costs, Part, Storage, adapters_of, full_costs, lora_costs
from .human import human
from .ways import PLANNED, example_for, rehearsed, step_table, ways_for

__all__ = ["Plan", "plan"]


@shown
class Plan(NamedTuple):
    """What a config would touch, and the cost beside full fine-tuning. Printed as two tables and a line for each figure.

    Attributes
    ----------
    adapters : tuple of AdapterCost
        One for each layer that would be adapted, in model order.
    lora, full : Costs
        Of training with the adapters, and of full fine-tuning.
    batch : int
        Rows N that go through each layer in one step.
    storage : Storage, or None
        Bytes of a number; None: the dtypes of the model.
    matched : Match
        What the config hits, with the layers left out and the notes.
    steps : tuple of (str, Step)
        If there was an example: what a whole step takes, by way of training, see `hollow.Step`.
    """

    adapters: tuple[AdapterCost, ...]
    lora: Costs
    full: Costs
    batch: int
    storage: Storage | None
    matched: Match
    steps: tuple[tuple[str, Step], ...] = ()

    @property
    def fewer_trained(self) -> float:
        """How many times fewer numbers are trained than in full fine-tuning."""
        return self.full.trained / self.lora.trained

    @property
    def less_memory(self) -> float:
        """How many times less memory weights, gradients and moments take than in full fine-tuning."""
        return self.full.memory / self.lora.memory

    @property
    def smaller_checkpoint(self) -> float:
        """How many times smaller the saved file is than the whole model's."""
        return self.full.checkpoint / self.lora.checkpoint

    @property
    def notes(self) -> tuple[str, ...]:
        """What deserves a look: the notes of the match, and a line for each adapter that is as large as its weight."""
        return (*self.matched.notes, *_large(self.adapters))

    def __str__(self) -> str:
        lines = [*_layer_table(self.adapters), "", *_cost_table(self), "", *_explained(self)]
        lines += [f"left out: {path}: {why}" for path, why in self.matched.excluded]
        lines += [f"trained as a whole: {path}" for path in self.matched.saved]
        lines += [f"trained rows of {path}: {', '.join(map(str, indices))}" for path, indices in self.matched.tokens]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, *(["", *step_table(self.steps)] if self.steps else [])])


def plan(model: nn.Module | Described, config: Config, *, batch: int = 1, dtype: Any = None,
         allow_unmatched: bool = False, example: Any = None, optimizer: Any = "adam") -> Plan:
    """Tell what a config would touch in a model, and what training would cost. Changes nothing, computes nothing.

    Parameters
    ----------
    model : Module, or list of tuple
        In place of a model, its parameters as (path, shape), (path, shape, count) or (path, shape, count, kind): see
        `adapters.inventory`. So a model can be planned that does not fit here.
    config : Config
    batch : int
        Rows N (samples times positions) that go through each layer in one step; for a convolution, output positions.
    dtype : dtype or Storage, optional
        How numbers are stored. By default as in the model; float32 for a list.
    allow_unmatched : bool
        As in `match`.
    example : (int, int), dict, tuple or array, optional
        With it, whole steps are rehearsed on arrays without numbers, attention, norms, loss and optimizer too: `Plan.steps`.
        (rows, length) for a model of `minilora.models`; for others the arguments of a call, of which only shapes count.
    optimizer : {"adam", "sgd"} or callable
        Of those steps.

    Returns
    -------
    Plan

    Raises
    ------
    ConfigError
        If the config and the model do not fit: see `match`. If `batch` is not an int >= 1.

    Notes
    -----
    For each layer LoRA costs 6 N r (in + out) FLOPs more than the frozen layer alone, whose dx = dy W costs 2 N in out; full
    fine-tuning forms dW = dy^T x besides, for another 2 N in out: see `gradient`. At and below the first layer, in model order,
    in which anything is trained, no dx is computed. Layers that read the same input as that one, as key and value beside the
    first query do, are counted as if they stood above it: only running the model tells them apart. DoRA's lengths cost 2 r in
    out FLOPs besides, whatever N is; of a bias and of the stretching the numbers are counted, not the FLOPs. With "pissa" and
    "olora" the products with A and B, and what they keep, are those of rank 2 r: the frozen start runs beside them. Adapters
    that a model has already count as numbers that are kept, and full fine-tuning is that of the base without them. Activation
    functions, norms, attention's own products, and products with a weight outside its own layer, as with an embedding that
    serves as output head, are left out.

    An optimizer of minilora rounds the numbers that it holds up to a multiple of 16.

    Examples
    --------
    >>> from minilora import lora
    >>> planned = plan([("W", (200, 200))], lora.Config(r=20, target_modules=["W"]))
    >>> planned.full.trained, planned.lora.trained, planned.fewer_trained
    (40000, 8000, 5.0)
    """
    check_size("batch", batch)
    storage = dtype if isinstance(dtype, Storage) or dtype is None else Storage.of(dtype)
    layers = inventory(model)
    matched = match_layers(layers, config, allow_unmatched)
    _check_starts(layers, matched)
    parts = parts_of(layers, matched)
    adapters = adapters_of(parts, config, batch)
    steps: tuple[tuple[str, Step], ...] = ()
    if example is not None:
        if not isinstance(model, nn.Module):
            raise ConfigError("plan: an example needs a model to run on it, and a list of shapes has no forward")
        given = example_for(model, example)
        steps = tuple((way.name, rehearsed(model, config, given, way, optimizer=optimizer)) for way in ways_for(model, PLANNED))
    return Plan(tuple(adapters), lora_costs(parts, adapters, config, batch, storage),
                full_costs(parts, config, batch, storage), batch, storage, matched, steps)


def _check_starts(layers: Inventory, matched: Match) -> None:
    """Raise what `inject` would: one line for every layer on which an adapter of this config cannot start."""
    config, there, problems = matched.config, {layer.path: layer for layer in layers}, []
    for target in matched.targets:
        layer = there[target.path]
        assert layer.weight is not None
        out, *more = layer.weight.shape
        try:
            refuse_full(target.module)
            check_start(target.r, (out, math.prod(more)), layer.groups, table=layer.kind == "Embedding",
                        init_lora_weights=config.init_lora_weights, use_dora=config.use_dora, lora_bias=config.lora_bias)
        except MiniloraError as error:
            problems.append(f"{target.path or '(model)'}: {error}")
    if problems:
        raise ConfigError("\n  ".join([f"plan: {len(problems)} layers cannot be adapted so:" if len(problems) > 1 else
                                       "plan: a layer cannot be adapted so:", *problems]))


def parts_of(layers: Inventory, matched: Match) -> list[Part]:
    """The layers as a config sees them. What other adapters have is listed without products: it is kept, and not in use."""
    targets = {target.path: target for target in matched.targets}
    bias, parts, above, rows = matched.config.bias, [], False, dict(matched.tokens)
    for layer in layers:
        whole = layer.whole.path if layer.whole else None  # listed itself, as a wrapper; then its `original` and `copies`
        home = whole if whole is not None and layer.path == f"{whole}.original" else layer.path  # what a config calls it
        foreign = isinstance(layer.module, Adapter) or (
            whole is not None and not layer.kind and _within(layer.path, f"{whole}.copies"))
        idle = foreign or layer.path == whole
        target = None if idle else targets.get(home)
        saved = not idle and any(_within(home, name) for name in matched.saved)
        in_place = not idle and not saved and (bias == "all" or (bias == "lora_only" and target is not None))
        biases = tuple(p for p in layer.parameters if in_place and p.name == "bias")
        if idle:
            layer = layer._replace(weight=None)
        elif layer.weight is not None and layer.module is not None:
            layer = layer._replace(kind=kind_of(layer.module))  # that of what is inside a wrapper is empty
        copied = _copied(layer, layers) if layer.path in matched.saved else ()
        if home in rows and not idle and layer.weight is not None:
            copied = (Numbers("rows", (len(rows[home]), layer.weight.shape[1]), max(layer.weight.itemsize, 4)),)
        parts.append(Part(layer, target, saved, copied, biases, above, not foreign))
        above = above or target is not None or bool(biases or copied) or (saved and bool(layer.parameters or layer.weight))
    return parts


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _copied(layer: Layer, layers: Inventory) -> tuple[Numbers, ...]:
    """The numbers of a copy of this module: also of parameters that the original shares with others."""
    if layer.module is not None:
        return tuple(Numbers(name, p.shape, p.dtype.itemsize) for name, p in layer.module.named_parameters())
    return tuple(p for inner in layers if _within(inner.path, layer.path) for p in inner.parameters)


def _large(adapters: Iterable[AdapterCost]) -> list[str]:
    """Notes on adapters with at least as many numbers as the weight that they adapt; `inject` has the same."""
    return [note for adapter in adapters
            for note in large_note(adapter.target.path, adapter.target.r, adapter.a + adapter.b, math.prod(adapter.shape))]


def _layer_table(adapters: Iterable[AdapterCost]) -> list[str]:
    """A line for each group of corresponding layers that are adapted alike."""
    groups: dict[tuple[Any, ...], list[AdapterCost]] = {}
    for adapter in adapters:
        t = adapter.target
        alike = pattern_of(t.path), t.kind, adapter.shape, t.r, t.lora_alpha, t.scaling, adapter.trained
        groups.setdefault(alike, []).append(adapter)
    cells = [("layer", "type", "weight", "count", "r", "lora_alpha", "s", "trained", "of weight")]
    for (path, kind, shape, r, lora_alpha, s, trained), members in groups.items():
        cells.append((members[0].target.path if len(members) == 1 else path, kind, str(shape), str(len(members)), str(r),
                      f"{lora_alpha:g}", f"{s:g}", f"{trained * len(members):,}", f"{trained / math.prod(shape):.2%}"))
    return table(cells, left=(0, 1, 2))


def _cost_table(p: Plan) -> list[str]:
    cells = [("", "LoRA", "full", "full / LoRA")]
    rows = [("trained numbers", "trained", _count), ("all numbers", "total", _count), ("weights", "weights", human),
            ("gradients", "gradients", human), ("Adam's m and v", "moments", human), ("sum of the three", "memory", human),
            ("kept for backward", "activations", human), ("checkpoint", "checkpoint", human),
            ("forward FLOPs", "forward", _count), ("backward FLOPs", "backward", _count)]
    for title, name, text in rows:
        mine, full = getattr(p.lora, name), getattr(p.full, name)
        cells.append((title, text(mine), text(full), f"{full / mine:,.2f}" if mine else "-"))
    return table(cells, left=(0,))


def _count(n: int) -> str:
    return f"{n:,}"


def _explained(p: Plan) -> list[str]:
    """A line for each figure: what was counted."""
    lora, full, storage = p.lora, p.full, p.storage
    if storage is None:
        sizes = "numbers are stored as in the model, adapters as the weight beside them"
    else:
        sizes = "bytes a number: " + ", ".join(f"{name} {value:g}" for name, value in storage._asdict().items())
    whole = lora.trained - sum(adapter.trained for adapter in p.adapters)
    beside = f", and {whole:,} in biases and whole modules" if whole else ""
    config, start = p.matched.config, sum(adapter.start for adapter in p.adapters)
    kept = "N (in + " + ("2 r" if start else "r") + (" + out" if config.use_dora else "") + ")"
    saved = f"and the {start:,} of the frozen start" if start else "alone"
    return [
        sizes,
        f"trained: r (in + out) numbers for each adapted layer{beside}; {p.fewer_trained:,.1f} x fewer than all "
        f"({1 - 1 / p.fewer_trained:.4%} saved)",
        f"memory: every weight, and a gradient and two moments for what is trained; {p.less_memory:.2f} x less",
        f"kept: {kept} numbers for each adapted layer, N in for each layer in full fine-tuning; N = {p.batch:,}",
        f"checkpoint: the trained numbers {saved}; {p.smaller_checkpoint:,.1f} x smaller",
        "FLOPs: 2 N in out for each product with a weight; full fine-tuning forms dW beside dx, LoRA adds 6 N r (in + out) "
        f"instead; {(full.forward + full.backward) / (lora.forward + lora.backward):.2f} x less",
    ]
