"""A low-rank adapter of what a fine-tuning changed: the difference of two checkpoints, matrix by matrix.

Both are mapped, not loaded: beside the result there is one matrix at a time in memory, as D = W_tuned - W_base in float64 with
its SVD. By Eckart, Young and Mirsky no update of that rank is nearer to it. What changed and is no matrix, norms and biases,
and what is new, such as a head, is no low-rank update: it is refused by name, or goes into the adapter as a whole, or is left
out, as the caller says.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy

from ...errors import ConfigError, FormatError, MiniloraError
from ...flags import option
from ...lora.algebra.compress import Compressed, check_sketch, check_target, compress_dense
from ...lora.algebra.factors import LowRank
from ..adapters.faults import Faults
from ..adapters.parts import named
from ..adapters.saved import Kind, SavedAdapter, Update
from ..adapters.scalings import EPSILON, config_of, float_dtype
from ..merging.checkpoint import Checkpoint, open_checkpoint
from ..merging.layers import layer_of
from ..merging.tied import Tie
from ..placing.fingerprint import KEY, fingerprint
from ..placing.saving import all_channels
from ..placing.tied import IN_HEAD
from .bases import head_again
from .changes import Changed, Layout, changes, module_of
from .matrices import of_a_group, stored
from .outcome import Outcome, Row
from .wholes import Wholes

__all__ = ["RESTS", "extract_files"]

SAVE, DROP = ("rest='save'", "--rest save"), ("rest='drop'", "--rest drop")

Array = Any
RESTS = ("error", "save", "drop")
TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
         "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
         "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
ROUNDED = 0.4  # the root mean square of a rounding, of the unit roundoff, for numbers of all sizes: measured
CAUSAL = ("ForCausalLM", "LMHeadModel")


class Target(NamedTuple):
    """How far to go."""

    rank: int | None
    energy: float | None
    tolerance: float | None
    exact: bool
    rng: numpy.random.Generator | None
    dtype: Any


def extract_files(tuned: str | PathLike[str], base: str | PathLike[str], rank: int | None = None,
                  energy: float | None = None, *, tolerance: float | None = None, rest: str = "error",
                  only: Collection[str] | None = None,
                  exact: bool = True, seed: int = 0, dtype: Any = None, embeddings: Collection[str] | None = None,
                  transposed: Collection[str] | None = None, groups: Mapping[str, int] | None = None,
                  advance: Callable[[int, int], None] | None = None) -> Outcome:
    """The adapter that leads from one checkpoint to another, as nearly as its ranks allow.

    Parameters
    ----------
    tuned, base : path
        Folders with config.json and safetensors files, one or several; or such files. Their dtypes may differ.
    rank : int, optional
        At most this rank. It wins over the other two.
    energy, tolerance : float, optional
        Keep at least this part of ||D||_F^2 of every layer; lose at most this part of ||D||_F.
    rest : "error", "save" or "drop"
        What changed and is no matrix, or is new: refuse it, all of it by name; save it whole in the adapter
        (`modules_to_save`, and biases of updated layers as `bias`); or leave it out.
    only : collection of str, optional
        Modules to extract, by the whole name or the end of it behind a dot. Changes elsewhere are left out.
    exact : bool
        With False, a randomised range finder looks for the first `rank` directions, which is much faster for large matrices;
        the error is measured all the same.
    seed : int
        For ``exact=False``.
    dtype : optional
        Of A and B: float32 by default, float64 if both checkpoints are.
    embeddings, transposed : collection of str, optional
        Which modules are tables, and which weights are stored as (in, out), in place of what their names and config.json tell.
    groups : mapping of str to int, optional
        Of convolutions with groups, which a file does not tell.
    advance : callable, optional
        Called with (matrices done, matrices in all).

    Returns
    -------
    Outcome
        With the fingerprint of the base. The same files give the same bits. Unchanged matrices have no update.

    Raises
    ------
    FormatError
        If the checkpoints are not two states of one model, are equal, or changed in parts that `rest` does not settle.
    ConfigError
        For no target, or options outside their range.
    StateError
        If a weight holds NaN or inf.

    Notes
    -----
    Memory for the largest matrix (out, in): D, 8 out in bytes, and with its exact SVD about eight times that where it is square
    (measured at 2048 x 2048: 0.27 GB; hence 1.1 GB at 4096 x 4096). Time O(out in min(out, in)), with ``exact=False``
    O(out in rank). Of a table only rows that changed take part.

    Where the tuned weights are stored in half precision, D holds their rounding too, about 0.4 u |W| with u = 2^-8
    (bfloat16) or 2^-11 (float16), whose rank is full: a note says how large that is beside D.
    """
    if rank is None and energy is None and tolerance is None:
        raise ConfigError("extract: give rank, energy or tolerance: how far to go")
    if rest not in RESTS:
        raise ConfigError(f"rest must be one of {', '.join(map(repr, RESTS))}, got {rest!r}")
    check_target(rank, energy, tolerance)
    check_sketch(exact, rank, seed)
    there, here = open_checkpoint(tuned), open_checkpoint(base)
    for each in (there, here):
        if each.quantised():
            raise FormatError(f"{each.path}: quantised ({each.quantised()}): the difference of two quantised weights is not "
                              "that of the weights. Convert it to float16 or float32 with the program that wrote it")
    layout = Layout(there.config or here.config, embeddings, transposed, groups)
    layout.check([module_of(name) for name in there.state],
                 {"embeddings": embeddings, "transposed": transposed, "groups": groups, "only": only})
    found, tie, notes = changes(there, here, layout)
    if only is not None:
        found, left = _only(found, only)
        notes += [f"left out, as asked, though it changed: {', '.join(left[:3])}"
                  + (f" and {len(left) - 3} more" if len(left) > 3 else "")] if left else []
    if not found:
        raise FormatError(f"{there.path} and {here.path} have the same weights: there is nothing to extract"
                          + (" in these modules" if only is not None else ""))
    odd = [change for change in found if change.how != "update"]
    if rest == "error":
        _refuse(odd)
    target = Target(rank, energy, tolerance, exact, None if exact else numpy.random.default_rng(seed), dtype)
    rows, updates = _updates([change for change in found if change.how == "update"], there, here, layout, target, advance)
    if not updates:
        raise FormatError(f"{there.path}: no matrix has changed: there is nothing of low rank to extract. What did: "
                          f"{', '.join(change.name for change in odd[:5])}")
    notes += _rounding(rows, there, found)
    if tie is not None and tie.unsure and module_of(tie.table) in updates:
        notes.append(f"{there.path} has no config.json: if {tie.table} makes the logits too, this adapter changes it on one "
                     "side only. Give a folder with its config.json")
    wholes = _wholes(odd, there, updates) if rest == "save" else Wholes({}, {}, {})
    notes += [f"left out: {change.name} ({change.why})" for change in odd] if rest == "drop" else []
    adapter = _adapter(updates, wholes, tie, there, here, found, layout)
    given = {"rank": rank, "energy": energy, "tolerance": tolerance}
    words = ", ".join(f"{word} {value:g}" for word, value in given.items() if value is not None)
    return Outcome(adapter, tuple(rows), f"{os.fsdecode(tuned)} - {os.fsdecode(base)}, to {words}",
                   sum(math.prod(there.state.shapes[change.name]) for change in found if change.how == "update"), tuple(notes))


def _only(found: Sequence[Changed], only: Collection[str]) -> tuple[list[Changed], list[str]]:
    kept = [change for change in found if named(module_of(change.name), only)]
    return kept, [change.name for change in found if change not in kept]


def _refuse(odd: Sequence[Changed]) -> None:
    faults = Faults()
    for change in odd:
        faults.add(change.name, f"{'new' if change.how == 'new' else 'changed'}: {change.why}")
    faults.refuse("what changed is more than matrices", f"{option(*SAVE)} puts these into the adapter as a whole, "
                  f"{option(*DROP)} leaves them as the base has them")


def _updates(found: Sequence[Changed], tuned: Checkpoint, base: Checkpoint, layout: Layout, target: Target,
             advance: Callable[[int, int], None] | None) -> tuple[list[Row], dict[str, Update]]:
    rows, updates = [], {}
    for i, change in enumerate(found):
        path = module_of(change.name)
        try:
            updates[path], row = _one(path, tuned.state[change.name], base.state[str(change.before)], layout, target)
        except MiniloraError as error:
            error.path = error.path or path
            raise
        rows.append(row)
        if advance:
            advance(i + 1, len(found))
    return rows, updates


def _one(path: str, after: Array, before: Array, layout: Layout, target: Target) -> tuple[Update, Row]:
    """The update of one matrix."""
    kind: Any = layout.kind(path, after.shape)
    groups = layout.groups_of(path) if kind == "convolution" else 1
    if groups < 1 or len(after) % groups:
        raise ConfigError(f"groups: {groups} do not divide the {len(after)} outputs")
    with numpy.errstate(invalid="ignore", over="ignore"):  # NaN and inf are found as such below
        difference = after.astype("float64")
        difference -= before
    matrix = difference.T if _turned(path, kind, layout) else difference.reshape(len(difference), -1)
    parts = numpy.split(matrix, groups)
    where = [(part.any(axis=1), part.any(axis=0)) for part in parts]
    done = [_compressed(part, *touched, of_a_group(target.rank, groups), target) for part, touched in zip(parts, where)]
    single = "float64" if after.dtype == before.dtype == numpy.float64 else "float32"
    inner = after.shape[1:] if kind == "convolution" else (matrix.shape[1],)
    update, moved = stored([c.update for c in done], _like(kind, inner), float_dtype(target.dtype or single), where)
    if groups > 1:
        update = dataclasses.replace(update, A=all_channels(update.A, groups))
    norm, error = math.hypot(*(c.norm for c in done)), math.hypot(*(c.error for c in done))
    return update, Row(path, kind, (min(matrix.shape),), update.r, norm, error + moved)


def _turned(path: str, kind: str, layout: Layout) -> bool:
    """Whether the weight is stored as the transposed D: tables as (V, d), and GPT-2's matrices as (in, out)."""
    return kind == "embedding" or (kind == "linear" and layout.turned(path))


