"""Which module of a model a path in an adapter file means: one mapping for the whole file, found or given, never guessed.

Programs put different things in front of the same paths: the class around the model (``transformer.``, ``bert.``), a wrapper
(``base_model.model.``, ``module.``, ``_orig_mod.``), or nothing. In this order:

1. the caller's `mapping`, if there is one;
2. the paths as they are;
3. one known prefix, or a chain of them, taken away from all paths that have it, or put in front, or both;
4. any prefix that the model has put in front, if only one makes all paths fit;
5. each path by itself, as the end of exactly one path of the model.

What the file has in front and this page does not know (``thinker.``, ``text_model.``) may mean another part of a larger model,
so it is not taken away but asked about: the error names the mapping that would fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Union

from ... import nn
from ...errors import ConfigError, FormatError
from ...lora.config_checks import nearest
from ...lora.layers.base import AdaptedLayer
from ...lora.layers.places import named_through
from ...tables import table

__all__ = ["Mapped", "NameMapping", "layers_by_path", "rename", "resolve", "resolve_in"]

KNOWN = ("base_model.model.", "model.", "transformer.", "bert.", "roberta.", "distilbert.", "deberta.", "unet.", "module.",
         "_orig_mod.")
COMPILED = "_orig_mod"  # a part that torch.compile puts in front of whatever it compiles, in the middle of a path too
LISTED = 12  # rows of a table in an error

NameMapping = Union[Mapping[str, str], Callable[[str], str]]


class Mapped(NamedTuple):
    """The path in the model for each path in the file, and how it was found, in words; "" if they are the same."""

    paths: dict[str, str]
    how: str


def layers_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that own parameters, by path; not what is inside a LoRA layer, nor the model itself."""
    found, closed = {}, "\0"
    for path, module in named_through(model).items():
        if path.startswith(closed):
            continue
        if isinstance(module, AdaptedLayer):
            closed = f"{path}." if path else "\0"
        if path and next(module.own_parameters(), None) is not None:
            found[path] = module
    return found


def resolve(shapes: Mapping[str, str], model: nn.Module, mapping: NameMapping | None = None) -> Mapped:
    """The module of the model that each path of a file means.

    Parameters
    ----------
    shapes : mapping of str to str
        The file's module paths, each with its shapes in words, for messages.
    model : Module
    mapping : dict of str to str, or function, optional
        Of prefixes: what a path starts with, and what takes its place; or from path to path.

    Raises
    ------
    FormatError
        If a path means no module, several, or one that another path means too: one table of all of them.
    ConfigError
        If the mapping is not of that form, or an entry of it changes nothing.
    """
    return resolve_in(shapes, layers_by_path(model), mapping)


def resolve_in(shapes: Mapping[str, str], layers: Mapping[str, Any], mapping: NameMapping | None = None) -> Mapped:
    """`resolve` for layers by path, whatever they are: an attribute `weight` with a shape, if there is one, is for messages."""
    renamed = rename(shapes, mapping)
    found = _by_one_rule(list(renamed.values()), layers)
    problems = []
    if isinstance(found, str):
        problems = [found]
    elif found is None:
        problems = _unmatched(renamed, shapes, layers, hint=mapping is None)
    else:
        means: dict[str, str] = {}
        for path, inner in renamed.items():
            here = found.paths[inner]
            if means.setdefault(here, path) != path:
                problems.append(f"{path} and {means[here]} both mean {here}")
    if problems:
        raise FormatError("\n  ".join(["the file's names do not fit this model; nothing was changed:", *problems]))
    assert isinstance(found, Mapped)
    how = "; ".join(filter(None, ("names by the mapping given" if mapping is not None else "", found.how)))
    return Mapped({path: found.paths[inner] for path, inner in renamed.items()}, how)


def rename(paths: Iterable[str], mapping: NameMapping | None) -> dict[str, str]:
    """What a caller's mapping makes of each path; with a dict the longest prefix that fits counts."""
    paths = list(paths)
    if mapping is None:
        return {path: path for path in paths}
    if callable(mapping):
        given = {path: mapping(path) for path in paths}
        wrong = [path for path, new in given.items() if not isinstance(new, str) or not new]
        if wrong:
            raise ConfigError(f"mapping: expected a function from path to path, got {given[wrong[0]]!r} for {wrong[0]!r}")
        return given
    if not isinstance(mapping, Mapping) or not all(isinstance(text, str) for pair in mapping.items() for text in pair):
        raise ConfigError('mapping: expected a dict from prefix to prefix, such as {"thinker.": ""}, or a function from path '
                          f"to path, got {mapping!r}")
    used, renamed = set(), {}
    for path in paths:
        prefix = max((p for p in mapping if path.startswith(p)), key=len, default=None)
        used.add(prefix)
        renamed[path] = path if prefix is None else mapping[prefix] + path[len(prefix):]
    idle = [prefix for prefix in mapping if prefix not in used]
    if idle:
        raise ConfigError(f"mapping: {', '.join(map(repr, idle))} is the start of no path in the file, or a longer entry comes "
                          f"first. Paths start like {', '.join(map(repr, paths[:3]))}")
    return renamed


# -- the rules ----------------------------------------------------------------------------------------------------------

