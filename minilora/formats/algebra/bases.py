"""Whether adapters can be calculated with: updates of the form s B A, of one unmoved base, under one set of names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy

from ...errors import ConfigError, FormatError
from ...flags import option
from ..adapters.faults import Faults
from ..adapters.peft.writing import MOVING
from ..adapters.saved import SavedAdapter, Update
from ..placing.fingerprint import KEY, forced_words, parsed, worded
from ..placing.tied import pair_in, said_in_head

__all__ = ["Base", "base_of", "check_adapters", "check_linear", "check_names", "head_again", "in_heads", "moved_start",
           "named_adapters", "without_head"]


class Base(NamedTuple):
    """What is known of the weights that adapters belong to, by path, and what deserves a look."""

    tensors: dict[str, Any]
    forced: str
    notes: tuple[str, ...]

    def metadata(self, updates: Mapping[str, Update]) -> dict[str, str]:
        """The fingerprint for a new adapter of this base; empty if nothing is known."""
        tensors = {path: each for path, each in self.tensors.items() if path in updates}
        scalings = {path: update.s for path, update in updates.items()}
        return {KEY: worded(tensors, scalings, False, self.forced)} if tensors else {}


def named_adapters(count: int, names: Sequence[str] | None) -> list[str]:
    """What to call each adapter in messages."""
    if names is None:
        return [f"adapters[{i}]" for i in range(count)]
    if len(names) != count:
        raise ConfigError(f"names: {count} adapters and {len(names)} names")
    return list(names)


def check_adapters(adapters: Sequence[Any], names: Sequence[str]) -> None:
    """Raise `ConfigError` for what is no `SavedAdapter`."""
    for adapter, name in zip(adapters, names):
        if not isinstance(adapter, SavedAdapter):
            raise ConfigError(f"{name}: expected a SavedAdapter, such as formats.read_adapter(path) gives, got "
                              f"{type(adapter).__name__}")


def moved_start(adapter: SavedAdapter) -> bool:
    """Whether the adapter's start was taken out of the base, and is not in the file: PiSSA and OLoRA as PEFT saves them."""
    return adapter.config.init_lora_weights in MOVING and \
        any(update.r == adapter.config.rank_at(path) for path, update in adapter.updates.items())


def check_linear(adapters: Sequence[SavedAdapter], names: Sequence[str], what: str) -> None:
    """Raise `FormatError`, all reasons in one, for adapters whose effect is not W + s B A of the base that is at hand."""
    check_adapters(adapters, names)
    faults = Faults()
    for adapter, name in zip(adapters, names):
        lengths = [path for path, update in adapter.updates.items() if update.magnitude is not None]
        if lengths:
            faults.add(f"{name}: {lengths[0]}{' ...' if len(lengths) > 1 else ''}",
                       "DoRA: its weight is m (W + D) / |W + D|, which is no sum of W and a low-rank D, and m holds for this D "
                       "only. Merge it into the base, and extract a plain update from the two checkpoints")
        if moved_start(adapter):
            faults.add(name, f"init_lora_weights={adapter.config.init_lora_weights!r}: s B A belongs to a base that the start "
                       "was taken out of, and the start is not in the file. formats.load_adapter puts it into the model, "
                       "formats.save_adapter then writes it with its start, rank 2 r")
        if not adapter.updates:
            faults.add(name, "no update of any layer")
    faults.refuse(f"{what}: this needs updates of the form s B A")


