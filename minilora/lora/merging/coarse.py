"""Weights in so few bits that rounding a sum back to them would lose the update: what would be left, and what to do instead."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy

from ... import backend
from ...errors import StateError
from ...stored import Stored
from .arithmetic import Update, blocks, rows_of_block, update_rows
from .mergeable import Mergeable
from .report import Sums, WeightReport

__all__ = ["refuse_coarse", "rounded_back"]

SHOWN = 5  # layers that a message names


def rounded_back(W: Any, update: Update) -> WeightReport:
    """What would become of an update that is added to a weight held in low precision, and the sum rounded to that kind again.

    Nothing is changed. Needs memory for the weight in float32, twice.
    """
    before = numpy.asarray(backend.to_host(W), dtype="float32")
    after, D, sums = numpy.empty_like(before), update_rows(update, W.shape, "float32"), Sums()
    places = list(blocks(W.shape, rows_of_block(W.shape)))
    for low, high in places:
        after[low:high] = D.onto(before[low:high], D.rows(low, high), low, high)
    held = W.like(after)
    for low, high in places:
        sums.add(before[low:high], held.rows(low, high).astype("float32", copy=False), after[low:high] - before[low:high])
    return sums.report(W.shape, W.kind, "nearest", 0.0)


def refuse_coarse(layers: Iterable[tuple[str, Mergeable]]) -> None:
    """Raise `StateError` if a weight among these is held in so few bits; with the gain that merging would leave."""
    held = [(path, layer) for path, layer in layers
            if isinstance(W := layer.weight.data, Stored) and getattr(W, "coarse", False)]
    if not held:
        return
    reports = [rounded_back(layer.weight.data, layer.stored_update())._replace(path=path) for path, layer in held[:SHOWN]]
    lines = [f"  {report.path or '(model)'}: {report.dtype}, ||D|| / ||W|| = {report.ratio:.1e}: {report.gain:.1%} of the "
             "update would be left" for report in reports]
    more = [f"  and {len(held) - SHOWN} more"] if len(held) > SHOWN else []
    raise StateError("\n".join([
        f"merge: {len(held)} layer{'s hold their weights' if len(held) > 1 else ' holds its weight'} in low precision. Rounded "
        "to it again, the sum loses the update (gain <W' - W, D> / <D, D>):", *lines, *more,
        "Leave the update beside the weight; or decode the weights first, minilora.quant.dequantize(model), and merge then: "
        "the sum is as exact as in any float32 model, and as large. Nothing was changed"]))
