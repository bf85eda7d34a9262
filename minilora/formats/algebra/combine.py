"""Several adapters into one, layer by layer, on D and never on A and B apart.

A layer that an adapter lacks is an update of 0 there: it adds nothing to a sum, and has no entry that could vote in TIES. What
PEFT's add_weighted_adapter calls "linear" adds A and B apart and has the cross terms B_i A_j in it; with use_rslora its "svd"
and "cat" are too large by sqrt(r), because the new adapter inherits the rule. Here every update brings its own s, and the new
one says its s by alpha / r.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy

from ...errors import ConfigError, MiniloraError
from ...lora.algebra import combine as algebra
from ...lora.algebra.compress import Compressed, check_target
from ...lora.algebra.factors import LowRank
from ...lora.algebra.sparse import dare, ties
from ...lora.config import Config
from ..adapters.faults import Faults
from ..adapters.peft.ranks import with_ranks
from ..adapters.saved import SavedAdapter, Update
from ..adapters.scalings import float_dtype
from ..placing.tied import IN_HEAD
from .bases import base_of, check_linear, check_names, head_again, in_heads, named_adapters, without_head
from .matrices import blocks_of, layer_of, of_a_group, stored, summed, touched, widest
from .outcome import Outcome, Row, numbers_in
from .wholes import Wholes, together

__all__ = ["METHODS", "combine"]

Array = Any
Method = Callable[[Sequence[LowRank], Sequence[float], "int | None"], Compressed]  # updates, weights, at most this rank

# how: what is made of D_1, D_2, ...
METHODS = {
    "cat": "the exact sum, of rank r_1 + r_2 + ...",
    "sum": "the exact sum, at the rank that it has",
    "svd": "the sum cut to a rank",
    "ties": "TIES",
    "dare": "DARE, then the sum",
    "dare_ties": "DARE, then TIES' election",
}


def combine(adapters: Sequence[SavedAdapter], weights: Sequence[float] | None = None, how: str = "sum", *,
            rank: int | None = None, energy: float | None = None, density: float | None = None, seed: int | None = None,
            majority_sign_method: str = "total", exact: bool = True, saved: str | int = "same", dtype: Any = None,
            force: bool = False, names: Sequence[str] | None = None, advance: Callable[[], None] | None = None) -> Outcome:
    """One adapter whose updates are made of those of several.

    Parameters
    ----------
    adapters : sequence of SavedAdapter
        Of one base. Ranks, scalings, patterns, dtypes and the layers may differ.
    weights : sequence of float, optional
        One each, negative and 0 too; 1 by default.
    how : str
        "cat" or "sum": sum_i w_i D_i, exactly, of rank sum_i r_i or at its numerical rank; "svd": cut to `rank` or `energy`
        (the largest r_i by default); "ties", "dare" and "dare_ties": see `lora.ties` and `lora.dare`.
    rank : int, optional
        At most, for all but "cat" and "sum".
    energy : float in (0, 1], optional
        Keep at least this part of ||D||_F^2 of every layer: for "svd".
    density : float in (0, 1], optional
        The part of the entries that TIES (0.2 by default) or DARE (0.5) keeps.
    seed : int, optional
        Draws DARE's masks, layer by layer in the order of their paths; and the randomised SVD's matrices.
    majority_sign_method : "total" or "frequency"
        For TIES' election.
    exact : bool
        With False, "ties" and "dare" find the SVD of the dense result by a randomised range finder, from `seed`.
    saved : "same", "average", "drop" or int
        What becomes of modules, biases and rows that are replaced as a whole: see `wholes.together`.
    dtype : optional
        Of A and B; the widest that the adapters have by default.
    force : bool
        Combine adapters of different bases, which the new file then says.
    names : sequence of str, optional
        What to call the adapters in messages.
    advance : callable, optional
        Called after each layer.

    Returns
    -------
    Outcome
        The same numbers give the same bits.

    Raises
    ------
    FormatError
        For DoRA, starts that moved the base, layers of different shapes, different bases, and replaced modules that `saved`
        does not settle: all of a kind in one message.
    ConfigError
        For weights or options that do not fit.

    Notes
    -----
    Sums and their SVD cost O((out + in) R^2) a layer, R = sum r_i, and never form D. TIES and DARE do: see their notes, 16 to
    24 out in bytes for the layer that is at hand. A convolution with groups is combined group by group.

    Examples
    --------
    >>> import numpy
    >>> from minilora import lora
    >>> one = Update("linear", numpy.ones((2, 3), "float32"), numpy.ones((4, 2), "float32"), 0.5)
    >>> adapter = SavedAdapter({"fc": one}, lora.Config(r=2, lora_alpha=1, target_modules=["fc"]))
    >>> twice = combine([adapter, adapter], [1.0, -0.5])
    >>> twice.adapter.updates["fc"].r, twice.rows[0].norm.__round__(6)
    (1, 1.732051)
    """
    names = named_adapters(len(adapters), names)
    found = algebra.check_weights(len(adapters), weights)
    method = _method(how, rank, energy, density, seed, majority_sign_method, exact)
    dense = how not in ("cat", "sum", "svd")
    check_linear(adapters, names, "combine")
    check_names(adapters, names)
    base, heads = base_of(adapters, names, force), in_heads(adapters, names)
    pairs = {pair for _, pair in map(without_head, adapters) if pair}
    updates = [without_head(adapter)[0] for adapter in adapters]
    paths = _paths(updates, names, dense)
    rows, made = [], {}
    for path in paths:
        here = [(each[path], weight) for each, weight in zip(updates, found) if path in each]
        try:
            made[path], norm, error = _layer([u for u, _ in here], [w for _, w in here], method, rank, dtype)
        except MiniloraError as error_here:
            error_here.path = error_here.path or path
            raise
        rows.append(Row(path, made[path].kind, tuple(each[path].r if path in each else 0 for each in updates), made[path].r,
                        norm, error))
        if advance:
            advance()
    for pair in sorted(pairs):
        made = head_again(made, pair)
    made = _with_biases(made)
    wholes, notes = together(adapters, found, names, saved)
    config, more = _config(adapters, made, names, wholes, saved)
    in_head = [path for path in heads if path not in {table for _, table in pairs}]
    dialects = {adapter.dialect for adapter in adapters}
    dialect = dialects.pop() if len(dialects) == 1 else "peft"
    metadata = {**base.metadata(made), **({IN_HEAD: json.dumps(in_head)} if in_head and dialect != "mlx" else {})}
    adapter = SavedAdapter(made, config, dialect, wholes.saved, wholes.biases, wholes.tokens, metadata)
    terms = " + ".join(f"{weight:g} x {name}" for weight, name in zip(found, names))
    return Outcome(adapter, tuple(rows), f"{how}: {METHODS[how]}: {terms}", sum(map(numbers_in, adapters)),
                   (*base.notes, *notes, *more))


def _method(how: str, rank: int | None, energy: float | None, density: float | None, seed: int | None,
            majority: str, exact: bool) -> Method | None:
    """What makes one D of several; None for "cat", which needs nothing but putting them side by side."""
    if how not in METHODS:
        raise ConfigError(f"how must be one of {', '.join(METHODS)}, got {how!r}")
    dense = how in ("ties", "dare", "dare_ties")
    idle = {"rank": rank is not None and how in ("cat", "sum"), "energy": energy is not None and how != "svd",
            "density": density is not None and not dense, "exact=False": not exact and not dense,
            "seed": seed is not None and not dense, "majority_sign_method": majority != "total" and how in
            ("cat", "sum", "svd", "dare")}
    if any(idle.values()):
        raise ConfigError(f"{', '.join(name for name, is_idle in idle.items() if is_idle)}: how={how!r} does not use it"
                          + (": how='svd' cuts the sum" if how in ("cat", "sum") and (idle["rank"] or idle["energy"]) else ""))
    check_target(rank, energy, None)
    if how == "cat":
        return None
    if how == "sum":
        return lambda updates, weights, r: algebra.linear_sum(updates, weights)
    if how == "svd" and energy is None:
        return algebra.svd
    if how == "svd":
        return lambda updates, weights, r: algebra.linear_sum(updates, weights, r=r, energy=energy)
    rng = None if seed is None else numpy.random.default_rng(seed)  # one stream: layer after layer draws from it
    if how == "ties":
        return lambda updates, weights, r: ties(updates, weights, 0.2 if density is None else density, r, majority, exact=exact,
                                                rng=rng)
    then = "ties" if how == "dare_ties" else "linear"
    return lambda updates, weights, r: dare(updates, weights, 0.5 if density is None else density, r, rng, then, majority,
                                            exact=exact)


def _paths(updates: Sequence[Mapping[str, Update]], names: Sequence[str], dense: bool) -> list[str]:
    """All layers, sorted; `FormatError` with all whose updates are of different layers, or cannot be combined so."""
    faults = Faults()
    paths = sorted(set().union(*updates))
    for path in paths:
        here = {name: each[path] for each, name in zip(updates, names) if path in each}
        if len(set(map(layer_of, here.values()))) > 1:
            faults.add(path, "; ".join(f"{name}: {u.kind} A {u.A.shape} B {u.B.shape}" for name, u in here.items()))
        elif dense and any(u.bias is not None for u in here.values()):
            faults.add(path, "a bias of the update (lora_bias): TIES and DARE decide entry by entry of D, and the bias is none "
                       "of them. how='svd' adds the biases")
    faults.refuse("the adapters do not fit together")
    return paths


def _layer(updates: Sequence[Update], weights: Sequence[float], method: Method | None,
           rank: int | None, dtype: Any) -> tuple[Update, float, float]:
    """One layer: its update, the norm of what was wanted, and how far the update is from it at most."""
    sources = [blocks_of(update) for update in updates]
    kind = widest(update.A.dtype for update in updates) if dtype is None else float_dtype(dtype)
    if method is None:
        blocks = summed(sources, weights)
        norms, lost = [block.norm() for block in blocks], [0.0] * len(blocks)
    else:
        done = [method(parts, weights, of_a_group(rank, len(sources[0]))) for parts in zip(*sources)]
        blocks, norms, lost = [c.update for c in done], [c.norm for c in done], [c.error for c in done]
    made, moved = stored(blocks, updates[0], kind, touched(sources))
    biases = [update.s * weight * update.bias.astype("float64") for update, weight in zip(updates, weights)
              if update.bias is not None]
    if biases:
        made = dataclasses.replace(made, bias=numpy.asarray(sum(biases) / made.s).astype(kind))
    return made, math.hypot(*norms), math.hypot(*lost) + moved


def _with_biases(updates: Mapping[str, Update]) -> dict[str, Update]:
    """The updates, with a bias of 0 in layers that have none if others have one: PEFT's lora_bias is for all or for none."""
    if not any(update.bias is not None for update in updates.values()):
        return dict(updates)
    return {path: u if u.bias is not None or u.kind == "embedding" else
            dataclasses.replace(u, bias=numpy.zeros(len(u.B), u.B.dtype)) for path, u in updates.items()}


