"""Merging and unmerging the layers of a model: all of them or none.

Everything is computed before anything changes: every sum, the check that it is finite, every gain, every copy to the device.
Then the arrays are exchanged. So while it works, a merge needs a second array for every weight that it merges; afterwards a
merged layer holds W', the way back (mostly less than 1 bit for each weight: table in `merging`), and A and B as they were,
r (in + out) numbers, so that the update may be trained or loaded further without losing the way back. W itself is let go. If
somebody else still holds its array, as a base layer does that was adapted, or an optimizer, unmerging gives back that very
array, provided that its bits are still those; so no copy appears that was shared before.

The arithmetic is the host's on every device: a device weight is copied to the host and the result back, in merging and in
unmerging. That makes one rule and one result for both, bit for bit, and the memory of a GPU, the scarcer one, holds no second
W. Merging is rare; a copy of 64 MB takes some milliseconds.

A merged weight must stay as it is until it is unmerged, since W is computed from it. On the host it is therefore read-only; on
a GPU, which has no such mark, `unmerge` finds a change by its SHA-256 and refuses.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy

from .. import backend, nn
from ..errors import DTypeError, MiniloraError, StateError
from .merge_report import MergeReport
from .merging import Correction, digest, merge_weight, unmerge_weight
from .rounding import check_rounding

__all__ = ["WayBack", "merge", "unmerge"]

Array = Any


class WayBack:
    """What a merged layer holds to become unmerged: W', the correction, and the update as it was merged."""

    __slots__ = ("correction", "merged", "original", "update")

    def __init__(self, merged: Array, correction: Correction, update: tuple[numpy.ndarray, numpy.ndarray, float],
                 original: Array | None = None) -> None:
        self.merged, self.correction, self.update = merged, correction, update
        self.original: Callable[[], Any] = (lambda: None) if original is None else weakref.ref(original)
        if isinstance(merged, numpy.ndarray):
            merged.flags.writeable = False

    def restore(self) -> Array:
        """W, bit for bit: the array itself if it still exists unchanged, else a new one."""
        original = self.original()
        if original is not None and digest(backend.to_host(original)) == self.correction.original:
            return original
        weight = unmerge_weight(backend.to_host(self.merged), self.update, self.correction)
        return backend.to_device(weight, backend.device_of(self.merged))

    def __reduce__(self) -> Any:
        return WayBack, (self.merged, self.correction, self.update)  # a weak reference is neither copied nor pickled


def merge(model: nn.Module, *, rounding: str = "nearest", seed: int = 0, allow_lossy: bool = False) -> MergeReport:
    """W <- W + D in every LoRA layer of a model: all of them or none. `unmerge` gives the original bits back.

    Parameters
    ----------
    model : nn.Module
        A model, or one LoRA layer.
    rounding : {"nearest", "stochastic"}
        How the sum is rounded to float16. Stochastic rounding keeps, on average, updates that rounding to nearest swallows.
    seed : int
        In [0, 2^64). What stochastic rounding makes is a function of the seed, of the layer's place among the LoRA layers of
        the model, and of W, A, B and s.
    allow_lossy : bool
        Merge although the gain of a layer is outside [0.9, 1.1].

    Returns
    -------
    MergeReport
        One row for each layer; prints as a table.

    Raises
    ------
    StateError
        If a layer is merged already, its merged weight would hold NaN or inf, or the gain is too far from 1; or if there is no
        LoRA layer. All layers concerned are named, and nothing has changed.
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
    def prepare(i: int, layer: Any) -> Any:
        A, B = (numpy.array(backend.to_host(p.data)) for p in (layer.lora_A, layer.lora_B))  # as they are now
        weight, update = layer.weight.data, (A, B, layer.scaling)
        done = merge_weight(backend.to_host(weight), update, rounding=rounding, seed=seed, stream=i,
                            allow_lossy=allow_lossy)
        merged = backend.to_device(done.weight, backend.device_of(weight))
        return WayBack(merged, done.correction, update, weight), done.report

    check_rounding(rounding, seed)
    layers = _lora_layers(model, "merge")
    _refuse("merge", [(path, StateError("merge: this layer is merged already; merging twice would add the update twice. "
                                        "Call unmerge() first")) for path, layer in layers if layer.merged])
    _refuse_shared(layers)
    prepared = _all("merge", layers, prepare)
    for (_, layer), (way_back, _) in zip(layers, prepared):  # nothing can fail from here on
        layer.weight.data, layer.way_back = way_back.merged, way_back
    return MergeReport(tuple(report._replace(path=path) for (path, _), (_, report) in zip(layers, prepared)))


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
    layers = _lora_layers(model, "unmerge")
    _refuse("unmerge", [(path, StateError("unmerge: this layer is not merged. Call merge() first"))
                        for path, layer in layers if not layer.merged])
    restored = _all("unmerge", layers, lambda i, layer: layer.way_back.restore())
    for (_, layer), weight in zip(layers, restored):  # nothing can fail from here on
        layer.weight.data, layer.way_back = weight, None


def _lora_layers(model: nn.Module, what: str) -> list[tuple[str, Any]]:
    """The layers that can be merged, each once, with their paths."""
    if not isinstance(model, nn.Module):
        raise DTypeError(f"{what}: expected a model or a layer, got {type(model).__name__}")
    found: dict[int, tuple[str, Any]] = {}
    for path, module in model.named_modules():
        if hasattr(module, "way_back"):
            found.setdefault(id(module), (path, module))
    if not found:
        raise StateError(f"{what}: there is no LoRA layer in this {type(model).__name__}: make one with lora.adapt")
    return list(found.values())


def _refuse_shared(layers: list[tuple[str, Any]]) -> None:
    owner: dict[int, str] = {}
    for path, layer in layers:
        first = owner.setdefault(id(layer.weight), path)
        if first != path:
            raise StateError(f"merge: {first!r} and {path!r} share one weight: merged, it would hold both updates and be wrong "
                             "for each. Give one of them a Parameter of its own. Nothing was changed")


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