def _like(kind: Kind, inner: tuple[int, ...]) -> Update:
    """An update of this kind, of rank 1, with these inputs."""
    return Update(kind, numpy.empty((1, *inner)), numpy.empty((1, 1, *(1,) * (len(inner) - 1))), 1.0)


def _compressed(M: Array, rows: Array, columns: Array, r: int | None, target: Target) -> Compressed:
    """D of one group at low rank. Rows and columns of zeros, such as tokens that training has not seen, take no part."""
    part = M if rows.all() and columns.all() else M[numpy.ix_(rows, columns)]
    if not part.size:
        return Compressed(LowRank(numpy.zeros((1, M.shape[1])), numpy.zeros((M.shape[0], 1))), 0.0, 0.0, 0.0, numpy.zeros(0))
    found = compress_dense(part, numpy.dtype("float64"), r, target.energy, target.tolerance, target.exact, target.rng)
    A, B = numpy.zeros((found.update.r, M.shape[1])), numpy.zeros((M.shape[0], found.update.r))
    A[:, columns], B[rows] = found.update.A, found.update.B
    return dataclasses.replace(found, update=LowRank(A, B, found.update.s))


def _rounding(rows: Sequence[Row], tuned: Checkpoint, found: Sequence[Changed]) -> list[str]:
    """A note on the rounding of the tuned weights, if it is not small beside D."""
    halves = {module_of(c.name): tuned.state[c.name] for c in found if c.how == "update"
              and tuned.state.dtypes[c.name] in ("F16", "BF16")}
    noise = math.hypot(*(ROUNDED * EPSILON[W.dtype.name] * _norm(W) for W in halves.values()))
    norm = math.hypot(*(row.norm for row in rows if row.path in halves))
    if noise < 0.01 * norm or not halves:
        return []
    names = ", ".join(sorted({W.dtype.name for W in halves.values()}))
    return [f"the tuned weights are stored as {names}: rounding them makes about {min(noise / norm, 1):.1%} of |D|, which no "
            "low rank can hold. A tuned checkpoint in float32 has less"]


