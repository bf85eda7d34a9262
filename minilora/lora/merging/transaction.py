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

Since arrays are exchanged and none is written, a graph that was made before a merge, or before an unmerge, still has the weight
that it was computed with, and its backward pass is right: no `Parameter.version` is counted.

A merged weight must stay as it is until it is unmerged, since W is computed from it. On the host it is therefore read-only; on
a GPU, which has no such mark, `unmerge` finds a change by its SHA-256 and refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ... import backend, nn
from ...errors import MiniloraError, StateError
from ..undo import all_or_nothing
from .coarse import refuse_coarse
from .holding import held_like, numbers_of
from .mergeable import Mergeable
from .report import MergeReport
from .rounding import check_rounding
from .way_back import WayBack
from .weight import changed, digest, merge_weight, unmerge_weight

__all__ = ["merge_layers", "unmerge_layers"]

Array = Any


def merge_layers(model: nn.Module, layers: Mapping[str, Mergeable], *, rounding: str = "nearest", seed: int = 0,
                 allow_lossy: bool = False, beside: Sequence[Callable[[], None]] = ()) -> MergeReport:
    """W <- W + D in these layers of a model: all of them or none. `unmerge_layers` gives the original bits back.

    Parameters
    ----------
    model : Module
        Where other modules might share what is merged; for one layer the layer itself.
    layers : mapping of str to Mergeable
        By path. Those without an update are left alone.
    rounding, seed, allow_lossy
        As in `lora.merge`.
    beside : sequence of callable
        Exchanges of other parts of the model, which happen with those of the weights or not at all.

    Raises
    ------
    StateError, ConfigError
        As in `lora.merge`. Nothing has changed then.
    """
    def prepare(i: int, layer: Mergeable) -> WayBack:
        weight, update = layer.weight.data, layer.stored_update()
        done = merge_weight(layer.matrix(numbers_of(weight)), update, rounding=rounding, seed=seed, stream=i,
                            allow_lossy=allow_lossy)
        bias = layer.updated_bias()
        merged = held_like(weight, done.weight)
        biases = None if bias is None or layer.bias is None else (layer.bias.data, bias)
        return WayBack(merged, done.correction, update, done.report._replace(path=paths[i]), biases, weight)

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
    refuse_coarse(changing)
    paths = [path for path, _ in changing]
    prepared = _all("merge", changing, prepare)

    def exchange() -> None:
        for (_, layer), way_back in zip(changing, prepared):
            layer.weight.data, layer.way_back = way_back.merged, way_back
            if way_back.bias is not None and layer.bias is not None:
                layer.bias.data = way_back.bias[1]
        for change in beside:
            change()

    all_or_nothing(exchange, [model] if beside else layers.values())
    return MergeReport(tuple(way_back.report for way_back in prepared))


def unmerge_layers(layers: Mapping[str, Mergeable], model: nn.Module | None = None,
                   beside: Sequence[Callable[[], None]] = ()) -> None:
    """Put the original weights back in those of these layers that are merged, bit for bit: in all of them or none.

    Parameters
    ----------
    layers : mapping of str to Mergeable
    model, beside
        As in `merge_layers`, if there is more to exchange.

    Raises
    ------
    StateError
        As in `lora.unmerge`. Nothing has changed then.
    """
    merged = [(path, layer, layer.way_back) for path, layer in layers.items() if layer.way_back is not None]
    if not merged:
        raise StateError(f"unmerge: {'this layer is not' if len(layers) == 1 else 'no layer is'} merged. Call merge() first")
    restored = _all("unmerge", [(path, (layer, way_back)) for path, layer, way_back in merged],
                    lambda i, pair: _restored(*pair))

    def exchange() -> None:
        for (_, layer, way_back), weight in zip(merged, restored):
            if way_back.bias is not None and layer.bias is not None:
                layer.bias.data = way_back.bias[0]
            layer.weight.data, layer.way_back = weight, None
        for change in beside:
            change()

    all_or_nothing(exchange, layers.values() if model is None else [model])


def _restored(layer: Mergeable, way_back: WayBack) -> Array:
    """W, bit for bit: the array itself if it still exists unchanged, else a new one.

    Raises
    ------
    StateError
        If the weight or the bias was trained or written to since: that would be lost.
    """
    if way_back.bias is not None and layer.bias is not None:
        now, merged = (backend.to_host(b) for b in (layer.bias.data, way_back.bias[1]))
        if now.tobytes() != merged.tobytes():
            raise changed("bias")
    data, original = layer.weight.data, way_back.original()
    matrix = layer.matrix(numbers_of(data))
    if original is not None and digest(layer.matrix(numbers_of(original))) == way_back.correction.original:
        if digest(matrix) != way_back.correction.merged:
            raise changed("weight")
        return original
    return held_like(data, unmerge_weight(matrix, way_back.update, way_back.correction))


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
    """Raise what is wrong. Leaves no error in the list: its traceback leads to the frames that hold the list, and the model."""
    if len(problems) == 1:
        path, error = problems.pop()
        error.path = path
        try:
            raise error
        finally:
            del error
    if problems:
        lines = [f"  {path}: {error}" for path, error in problems]
        problems.clear()
        raise StateError("\n".join([f"{what}: {len(lines)} layers cannot be done; nothing was changed:", *lines]))
