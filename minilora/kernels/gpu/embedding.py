"""GPU: sums over the rows that have one id, planned and added up on the device with one kernel each. The text is embedding.cu.

Nothing here depends on which ids there are, but for what is read: the arrays and launches are those that the number of ids
asks for. So a step whose tables are trained waits for nothing, ids may lie on the device, and it can be recorded
(`minilora.record`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from ... import backend
from ...backend import device_of, override
from ...ops.embedding import moved, plan_sums, planned, reference_sums
from ..launch import by_block, by_row, contiguous, has_kernel

__all__ = ["planned_on_the_device"]

Array = Any

THREADS = 256
DOUBLE = numpy.dtype("float64")  # counts exactly up to 2^53


@override(planned, device="gpu")
def planned_on_the_device(ids: Array, placed: Array, without: int | None = None) -> tuple[list[Array], Callable[..., None]]:
    """`planned` with 2 n integers beside the ids: the order, and how many rows an id has, at the place of its first one."""
    xp, n = device_of(placed).xp, placed.size
    (flat,) = contiguous(xp, placed.reshape(-1))
    order, lengths = xp.empty(n, dtype="int64"), xp.empty(n, dtype="int64")
    by_row("order_by_id", n, n, DOUBLE, flat, order, lengths, text="embedding")
    return [flat, order, lengths], functools.partial(add_up, without=without)


def add_up(out: Array, dy: Array, plan: Sequence[Array], without: int | None) -> None:
    ids, order, lengths = plan
    V, D = out.shape
    if not out.size or not dy.size:
        return
    if not has_kernel(out, dy):  # complex numbers, say: planned on the host
        on_host = plan_sums(backend.to_host(ids), without)
        reference_sums(out, dy, moved(on_host, device_of(out)).arrays())
        return
    xp = device_of(out).xp
    (dy,) = contiguous(xp, dy)
    columns = not out.flags.c_contiguous and out.T.flags.c_contiguous
    base = out.T if columns else xp.ascontiguousarray(out)  # itself, as a rule
    by_block("embedding", "sums_by_id", len(ids) * -(-D // 32), THREADS, dy.dtype, dy, ids, order, lengths, base,
             -1 if without is None else without, V, *((1, V) if columns else (D, 1)), len(ids), D)
    if not columns and base is not out:
        out[...] = base