def check_names(adapters: Sequence[SavedAdapter], names: Sequence[str]) -> None:
    """Raise `FormatError` if one layer seems to go under two names, such as h.0.fc and transformer.h.0.fc."""
    faults = Faults()
    ends: dict[str, tuple[str, str]] = {}
    for adapter, name in zip(adapters, names):
        for path in adapter.updates:
            words = path.split(".")
            for i in range(1, len(words)):
                ends.setdefault(".".join(words[i:]), (path, name))
    for adapter, name in zip(adapters, names):
        for path in adapter.updates:
            longer, other = ends.get(path, (path, name))
            if "." in path and other != name and longer not in adapter.updates:
                front = longer[:-len(path)]
                faults.add(f"{name}: {path}", f"is this the same layer as {longer} of {other}? Give both one name: "
                           + option(f"formats.convert with mapping={{'': {front!r}}}",
                                    f"minilora convert with --names ={front}"))
    faults.refuse("the adapters name their layers in different ways")


def base_of(adapters: Sequence[SavedAdapter], names: Sequence[str], force: bool) -> Base:
    """The one base that these adapters belong to, by their fingerprints.

    Raises
    ------
    FormatError
        If two of them belong to different weights, unless forced: then the result says so.
    """
    tensors: dict[str, Any] = {}
    owner: dict[str, str] = {}
    different, forced = [], []
    silent = [name for adapter, name in zip(adapters, names) if KEY not in adapter.metadata]
    for adapter, name in zip(adapters, names):
        said = parsed(adapter.metadata) if KEY in adapter.metadata else {"tensors": {}, "forced": None}
        forced += [said["forced"]] if said["forced"] else []
        for path, each in said["tensors"].items():
            before = tensors.setdefault(path, each)
            owner.setdefault(path, name)
            if before["sha256"] != each["sha256"]:
                different.append(f"{path}.weight of {owner[path]} and of {name}")
    if different and not force:
        lines = [*different[:10], *([f"... and {len(different) - 10} more"] if len(different) > 10 else [])]
        head = ("the adapters belong to different bases, by the fingerprints in their files: an update is meant for the "
                f"weights that it was trained on. {option('force=True', '--force')} goes on")
        raise FormatError("\n  ".join([head, *lines]))
    notes = [f"no fingerprint in {', '.join(silent)}: nothing tells whether the base is the same"] \
        if silent and len(adapters) > 1 else []
    notes += [f"different bases: {line}" for line in different[:3]]
    known = {path: each for path, each in tensors.items()
             if not any(line.startswith(f"{path}.weight of") for line in different)}
    words = forced_words(different).replace("loaded", "combined") if different else ""
    return Base(known, "; ".join(dict.fromkeys([*forced, *([words] if words else [])])), tuple(notes))


def without_head(adapter: SavedAdapter) -> tuple[dict[str, Update], tuple[str, str] | None]:
    """The updates, but for that of a head that is an embedding's said again (see `placing.tied`); and those two paths."""
    pair = pair_in(adapter.updates)
    return {path: update for path, update in adapter.updates.items() if not pair or path != pair[0]}, pair


def head_again(updates: Mapping[str, Update], pair: tuple[str, str] | None) -> dict[str, Update]:
    """The updates with that of the head, from the embedding's as it is now."""
    if pair is None:
        return dict(updates)
    head, table = pair
    A, B = (numpy.ascontiguousarray(factor.T) for factor in (updates[table].B, updates[table].A))
    return {**updates, head: Update("linear", A, B, updates[table].s)}


def in_heads(adapters: Sequence[SavedAdapter], names: Sequence[str]) -> list[str]:
    """The embeddings whose updates take part in a tied head; `FormatError` if the adapters mean it in different ways."""
    faults, found = Faults(), dict[str, tuple[bool, str]]()
    for adapter, name in zip(adapters, names):
        _, pair = without_head(adapter)
        inside = said_in_head(adapter) | ({pair[1]} if pair else set())
        for path, update in adapter.updates.items():
            if update.kind != "embedding":
                continue
            how, other = found.setdefault(path, (path in inside, name))
            if how != (path in inside):
                faults.add(path, f"in {name if path in inside else other} this update of an embedding is one of the tied head "
                           f"too, in {other if path in inside else name} it is not")
    faults.refuse("the adapters do not mean the same")
    return sorted(path for path, (how, _) in found.items() if how)