def _by_one_rule(paths: list[str], layers: Mapping[str, Any]) -> Mapped | str | None:
    """The first kind of rule that fits all paths; what is ambiguous, in words, or None if nothing fits."""
    same = {path: path for path in paths}
    if all(path in layers for path in paths):
        return Mapped(same, "")
    bare = {path: ".".join(part for part in path.split(".") if part != COMPILED) for path in paths}
    if all(path in layers for path in bare.values()):
        return Mapped(bare, f"{COMPILED!r} taken out of the names")
    takes, puts = _chains(bare.values()), _chains(layers)
    for rules in ([*(("", put) for put in puts), *((take, "") for take in takes)],
                  [(take, put) for take in takes for put in puts],
                  [(take, put) for take in ("", *takes) for put in _fronts(bare.values(), take, layers)]):
        fitting = [mapped for take, put in rules if (mapped := _with(bare, take, put, layers))]
        different = list({tuple(mapped.paths.items()): mapped for mapped in fitting}.values())
        if len(different) > 1:
            return _ambiguous(different)
        if different:
            return different[0]
    return _one_by_one(bare, takes, layers)


def _chains(paths: Iterable[str]) -> list[str]:
    """What known prefixes, one behind the other, stand in front of some of these paths; the shortest first."""
    found: dict[str, None] = {}
    for path in paths:
        for chain in _chain(path):
            found[chain] = None
    return sorted(found, key=len)


def _chain(path: str) -> Iterator[str]:
    start, again = 0, True
    while again:
        again = False
        for prefix in KNOWN:
            if path.startswith(prefix, start) and len(path) > start + len(prefix):
                start, again = start + len(prefix), True
                yield path[:start]
                break


def _fronts(paths: Iterable[str], take: str, layers: Iterable[str]) -> list[str]:
    """All that the model has in front of the first path that needs something in front."""
    for path in paths:
        end = path.removeprefix(take)
        if path in layers or end in layers:
            continue
        return [layer[:-len(end)] for layer in layers if layer.endswith(f".{end}")]
    return []


def _with(paths: Mapping[str, str], take: str, put: str, layers: Mapping[str, Any]) -> Mapped | None:
    """This rule for all paths, if it fits all. What is a path of the model already, stays: a head beside a trunk."""
    found = {}
    for path, bare in paths.items():
        options = (put + bare.removeprefix(take), bare, bare.removeprefix(take))
        here = next((option for option in options if option in layers), None)
        if here is None:
            return None
        found[path] = here
    words = [f"{take!r} taken from the names"] if take else []
    words += [f"{put!r} put in front of them" if take else f"{put!r} put in front of the names"] if put else []
    return Mapped(found, ", ".join(words))


def _one_by_one(paths: Mapping[str, str], takes: Iterable[str], layers: Mapping[str, Any]) -> Mapped | None:
    found = {}
    for path, bare in paths.items():
        ends = {bare, *(bare.removeprefix(take) for take in takes)}
        fitting = [layer for layer in layers if any(layer == end or layer.endswith(f".{end}") for end in ends)]
        if len(fitting) != 1:
            return None
        found[path] = fitting[0]
    return Mapped(found, "each name by itself, as the end of one path of the model")


# -- messages -----------------------------------------------------------------------------------------------------------

def _ambiguous(different: list[Mapped]) -> str:
    first, second = different[:2]
    path = next(path for path in first.paths if first.paths[path] != second.paths[path])
    return (f"{path} may be {first.paths[path]} ({first.how or 'as it is'}) or {second.paths[path]} ({second.how}): say which, "
            f"as in mapping={{{path!r}: {first.paths[path]!r}}}, or with prefixes")


def _unmatched(renamed: Mapping[str, str], shapes: Mapping[str, str], layers: Mapping[str, Any], hint: bool) -> list[str]:
    """A table of the paths that mean nothing, and the mapping that would fit, if there is one."""
    ends = _chains(renamed.values())
    wrong = {path: inner for path, inner in renamed.items()
             if not any(layer == end or layer.endswith(f".{end}") for layer in layers
                        for end in {inner, *(inner.removeprefix(take) for take in ends)})}
    cells = [("in the file", "its shapes", "nearest in the model", "its shape")]
    for path in list(wrong or renamed)[:LISTED]:
        close = near(renamed[path], layers)
        here = ", ".join(str(getattr(getattr(layers[other], "weight", None), "shape", "")) for other in close)
        cells.append((path, shapes[path], ", ".join(close) or "none", here))
    lines = table(cells, left=range(4))
    more = len(wrong or renamed) - LISTED
    lines += [f"... and {more} more"] if more > 0 else []
    lines.append(f"{len(wrong or renamed)} of {len(renamed)} paths mean no layer of this model, or more than one")
    change = _suggestion(list(renamed.values()), layers)
    if change and hint:
        lines.append(f"If these are the same layers, say so: mapping={{{change[0]!r}: {change[1]!r}}}")
    return lines


def near(path: str, layers: Iterable[str]) -> list[str]:
    """The paths of the model with the longest common end, at most two; else those that look alike."""
    parts = path.split(".")[::-1]
    best = 1
    found: list[str] = []
    for layer in layers:
        n = 0
        for a, b in zip(parts, layer.split(".")[::-1]):
            if a != b:
                break
            n += 1
        if n > best or (n == best and n):
            best, found = n, [*(found if n == best else []), layer]
    return found[:2] or nearest(path, layers, 2)


def _suggestion(paths: list[str], layers: Mapping[str, Any]) -> tuple[str, str] | None:
    """One prefix and what to put in its place, with which all paths fit; None if there is not exactly one such pair."""
    found = set()
    for other in near(paths[0], layers):
        own, theirs = paths[0].split("."), other.split(".")
        same = 0
        while same < min(len(own), len(theirs)) and own[-1 - same] == theirs[-1 - same]:
            same += 1
        pair = tuple("".join(f"{part}." for part in parts[:len(parts) - same]) for parts in (own, theirs))
        if same and all(path.startswith(pair[0]) and pair[1] + path[len(pair[0]):] in layers for path in paths):
            found.add(pair)
    return found.pop() if len(found) == 1 else None  # type: ignore[return-value]
