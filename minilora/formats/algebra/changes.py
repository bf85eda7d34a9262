"""What a fine-tuning changed: the tensors of two checkpoints side by side, by name, without reading more than is compared."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

import numpy

from ...errors import ConfigError, FormatError
from ...lora.config_checks import nearest
from ..adapters.parts import FLOATS, named
from ..adapters.saved import Kind
from ..adapters.scalings import EPSILON
from ..merging.checkpoint import TRANSPOSED, TRANSPOSED_NAMES, Checkpoint
from ..merging.tied import Tie, tie_of
from ..placing.names import KNOWN

__all__ = ["Changed", "Layout", "changes", "equal", "module_of"]

Array = Any
BLOCK = 1 << 20  # numbers compared together
OLD_NAMES = {"gamma": "weight", "beta": "bias"}  # of LayerNorm in BERT's first files
BUFFERS = (".attn.bias", ".attn.masked_bias", ".masked_bias", ".position_ids", ".token_type_ids", ".rotary_emb.inv_freq")
TABLES = ("embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings", "token_type_embeddings", "tok_embeddings",
          "embed_in", "embed_positions", "shared", "embeddings", "embedding", "word_embedding", "rel_embeddings")


class Layout:
    """Which weights of a checkpoint are tables, which are stored as (in, out), and which are convolutions with groups.

    Parameters
    ----------
    config : mapping or None
        The base's config.json: its model type tells GPT-2's matrices.
    embeddings, transposed : collection of str, optional
        Names of modules, whole or the end behind a dot, in place of what is known.
    groups : mapping of str to int, optional
    """

    def __init__(self, config: Mapping[str, Any] | None, embeddings: Collection[str] | None,
                 transposed: Collection[str] | None, groups: Mapping[str, int] | None) -> None:
        turned = TRANSPOSED_NAMES if (config or {}).get("model_type") in TRANSPOSED else ()
        self.embeddings = TABLES if embeddings is None else tuple(embeddings)
        self.transposed = turned if transposed is None else tuple(transposed)
        self.groups = dict(groups or {})

    def kind(self, path: str, shape: tuple[int, ...]) -> Kind | None:
        """The kind of layer that has such a weight; None if none has."""
        if len(shape) == 2:
            return "embedding" if named(path, self.embeddings) else "linear"
        return "convolution" if 3 <= len(shape) <= 5 else None

    def turned(self, path: str) -> bool:
        return named(path, self.transposed)

    def groups_of(self, path: str) -> int:
        return next((count for name, count in self.groups.items() if named(path, [name])), 1)

    def check(self, paths: Collection[str], given: Mapping[str, Collection[str] | None]) -> None:
        """Raise `ConfigError` for names that the caller gave and that no weight has."""
        unknown = [f"{option}: {name!r} names no weight" + (f": is {near[0]!r} meant?" if near else "")
                   for option, names in given.items() for name in names or () if not any(named(path, [name]) for path in paths)
                   for near in [nearest(name, {*paths, *(path.rpartition(".")[2] for path in paths)}, 1)]]
        if unknown:
            raise ConfigError("; ".join(unknown))


class Changed(NamedTuple):
    """A tensor of the tuned checkpoint.

    Attributes
    ----------
    name : str
        In the tuned one.
    before : str or None
        Its name in the base; None if it is new.
    how : "update", "whole" or "new"
        A matrix that another one can be subtracted from; what changed and is none; or what the base does not have.
    why : str
        For "whole" and "new", in words.
    """

    name: str
    before: str | None
    how: Literal["update", "whole", "new"]
    why: str = ""


def module_of(name: str) -> str:
    """The module that a tensor belongs to."""
    return name.rpartition(".")[0]


def equal(a: Array, b: Array) -> bool:
    """Whether two arrays are the same in the coarser of their dtypes: block by block, until one is not."""
    if a.shape != b.shape:
        return False
    kind: Any = None if a.dtype == b.dtype else max((a.dtype, b.dtype), key=lambda dtype: EPSILON.get(dtype.name, 0.0))
    one, two = a.reshape(-1), b.reshape(-1)
    for start in range(0, one.size, BLOCK):
        x, y = one[start:start + BLOCK], two[start:start + BLOCK]
        same = x.tobytes() == y.tobytes() or numpy.array_equal(x, y) if kind is None else \
            numpy.array_equal(x.astype(kind), y.astype(kind))
        if not same:
            return False
    return True


def pairs_of(tuned: Checkpoint, base: Checkpoint) -> dict[str, str]:
    """For each name in the tuned checkpoint that in the base: the same, an older one, or with a known prefix more or less."""
    there = {_modern(name): name for name in base.state}
    found = dict[str, str]()
    for prefixes in (("", ""), *(("", prefix) for prefix in KNOWN), *((prefix, "") for prefix in KNOWN)):
        take, put = prefixes
        tried = {name: there[other] for name in tuned.state
                 if name.startswith(take) and (other := put + _modern(name)[len(take):]) in there}
        if len(tried) > len(found):
            found = tried
    if not found:
        raise FormatError(f"{tuned.path} and {base.path} have no tensor of one name: are these two states of one model? "
                          f"{_some(tuned.state)} there, {_some(base.state)} here")
    return found


def changes(tuned: Checkpoint, base: Checkpoint, layout: Layout) -> tuple[list[Changed], Tie | None, list[str]]:
    """Every tensor that a fine-tuning changed, sorted by name; the table and head of the tuned model; and notes.

    Raises
    ------
    FormatError
        If the checkpoints have nothing in common.
    """
    pairs, found, notes = pairs_of(tuned, base), list[Changed](), list[str]()
    tie, before_tie = tie_of(tuned.state, tuned.config), tie_of(base.state, base.config)
    if tie is not None and before_tie is not None and before_tie.tied and tie.head in tuned.state and tie.head not in pairs:
        pairs[tie.head] = before_tie.table  # which is the base's head
    for name in sorted(tuned.state):
        shape, before = tuned.state.shapes[name], pairs.get(name)
        if (tie is not None and tie.tied and name == tie.head) or (name.endswith(BUFFERS) and len(shape) != 1):
            continue  # the table says what the head is
        if before is None:
            found.append(Changed(name, None, "new", f"{shape}: the base has none"))
        elif shape != base.state.shapes[before]:
            found.append(Changed(name, before, "whole", f"{shape}, and {base.state.shapes[before]} in the base"))
        elif not equal(tuned.state[name], base.state[before]):
            found.append(_changed(name, before, tuned, base, layout))
    if tie is not None and tie.tied and before_tie is not None and not before_tie.tied and before_tie.head in base.state and \
            not equal(base.state[before_tie.head], base.state[before_tie.table]):
        raise FormatError(f"{before_tie.head}: a head of its own in the base, and the table {tie.table} in the tuned model: "
                          "that is no change of a weight. Write the tuned model with tie_word_embeddings false")
    used = {*pairs.values(), *((before_tie.head,) if before_tie is not None else ())}
    gone = sorted(name for name in base.state if name not in used and not name.endswith(BUFFERS))
    if gone:
        notes.append(f"only in the base, and left as there: {', '.join(gone[:3])}"
                     f"{f' and {len(gone) - 3} more' if len(gone) > 3 else ''}")
    return found, tie, notes


def _changed(name: str, before: str, tuned: Checkpoint, base: Checkpoint, layout: Layout) -> Changed:
    array, other = tuned.state[name], base.state[before]
    odd = {array.dtype.name, other.dtype.name} - set(FLOATS)
    if odd:
        return Changed(name, before, "whole", f"{', '.join(sorted(odd))}: no numbers that a low-rank update is added to")
    if not name.endswith(".weight") or layout.kind(module_of(name), array.shape) is None or math.prod(array.shape) == 0:
        return Changed(name, before, "whole", f"{array.shape}: no matrix of a layer")
    return Changed(name, before, "update")


def _modern(name: str) -> str:
    front, _, last = name.rpartition(".")
    return f"{front}.{OLD_NAMES[last]}" if last in OLD_NAMES and front.endswith("LayerNorm") else name


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:2])
