"""Which tensor of a file is which parameter of a model: matched by name, checked by shape and kind, all problems in one table.

The common names are transformers': of a body behind the family's prefix (``bert.encoder...``), of a head without it. Names of a
file become common ones by taking off what wraps the whole model, by today's spelling of old endings, and by the prefix that
files of a bare body lack. Names of our models become common ones by the place of the body.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import FormatError
from ..families.contract import Family, Head

__all__ = ["QUANTISED", "Matched", "common_name", "match"]

WRAPPERS = ("module.", "_orig_mod.", "model.", "auto_model.", "0.")  # around the whole of a model, by how it was saved
KINDS = ("F64", "F32", "F16", "BF16")  # of the numbers of weights
QUANTISED = {"NF4", "FP4"}  # of weights of linear layers besides


class Matched(NamedTuple):
    """What was found.

    Attributes
    ----------
    taken : dict of str to str
        Path of a parameter to the name in the file.
    copies : list of (str, str)
        Names in the file of what must be equal, a tied weight and its copy.
    missing : list of str
        Paths of parameters of a head of which the file has nothing.
    aside : list of str
        Names of parts of other heads, which were left aside.
    """

    taken: dict[str, str]
    copies: list[tuple[str, str]]
    missing: list[str]
    aside: list[str]


def common_name(path: str, family: Family, head: Head) -> str:
    """What transformers calls a parameter of ours, in a model with a head."""
    if head.body:
        return family.prefix + path[len(head.body):] if path.startswith(head.body) else path
    return path if path.startswith(_outside(family)) else family.prefix + path


def _outside(family: Family) -> tuple[str, ...]:
    return tuple(part for part in family.others if not part.startswith(family.prefix))


def _common_names(names: Iterable[str], family: Family) -> dict[str, list[str]]:
    """Common name to the names of the file that mean it; more than one is a mistake of the file."""
    names = list(names)
    taken_off = {name: name for name in names}
    while True:
        wrapper = next((w for w in WRAPPERS if w != family.prefix and names and
                        all(name.startswith(w) for name in taken_off.values())), None)
        if wrapper is None:
            break
        taken_off = {name: rest.removeprefix(wrapper) for name, rest in taken_off.items()}
    bare = not any(rest.startswith(family.prefix) for rest in taken_off.values())
    found: dict[str, list[str]] = {}
    for name, rest in taken_off.items():
        for old, new in family.renamed:
            if rest.endswith(old):
                rest = rest.removesuffix(old) + new
        if bare and not rest.startswith(_outside(family)):
            rest = family.prefix + rest
        found.setdefault(rest, []).append(name)
    return found


def match(own: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], family: Family, head: Head,
          where: Path, new_head: bool = False, linear: Collection[str] = ()) -> Matched:
    """Find every parameter of a model among the tensors of a file.

    Parameters
    ----------
    own : mapping of str to Parameter
        By path.
    shapes, dtypes : mapping of str to tuple, and to str
        Of the tensors of the file, by name; dtypes as safetensors calls them.
    family, head : Family, Head
    where : Path
        For messages.
    new_head : bool
        Whether a head of which the file has nothing may be missing.
    linear : collection of str
        Paths of the weights that may be in 4 bits.

    Raises
    ------
    FormatError
        With one line for everything that is missing, unexpected, there twice, or of the wrong shape or kind.
    """
    names = _common_names(shapes, family)
    wanted = {common_name(path, family, head): path for path in own}
    problems = [f"twice       {' and '.join(sorted(given))} both mean {name}" for name, given in names.items()
                if len(given) > 1]
    found = {name: given[0] for name, given in names.items()}
    taken, copies, aside = {}, [], []
    unexpected = []
    for name, given in found.items():
        if name in wanted:
            taken[wanted[name]] = given
        elif name in head.tied:
            if head.tied[name] in found:
                copies.append((given, found[head.tied[name]]))
            elif head.tied[name] in wanted:  # the copy is there alone
                taken[wanted[head.tied[name]]] = given
        elif name.startswith(family.others):
            aside.append(given)
        elif not _is_buffer(name, f"{dtypes[given]} {tuple(shapes[given])}", family):
            unexpected.append((name, given))
    absent = _absent_parts(wanted, taken, family)
    missing = [(name, path) for name, path in wanted.items() if path not in taken and not (new_head and path in absent)]
    for path, given in taken.items():
        problems += _misfit(path, own[path].shape, given, tuple(shapes[given]), dtypes[given], family, path in linear)
    problems += [f"missing     {name} {own[path].shape}" for name, path in missing]
    problems += [_unexpected(name, given, shapes[given], [name for name, _ in missing]) for name, given in unexpected]
    if problems:
        raise FormatError("\n  ".join([f"{where}: the tensors are not those of {head.architecture}; nothing was loaded:",
                                       *problems, *_cures([path for _, path in missing], absent)]))
    return Matched(taken, copies, absent, aside)


def _absent_parts(wanted: Mapping[str, str], taken: Mapping[str, str], family: Family) -> list[str]:
    """Paths of parameters of parts of a head (and of a pooler) of which the file has nothing."""
    parts = [[path for name, path in wanted.items() if name.startswith(beginning)] for beginning in family.others]
    return [path for part in parts if not any(path in taken for path in part) for path in part]


def _is_buffer(name: str, kind: str, family: Family) -> bool:
    return any(re.search(ending + r"\Z", name) and re.fullmatch(kinds, kind) for ending, kinds in family.buffers)


def _misfit(path: str, shape: tuple[int, ...], given: str, got: tuple[int, ...], kind: str, family: Family,
            linear: bool) -> list[str]:
    expected = shape[::-1] if path.endswith(family.transposed) else shape
    lines = []
    if got != expected:
        why = ", which looks transposed" if got == expected[::-1] else ""
        lines.append(f"shape       {given}: expected {expected}, got {got}{why}")
    if kind in QUANTISED and not linear:
        lines.append(f"kind        {given}: it is in {kind}, and no linear layer: those alone are computed with in 4 bits")
    elif kind not in KINDS and kind not in QUANTISED:
        lines.append(f"kind        {given}: expected one of {', '.join(KINDS)}, got {kind}: is it quantised?")
    return lines


def _unexpected(name: str, given: str, shape: tuple[int, ...], missing: list[str]) -> str:
    near = get_close_matches(name, missing, 1)
    return f"unexpected  {given} {tuple(shape)}" + (f": is it {near[0]}?" if near else "")


def _cures(missing: list[str], absent: list[str]) -> list[str]:
    """What may help: a head that is not in the file can be begun anew."""
    if missing and set(missing) <= set(absent):
        return ["what is missing is a head. To begin with a new one: load(folder, head=..., labels=...); for the body alone: "
                'load(folder, head="base")']
    return []