def _config(adapters: Sequence[SavedAdapter], updates: Mapping[str, Update], names: Sequence[str], wholes: Wholes,
            saved: str | int) -> tuple[Config, list[str]]:
    """The first adapter's config, without what the others say differently, and with what holds for the result."""
    first, notes = adapters[0].config, []
    source = adapters[saved].config if isinstance(saved, int) else first
    changes: dict[str, Any] = {
        "use_rslora": False, "init_lora_weights": True, "lora_bias": any(u.bias is not None for u in updates.values()),
        "modules_to_save": source.modules_to_save if wholes.saved else None,
        "bias": source.bias if wholes.biases else "none",
        "trainable_token_indices": source.trainable_token_indices if wholes.tokens else None}
    for field in ("lora_dropout", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "fan_in_fan_out",
                  "peft_version", "extra"):
        said = [getattr(adapter.config, field) for adapter in adapters]
        if any(value != said[0] for value in said):
            default = Config.__dataclass_fields__[field].default
            changes[field] = {} if field == "extra" else default
            if field in ("task_type", "base_model_name_or_path", "fan_in_fan_out"):
                notes.append(f"{field}: " + ", ".join(f"{value!r} ({name})" for value, name in zip(said, names))
                             + f": the new one says {default!r}")
    if any(set(adapter.updates) != set(updates) for adapter in adapters):
        changes.update(target_modules=sorted(path for path in updates if path) or None, exclude_modules=None,
                       layers_to_transform=None, layers_pattern=None)
    return with_ranks(dataclasses.replace(first, **changes), updates), notes