def _norm(W: Array) -> float:
    flat, step = W.reshape(-1), 1 << 20
    return math.hypot(*(float(numpy.linalg.norm(flat[i:i + step].astype("float64"))) for i in range(0, flat.size, step)))


def _wholes(odd: Sequence[Changed], tuned: Checkpoint, updates: Mapping[str, Update]) -> Wholes:
    """What changed and is no matrix: biases of updated layers, and whole modules."""
    faults, modules, biased = Faults(), set[str](), False
    for change in odd:
        module, last = module_of(change.name), change.name.rpartition(".")[2]
        if module in updates and last != "bias":
            faults.add(change.name, f"{change.why}; {module} has an update, and cannot be saved as a whole too")
        elif not module:
            faults.add(change.name, f"{change.why}; it belongs to no module that could be saved")
        biased = biased or module in updates
        modules |= {module} - set(updates)
    faults.refuse("parts that an adapter has no place for", f"{option(*DROP)} leaves them as the base has them")
    names = sorted(tuned.state)
    biases = [name for name in names if biased and module_of(name) in updates and name.endswith(".bias")]
    saved = [name for name in names if module_of(name) in modules]
    return Wholes({name: tuned.state[name] for name in saved}, {name: tuned.state[name] for name in biases}, {})


def _adapter(updates: Mapping[str, Update], wholes: Wholes, tie: Tie | None, tuned: Checkpoint, base: Checkpoint,
             found: Sequence[Changed], layout: Layout) -> SavedAdapter:
    said = (tuned.config or {}).get("architectures")
    names = [name for name in said if isinstance(name, str)] if isinstance(said, list) else []
    metadata, table = dict[str, str](), "" if tie is None or not tie.tied else module_of(tie.table)
    layers = {module_of(c.name): layer_of(base.state[str(c.before)], updates[module_of(c.name)],
                                          layout.turned(module_of(c.name)) and updates[module_of(c.name)].kind == "linear")
              for c in found if c.how == "update" and len(base.state.shapes[str(c.before)]) <= 4}
    if table in updates and tie is not None and (tie.head in tuned.state or any(name.endswith(CAUSAL) for name in names)):
        updates = head_again(updates, (module_of(tie.head), table))
    elif table in updates:
        metadata[IN_HEAD] = json.dumps([table])
    metadata[KEY] = fingerprint(layers, {path: updates[path].s for path in layers}, False)
    task = next((task for end, task in TASKS.items() if any(name.endswith(end) for name in names)), None)
    modules = sorted(set(map(module_of, wholes.saved)))
    config = config_of(updates, task_type=task, modules_to_save=modules or None, bias="lora_only" if wholes.biases else "none",
                       fan_in_fan_out=any(layout.turned(path) for path, u in updates.items() if u.kind == "linear"))
    return SavedAdapter(updates, config, "peft", wholes.saved, wholes.biases, {}, metadata)
