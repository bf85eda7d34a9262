"""Merging and unmerging the layers of a model: all of them or none.

Everything is computed before anything changes: every sum, the check that it is finite, every gain, every copy to the device.
Then the arrays are exchanged. So while it works, a merge needs a second array for every weight that it merges; afterwards a
merged layer holds W', the way back (mostly less than 1 bit for each weight: table in `merging`), and A and B as they were,
r (in + out) numbers, so that the update may be trained or loaded further without losing the way back. W itself is let go. If
somebody else still holds its array, as a base layer does that was adapted, or an optimizer, unmerging gives back that very
array, provided that its bits are still those; so no copy appears that was shared before.

The arithmetic is the host's on every device: a device weight is copied to the host and the result back, in merging and in
unmerging. That makes one rule and one result for both, bit for bit (but for DoRA's m / c, which is the device's), and the
memory of a GPU, the scarcer one, holds no second W. Merging is rare; a copy of 64 MB takes some milliseconds.

A merged weight must stay as it is until it is unmerged, since W is computed from it. On the host it is therefore read-only; on
a GPU, which has no such mark, `unmerge` finds a change by its SHA-256 and refuses.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy

from .. import backend, nn
from ..errors import DTypeError, MiniloraError, StateError
from .adapted import layers_of
from .merge_report import MergeReport, WeightReport
from .merge_update import Update, merged_bias, update_of
from .merging import Correction, digest, merge_weight, unmerge_weight
from .rounding import check_rounding
from .switching import refuse_running

if TYPE_CHECKING:
    from .adapted import AdaptedLayer

__all__ = ["WayBack", "merge", "unmerge"]

Array = Any


class WayBack:
    """What a merged layer holds to become unmerged: W', the correction, the update as it was merged, and the bias before."""

    __slots__ = ("bias", "correction", "merged", "original", "update")

    def __init__(self, merged: Array, correction: Correction, update: Update, bias: Array | None = None,
                 original: Array | None = None) -> None:
        self.merged, self.correction, self.update, self.bias = merged, correction, update, bias
        self.original: Callable[[], Any] = (lambda: None) if original is None else weakref.ref(original)
        if isinstance(merged, numpy.ndarray):
            merged.flags.writeable = False

    def restore(self, layer: AdaptedLayer) -> Array:
        """W, bit for bit: the array itself if it still exists unchanged, else a new one."""
        original = self.original()
        if original is not None and digest(layer.matrix(backend.to_host(original))) == self.correction.original:
            return original
        weight = unmerge_weight(layer.matrix(backend.to_host(self.merged)), self.update, self.correction)
        return backend.to_device(weight.reshape(self.merged.shape), backend.device_of(self.merged))

    def __reduce__(self) -> Any:
        return WayBack, (self.merged, self.correction, self.update, self.bias)  # a weak reference is neither copied nor pickled


def merge(model: nn.Module, *, rounding: str = "nearest", seed: int = 0, allow_lossy: bool = False) -> MergeReport:
    """W <- W + D in every LoRA layer of a model: all of them or none. `unmerge` gives the original bits back.

    D is the update of the active adapters, each times its weight; with DoRA W' = kappa W + D, see `merge_update`. Layers
    without an active adapter are left alone.

    Parameters
    ----------
    model : nn.Module
        A model, or one LoRA layer.
    rounding : {"nearest", "stochastic"}
        How the sum is rounded to float16. Stochastic rounding keeps, on average, updates that rounding to nearest swallows.
    seed : int
        In [0, 2^64). What stochastic rounding makes is a function of the seed, of the layer's place among those that are
        merged, and of W, A, B and s.
    allow_lossy : bool
        Merge although the gain of a layer is outside [0.9, 1.1].

    Returns
    -------
    MergeReport
        One row for each layer; prints as a table.

    Raises
    ------
    StateError
        If a layer is merged already, shares what would be merged with another module, would hold NaN or inf, or has a gain too
        far from 1; or if there is no LoRA layer. All layers concerned are named, and nothing has changed.
    ConfigError
        If `rounding` or `seed` is not one of the values above.

    Notes
    -----
    Works on the host: on a GPU the weights are copied there and back (sync points). Takes a second array of each merged weight
    while it works; what stays afterwards is told at the top of this file. Not to be confused with train() and eval(), which
    never merge.

    Examples
    --------
    >>> import minilora
    >>> model = minilora.nn.Sequential(minilora.lora.Linear(4, 4, r=2, rng=0), minilora.lora.Linear(4, 2, r=2, rng=1))
    >>> report = minilora.lora.merge(model)
    >>> [(row.path, row.gain) for row in report.rows]
    [('0', 1.0), ('1', 1.0)]
    >>> minilora.lora.unmerge(model)
    """
    def prepare(i: int, layer: AdaptedLayer) -> tuple[WayBack, Array | None, WeightReport]:
        weight, update = layer.weight.data, update_of(layer)
        done = merge_weight(layer.matrix(backend.to_host(weight)), update, rounding=rounding, seed=seed, stream=i,
                            allow_lossy=allow_lossy)
        bias = merged_bias(layer)
        merged = backend.to_device(done.weight.reshape(weight.shape), backend.device_of(weight))
        if isinstance(bias, numpy.ndarray):
            bias.flags.writeable = False  # what is written to it while merged would be lost
        before = None if bias is None or layer.bias is None else layer.bias.data
        return WayBack(merged, done.correction, update, before, weight), bias, done.report

    check_rounding(rounding, seed)
    layers = _lora_layers(model, "merge")
    refuse_running(model, "merge")
    _refuse("merge", [(path, StateError("merge: this layer is merged already; merging twice would add the update twice. "
                                        "Call unmerge() first")) for path, layer in layers if layer.merged])
    layers = [(path, layer) for path, layer in layers if layer.active]
    if not layers:
        raise StateError("merge: no adapter is active: lora.activate(model, name) first")
    _refuse_shared(model, layers)
    prepared = _all("merge", layers, prepare)
    for (_, layer), (way_back, bias, _) in zip(layers, prepared):  # nothing can fail from here on
        layer.weight.data, layer.way_back = way_back.merged, way_back
        if bias is not None:
            layer.bias.data = bias
    return MergeReport(tuple(report._replace(path=path) for (path, _), (_, _, report) in zip(layers, prepared)))


