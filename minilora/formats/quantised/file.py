"""A file with 4-bit weights as a mapping of what its tensors mean: a weight is one entry, of the shape that it stands for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import FormatError
from ...stored import Stored
from ..tensors.reading import StateFile
from .layout import STATE, check_numbers, check_weight, four_bit, owner_of
from .settings import FIELD, Settings, read_settings
from .state import State

__all__ = ["QuantisedFile", "as_said", "quantised_names"]

MOST = 12  # problems that are shown

Array = Any


class QuantisedFile(Mapping[str, Any]):
    """The tensors of a checkpoint, those of a 4-bit weight as one.

    What a weight is called, and how it lies, is as in the unquantised file: with the same name, and as (in, out) where that
    has it so. Its dtype is ``"NF4"`` or ``"FP4"``; asking for it gives a `FourBit` (of one that lies as (in, out), its
    transpose), which is a view of the file. Everything else is as in `StateFile`.

    Parameters
    ----------
    file : StateFile
    settings : Settings
    turned : tuple of str
        Endings of the names of weights that the unquantised file has as (in, out).

    Attributes
    ----------
    states : dict of str to State
        What each 4-bit weight is.
    members : dict of str to list of str
        The tensors of the file that an entry consists of.

    Raises
    ------
    FormatError
        If weights and what belongs to them do not fit together: all of it in one message.
    """

    def __init__(self, file: StateFile, settings: Settings, turned: tuple[str, ...] = ()) -> None:
        self.file, self.settings, self.turned = file, settings, turned
        self.path, self.metadata, self.parts = file.path, file.metadata, file.parts
        self.states: dict[str, State] = {}
        wrong: dict[str, str] = {}
        for name in quantised_names(file):
            try:
                self.states[name] = check_weight(file, name, settings.kind)
            except FormatError as error:
                wrong[name] = str(error)
        owned = {name: owner for name in file.shapes if (owner := owner_of(name))}
        problems = [f"{name}: {error}" for name, error in wrong.items()]
        problems += [f"{name}: it belongs to a 4-bit weight, and {owner} is none" for name, owner in owned.items()
                     if owner not in self.states and owner not in wrong]
        if not self.states and not problems:
            problems = [f"config.json says {settings.kind} ({FIELD}), and no weight is: take {FIELD} out of it, or take the "
                        "file that belongs to it"]
        refuse(file.path, problems)
        own = [name for name in file.shapes if name not in owned]
        self.members: dict[str, list[str]] = {name: [name] for name in own}
        for name, owner in owned.items():
            self.members[owner].append(name)
        self.shapes = {name: self._shape(name) for name in own}
        self.dtypes = {name: self.states[name].kind.upper() if name in self.states else file.dtypes[name] for name in own}

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.states:
            return self.file.shapes[name]
        rows, columns = self.states[name].shape
        return (columns, rows) if name.endswith(self.turned) else (rows, columns)

    def check(self, names: Iterable[str] | None = None) -> None:
        """Raise `FormatError` if the scales of a weight (of all) are no scales. They are read for it."""
        problems = [f"{name}: {problem}" for name in (self.states if names is None else names) if name in self.states
                    for problem in check_numbers(self.file, name, self.states[name])]
        refuse(self.path, problems)

    def __getitem__(self, name: str) -> Any:
        if name not in self.states:
            if name not in self.shapes:
                raise KeyError(name)
            return self.file[name]
        self.check([name])
        weight: Stored = four_bit(self.file, name, self.states[name])
        return weight.T if name.endswith(self.turned) else weight

    def place(self, name: str) -> Any:
        """The file that a tensor, or the codes of a weight, lies in, and where in it."""
        return self.file.place(name)

    def let_go(self, name: str, begin: int, end: int) -> None:
        """As `StateFile.let_go`. Of a 4-bit weight, all that is read: offsets are those of its numbers, not of its codes."""
        if name in self.states:
            begin, end = 0, math.prod(self.file.shapes[name])
        self.file.let_go(name, begin, end)

    def held(self, name: str) -> int:
        """The bytes of an entry in the file."""
        return sum(entry.end - entry.begin for part in self.members[name] for _, entry in [self.file.place(part)])

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # without making an array

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __repr__(self) -> str:
        return f"<QuantisedFile {str(self.path)!r}: {len(self.states)} of {len(self)} tensors in {self.settings.kind}>"


def quantised_names(file: StateFile) -> list[str]:
    """The weights that have words of how they are quantised, or bytes with scales."""
    said = {owner for name in file.shapes if STATE in name and (owner := owner_of(name))}
    codes = {name for name in file.shapes if f"{name}.absmax" in file and file.dtypes[name] == "U8"}
    return [name for name in file.shapes if name in said or name in codes] + sorted(said - set(file.shapes))


def refuse(path: Path, problems: list[str]) -> None:
    """Raise what is wrong, if anything is."""
    if problems:
        more = [f"... and {len(problems) - MOST} more"] if len(problems) > MOST else []
        raise FormatError("\n  ".join([f"{path}: the 4-bit weights are not as bitsandbytes writes them; nothing was loaded:",
                                       *problems[:MOST], *more]))


def as_said(file: StateFile, config: Mapping[str, Any] | None, turned: tuple[str, ...] = ()) -> Any:
    """The file as its config says that it is: a `QuantisedFile` of a base in 4 bits, else as it is.

    Raises
    ------
    FormatError
        As `read_settings` and `QuantisedFile`; and if the file has 4-bit weights, and the config says nothing of them.
    """
    said = (config or {}).get(FIELD)
    if said:
        try:
            return QuantisedFile(file, read_settings(said), turned)
        except FormatError as error:
            if str(file.path) in str(error):
                raise
            raise FormatError(f"{file.path.parent / 'config.json'}: {error}") from error
    strays = [name for name in file.shapes if owner_of(name)]
    if strays:
        raise FormatError(f"{file.path}: {strays[0]} and {len(strays) - 1} more belong to 4-bit weights, and config.json "
                          f"beside it says nothing of them: write {FIELD} into it, as transformers does, or take the "
                          "config.json that belongs to the file")
    return file
