"""Merging and unmerging layers: all of them or none.

Everything is computed before anything changes: every sum, the check that it is finite, every gain, every copy to the device.
Then the arrays are exchanged. So while it works, a merge needs a second array for every weight that it merges; afterwards a
merged layer holds W', the way back (mostly less than 1 bit for each weight: table in `weight`), and A and B as they were,
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
from collections.abc import Callable, Mapping
from typing import Any

import numpy

from ... import backend, nn
from ...errors import MiniloraError, StateError
from .mergeable import Mergeable, Update
from .report import MergeReport, WeightReport
from .rounding import check_rounding
from .weight import Correction, digest, merge_weight, unmerge_weight

__all__ = ["WayBack", "merge_layers", "unmerge_layers"]

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

    def restore(self, layer: Mergeable) -> Array:
        """W, bit for bit: the array itself if it still exists unchanged, else a new one."""
        original = self.original()
        if original is not None and digest(layer.matrix(backend.to_host(original))) == self.correction.original:
            return original
        weight = unmerge_weight(layer.matrix(backend.to_host(self.merged)), self.update, self.correction)
        return backend.to_device(weight.reshape(self.merged.shape), backend.device_of(self.merged))

    def __reduce__(self) -> Any:
        return WayBack, (self.merged, self.correction, self.update, self.bias)  # a weak reference is neither copied nor pickled


def merge_layers(model: nn.Module, layers: Mapping[str, Mergeable], *, rounding: str = "nearest", seed: int = 0,
                 allow_lossy: bool = False) -> MergeReport:
    """W <- W + D in these layers of a model: all of them or none. `unmerge_layers` gives the original bits back.

    Parameters
    ----------
    model : Module
        Where other modules might share what is merged; for one layer the layer itself.
    layers : mapping of str to Mergeable
        By path. Those without an update are left alone.
    rounding, seed, allow_lossy
        As in `lora.merge`.

    Raises
    ------
    StateError, ConfigError
        As in `lora.merge`. Nothing has changed then.
    """
    def prepare(i: int, layer: Mergeable) -> tuple[WayBack, Array | None, WeightReport]:
        weight, update = layer.weight.data, layer.stored_update()
        done = merge_weight(layer.matrix(backend.to_host(weight)), update, rounding=rounding, seed=seed, stream=i,
                            allow_lossy=allow_lossy)
        bias = layer.updated_bias()
        merged = backend.to_device(done.weight.reshape(weight.shape), backend.device_of(weight))
        if isinstance(bias, numpy.ndarray):
            bias.flags.writeable = False  # what is written to it while merged would be lost
        before = None if bias is None or layer.bias is None else layer.bias.data
        return WayBack(merged, done.correction, update, before, weight), bias, done.report

    check_rounding(rounding, seed)
    if any(layer.running for layer in layers.values()):
        raise StateError("merge: not within lora.disabled or lora.mixed: leave the with block first")
    _refuse("merge", [(path, StateError("merge: this layer is merged already; merging twice would add the update twice. "
                                        "Call unmerge() first"))
                      for path, layer in layers.items() if layer.way_back is not None])
    changing = [(path, layer) for path, layer in layers.items() if layer.has_update]
    if not changing:
        raise StateError("merge: no adapter is active: lora.activate(model, name) first")
    _refuse_shared(model, changing)
    prepared = _all("merge", changing, prepare)
    for (_, layer), (way_back, bias, _) in zip(changing, prepared):  # nothing can fail from here on
        layer.weight.data, layer.way_back = way_back.merged, way_back
        if bias is not None and layer.bias is not None:
            layer.bias.data = bias
    return MergeReport(tuple(report._replace(path=path) for (path, _), (_, _, report) in zip(changing, prepared)))


def unmerge_layers(layers: Mapping[str, Mergeable]) -> None:
    """Put the original weights back in these layers, bit for bit: all of them or none.

    Raises
    ------
    StateError
        As in `lora.unmerge`. Nothing has changed then.
    """
    _refuse("unmerge", [(path, StateError("unmerge: this layer is not merged. Call merge() first"))
                        for path, layer in layers.items() if layer.has_update and layer.way_back is None])
    merged = [(path, layer, layer.way_back) for path, layer in layers.items() if layer.way_back is not None]
    if not merged:
        raise StateError("unmerge: no layer is merged. Call merge() first")
    restored = _all("unmerge", [(path, (layer, way_back)) for path, layer, way_back in merged],
                    lambda i, pair: pair[1].restore(pair[0]))
    for (_, layer, way_back), weight in zip(merged, restored):  # nothing can fail from here on
        if way_back.bias is not None and layer.bias is not None:
            layer.bias.data = way_back.bias
        layer.weight.data, layer.way_back = weight, None


def _refuse_shared(model: nn.Module, layers: list[tuple[str, Mergeable]]) -> None:
    """A Parameter that two modules share would be merged for both, whichever of them has the adapter."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for _, p in module.own_parameters():
            owners.setdefault(id(p), []).append((path, module))
    problems: list[tuple[str, MiniloraError]] = []
    for path, layer in layers:
        for name in ("weight", "bias") if layer.changes_bias() else ("weight",):
            others = [other for other, module in owners.get(id(getattr(layer, name)), []) if id(module) != id(layer)]
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