def unmerge(model: nn.Module) -> None:
    """Put the original weights back in every LoRA layer of a model, bit for bit: all of them or none.

    Raises
    ------
    StateError
        If a layer is not merged, or a merged weight was changed since; or if there is no LoRA layer. All layers concerned are
        named, and nothing has changed.

    Notes
    -----
    Works on the host, like `merge`; needs a second array of each weight while it works.
    """
    found = _lora_layers(model, "unmerge")
    layers = [(path, layer) for path, layer in found if layer.merged]
    _refuse("unmerge", [(path, StateError("unmerge: this layer is not merged. Call merge() first"))
                        for path, layer in found if layer.active and not layer.merged])
    if not layers:
        raise StateError("unmerge: no layer is merged. Call merge() first")
    restored = _all("unmerge", layers, lambda i, layer: layer.way_back.restore(layer))
    for (_, layer), weight in zip(layers, restored):  # nothing can fail from here on
        if layer.way_back.bias is not None:
            layer.bias.data = layer.way_back.bias
        layer.weight.data, layer.way_back = weight, None


def _lora_layers(model: nn.Module, what: str) -> list[tuple[str, Any]]:
    """The layers that can be merged, each once, with their paths."""
    if not isinstance(model, nn.Module):
        raise DTypeError(f"{what}: expected a model or a layer, got {type(model).__name__}")
    found = layers_of(model)
    if not found:
        raise StateError(f"{what}: there is no LoRA layer in this {type(model).__name__}: make one with lora.adapt, or put "
                         "them in with lora.inject")
    return list(found.items())


def _refuse_shared(model: nn.Module, layers: list[tuple[str, AdaptedLayer]]) -> None:
    """A Parameter that two modules share would be merged for both, whichever of them has the adapter."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for _, p in module.own_parameters():
            owners.setdefault(id(p), []).append((path, module))
    problems: list[tuple[str, MiniloraError]] = []
    for path, layer in layers:
        takes_bias = any(layer.bias_update(layer.adapters[name]) is not None for name in layer.active)
        for name in ("weight", "bias") if takes_bias else ("weight",):
            others = [other for other, module in owners.get(id(getattr(layer, name)), []) if module is not layer]
            if others:
                problems.append((path, StateError(
                    f"merge: {path!r} and {others[0]!r} share one {name}: merged, it would hold the update for both and be "
                    "wrong for one. Give one of them a Parameter of its own. Nothing was changed")))
    _refuse("merge", problems)


def _all(what: str, layers: list[tuple[str, Any]], compute: Callable[[int, Any], Any]) -> list[Any]:
    """What `compute` gives for every layer; or one error that names every layer for which it fails."""
    done: list[Any] = []
    problems: list[tuple[str, MiniloraError]] = []
    for i, (path, layer) in enumerate(layers):
        try:
            result = compute(i, layer)
        except MiniloraError as error:
            problems.append((path, error))
            done.clear()  # it will not be used: let the arrays go
        else:
            if not problems:
                done.append(result)
    _refuse(what, problems)
    return done


def _refuse(what: str, problems: list[tuple[str, MiniloraError]]) -> None:
    if len(problems) == 1:
        path, error = problems[0]
        error.path = path
        raise error
    if problems:
        lines = "\n".join(f"  {path}: {error}" for path, error in problems)
        raise StateError(f"{what}: {len(problems)} layers cannot be done; nothing was changed:\n{lines}")
