"""An adapter of lower ranks: each layer's SVD, cut, with the error that this costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from ...errors import ConfigError, MiniloraError
from ...lora.algebra.compress import check_target, recompress
from ..adapters.peft.ranks import with_ranks
from ..adapters.saved import SavedAdapter, Update
from ..adapters.scalings import float_dtype, kept
from .bases import base_of, check_linear, head_again, without_head
from .matrices import blocks_of, of_a_group, stored, touched
from .outcome import Outcome, Row, numbers_in

__all__ = ["resize"]


def resize(adapter: SavedAdapter, rank: int | None = None, energy: float | None = None, *, tolerance: float | None = None,
           dtype: Any = None, name: str = "adapter", advance: Callable[[], None] | None = None) -> Outcome:
    """The nearest adapter of lower ranks: of every layer the largest singular values of D.

    Parameters
    ----------
    adapter : SavedAdapter
    rank : int, optional
        At most this rank. It wins over the other two.
    energy : float in (0, 1], optional
        Keep at least this part of ||D||_F^2 of each layer; 1 keeps the rank that D has.
    tolerance : float in [0, 1), optional
        Lose at most this part of ||D||_F of each layer.
    dtype : optional
        Of A and B; as they are by default.
    name : str
        What to call the adapter in messages.
    advance : callable, optional
        Called after each layer.

    Returns
    -------
    Outcome
        A layer whose rank would not fall keeps its bits. The same numbers give the same bits. Saved modules, biases and rows
        stay.

    Raises
    ------
    FormatError
        For DoRA and for starts that moved the base.
    ConfigError
        For no target, or one outside its range.

    Notes
    -----
    By Eckart, Young and Mirsky no update of that rank is nearer. O((out + in) r^2) a layer; D is never formed. In a
    convolution with groups each group keeps rank / groups.

    Examples
    --------
    >>> import numpy
    >>> from minilora import lora
    >>> update = Update("linear", numpy.diag([4.0, 3.0]), numpy.eye(2), 1.0)
    >>> adapter = SavedAdapter({"fc": update}, lora.Config(r=2, lora_alpha=2, target_modules=["fc"]))
    >>> print(resize(adapter, rank=1))
    resize of adapter to rank 1
    layer  rank        |D|   error  energy kept
    -------------------------------------------
    fc        2  -> 1    5  60.00%     0.640000
    1 layer, rank 1, 8 -> 4 numbers; error 60.000% at most
    """
    if rank is None and energy is None and tolerance is None:
        raise ConfigError("resize: give rank, energy or tolerance: how far to go")
    check_target(rank, energy, tolerance)
    check_linear([adapter], [name], "resize")
    updates, pair = without_head(adapter)
    rows, made = [], {}
    for path, update in updates.items():
        try:
            made[path], norm, error = _layer(update, rank, energy, tolerance, dtype)
        except MiniloraError as error_here:
            error_here.path = error_here.path or path
            raise
        rows.append(Row(path, update.kind, (update.r,), made[path].r, norm, error))
        if advance:
            advance()
    changed = head_again(made, pair)
    made = {path: changed[path] for path in adapter.updates}
    config = with_ranks(dataclasses.replace(adapter.config, use_rslora=False, init_lora_weights=True), made)
    base = base_of([adapter], [name], False)
    metadata = {**kept(adapter.metadata, {}), **base.metadata(made)}
    given = {"rank": rank, "energy": energy, "tolerance": tolerance}
    target = ", ".join(f"{word} {value:g}" for word, value in given.items() if value is not None)
    small = dataclasses.replace(adapter, updates=made, config=config, metadata=metadata)
    return Outcome(small, tuple(rows), f"resize of {name} to {target}", numbers_in(adapter), adapter.notes)


def _layer(update: Update, rank: int | None, energy: float | None, tolerance: float | None,
           dtype: Any) -> tuple[Update, float, float]:
    """One layer: its update, ||D||_F, and how far the update is from D at most."""
    blocks = blocks_of(update)
    done = [recompress(block, r=of_a_group(rank, len(blocks)), energy=energy, tolerance=tolerance) for block in blocks]
    norm, kind = math.hypot(*(c.norm for c in done)), update.A.dtype if dtype is None else float_dtype(dtype)
    lower = max(c.update.r for c in done) < blocks[0].r
    if not lower and kind == update.A.dtype:
        return update, norm, 0.0
    small, moved = stored([c.update for c in done] if lower else blocks, update, kind, touched([blocks]))
    error = math.hypot(*(c.error for c in done)) if lower else 0.0
    bias = None if update.bias is None else \
        (update.bias.astype("float64") * (update.s / small.s)).astype(kind)
    return dataclasses.replace(small, bias=bias), norm, error + moved
