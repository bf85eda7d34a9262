"""Which tensors of a base the adapters change, and everything that does not fit, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy

from ...errors import FormatError, MiniloraError
from ...flags import option
from ...lora.config_checks import nearest
from ...lora.layers.update import merged_bias
from ..placing.fingerprint import compare, forced_words
from ..placing.names import Mapped, NameMapping, resolve_in
from ..placing.tied import pair_in, said_in_head
from .checkpoint import Checkpoint
from .layers import Orientation, layer_of
from .new_paths import is_new, without_prefix
from .site import Given, Part, Site, as_matrix, wide_name
from .tied import Tie, tie_of

__all__ = ["FLOATS", "FOUR_BITS", "Fitting"]

Array = Any
FLOATS = ("F16", "BF16", "F32", "F64")
FOUR_BITS = ("NF4", "FP4")
ROWS = 1 << 18  # numbers compared together


class Fitting:
    """The sites of one merge, and what is wrong, until all of it is known.

    Attributes
    ----------
    sites : dict of str to Site
        By the name of the tensor.
    problems, notes : list of str
    forced : dict of str to str
        Why an adapter is of another base, by its label, where that was overruled.
    fingerprints : dict of str to str
        What became of the base's fingerprint, by label.
    changes : dict of str to object
        Fields of config.json.
    """

    def __init__(self, base: Checkpoint, given: Sequence[Given], *, mapping: NameMapping | None = None, force: bool = False,
                 untie: bool = False) -> None:
        self.base, self.given, self.mapping, self.force, self.untie = base, given, mapping, force, untie
        self.state = base.state
        self.sites: dict[str, Site] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.forced: dict[str, str] = {}
        self.fingerprints: dict[str, str] = {}
        self.changes: dict[str, Any] = {}
        self.tie: Tie | None = tie_of(base.state, base.config)
        self.in_head: set[tuple[str, str]] = set()  # label and path of updates of a table that take part in the logits
        self.mapped: dict[str, dict[str, str]] = {}
        self.layers = {name.rpartition(".")[0]: SimpleNamespace(weight=SimpleNamespace(shape=shape))
                       for name, shape in base.state.shapes.items() if "." in name}
        if self.tie is not None and self.tie.tied:
            table = SimpleNamespace(weight=SimpleNamespace(shape=base.state.shapes[self.tie.table]))
            self.layers.setdefault(self.tie.head.rpartition(".")[0], table)

    def fit(self) -> None:
        """Find the sites, and note what does not fit."""
        how = self.base.quantised()
        if how and not self.base.four_bits:
            raise FormatError(f"{self.base.path}: the base is quantised ({how}): rounded to its few bits again, the update "
                              "would be gone. Merge into the base that it was made from, or leave the adapter beside it")
        for given in self.given:
            self.names(given)
        if self.problems:
            return
        for given in self.given:
            self.places(given)
        self.orient()
        self.tied()
        for site in list(self.sites.values()):
            self.attempt(site.name, lambda: self.check(site))
        for given in () if self.problems else self.given:
            self.attempt(given.label, lambda: self.fingerprint(given))

    def attempt(self, what: str, call: Any) -> None:
        try:
            call()
        except MiniloraError as error:
            self.problems.append(f"{what}: {error}")

    # -- what is meant --------------------------------------------------------------------------------------------------

    def names(self, given: Given) -> None:
        """Find the layer for every path of an adapter. A module that is saved whole, and that the base lacks, is new."""
        shapes = given.saved.shapes()
        new = {path: text for path, text in shapes.items() if is_new(given.saved, path, self.layers, self.mapping is not None)}
        old = {path: text for path, text in shapes.items() if path not in new}
        try:
            found = resolve_in(old, self.layers, self.mapping) if old else Mapped({}, "")
        except FormatError as error:
            text = str(error).replace("this model; nothing was changed", f"{self.base.path}; nothing was written")
            self.problems.append(f"{given.label}: {text}")
            return
        self.notes += [f"{given.label}: names: {found.how}"] if found.how else []
        self.mapped[given.label] = {**found.paths, **without_prefix(new, found.paths)}

    def places(self, given: Given) -> None:
        saved, paths = given.saved, self.mapped[given.label]
        in_head = said_in_head(saved)
        pair = pair_in(saved.updates) if self.tie is not None and self.tie.tied else None
        if pair is not None and paths[pair[0]] == self.tie_owner("head"):
            in_head.add(pair[1])
        else:
            pair = None
        self.in_head |= {(given.label, path) for path in in_head}
        for path in saved.updates:
            if pair is None or path != pair[0]:
                self.site(f"{paths[path]}.weight", path).parts.append(Part(given, path))
        for path, tokens in saved.tokens.items():
            self.put(given, f"{paths[path]}.weight", path, "tokens", tokens)
        for group in (saved.saved, saved.biases):
            for name, array in group.items():
                owner, _, last = name.rpartition(".")
                self.put(given, f"{paths[owner]}.{last}", name, "whole", array)

    def tie_owner(self, which: str) -> str:
        return getattr(self.tie, which, "").rpartition(".")[0]

    def site(self, name: str, path: str) -> Site:
        if name not in self.sites:
            source = name if name in self.state else None
            if source is None and self.tie is not None and self.tie.tied and name == self.tie.head:
                source = self.tie.table
            self.sites[name] = Site(name, source)
        return self.sites[name]

    def put(self, given: Given, name: str, path: str, what: str, value: Any) -> None:
        """What takes a tensor's place, or that of some of its rows: from one adapter only, and not beside an update."""
        array = value if what == "whole" else value.rows
        if not array.dtype.name.startswith(("float", "bfloat")) and (name not in self.state or
                                                                     self.state.dtypes[name] in FLOATS):
            self.problems.append(f"{path} of {given.label}: expected floating-point numbers, got {array.dtype}")
        elif what == "whole" and self.is_own(name, array):
            self.notes.append(f"{given.label}: {path} equals the base's own")
        else:
            site = self.site(name, path)
            if getattr(site, what) is not None:
                self.problems.append(f"{path}: two of the adapters would replace it: only one can. Merge them one after the "
                                     "other, or take it out of one")
            setattr(site, what, value)
            if given.weight != 1.0:
                self.notes.append(f"{given.label}: {path} is replaced as a whole, whatever the weight {given.weight:g}")

    def is_own(self, name: str, array: Array) -> bool:
        """Whether these are the numbers that the base has there."""
        if self.tie is not None and self.tie.tied and name == self.tie.head and name not in self.state:
            name = self.tie.table
        if name not in self.state or self.state.shapes[name] != array.shape or self.state.dtypes[name] not in FLOATS:
            return False
        own, other = as_matrix(self.state[name]), as_matrix(array)
        rows = max(1, ROWS // max(1, own.shape[1]))
        with numpy.errstate(all="ignore"):
            return all(numpy.array_equal(own[i:i + rows], other[i:i + rows].astype(own.dtype))
                       for i in range(0, len(own), rows))

    def orient(self) -> None:
        linear = [(site.name.rpartition(".")[0], self.state.shapes[site.source], part.given.saved.updates[part.path])
                  for site in self.sites.values() if site.source for part in site.parts]
        found = Orientation(self.base.config, linear, any(given.saved.config.fan_in_fan_out for given in self.given))
        for site in self.sites.values():
            if site.parts and site.source:
                first = site.parts[0]
                site.turned = found.turned(site.name.rpartition(".")[0], self.state.shapes[site.source],
                                           first.given.saved.updates[first.path])

    # -- tied tables ----------------------------------------------------------------------------------------------------

    def tied(self) -> None:
        tie = self.tie
        if tie is None:
            return
        table, head = self.sites.get(tie.table), self.sites.get(tie.head)
        if tie.unsure and table is not None and (table.parts or table.whole is not None):
            self.notes.append(f"{tie.table}: without a config.json nothing tells whether it makes the logits too; it is taken "
                              "not to")
        if not tie.tied:
            return
        if head is not None and table is not None and head.whole is not None and table.whole is not None and \
                not head.parts and not table.parts and numpy.array_equal(head.whole, table.whole):
            if tie.head not in self.state:
                del self.sites[tie.head]
            return
        apart = [f"{part.path} of {part.given.label}" for part in (table.parts if table else [])
                 if (part.given.label, part.path) not in self.in_head]
        apart += [f"{tie.table} as a whole"] if table is not None and table.whole is not None else []
        apart += [f"{part.path} of {part.given.label}" for part in head.parts] if head else []
        apart += [f"{tie.head} as a whole"] if head is not None and head.whole is not None else []
        if apart and not self.untie:
            size = self.state[tie.table].nbytes
            self.problems.append(
                f"{tie.table} is tied to the head: one tensor for tokens and logits (tie_word_embeddings). The adapter changes "
                f"only one side of it ({', '.join(apart[:3])}), and merged it would change both. To write a head of its own "
                f"({size:,} bytes more) and to say so in config.json: {option('untie=True', '--untie')}")
        elif apart or (table is not None and tie.head in self.state):
            self.write_head(tie, table, bool(apart))

    def write_head(self, tie: Tie, table: Site | None, apart: bool) -> None:
        """A head beside the table, with those of the table's changes that are for both."""
        head = self.sites.setdefault(tie.head, Site(tie.head, tie.head if tie.head in self.state else tie.table))
        if table is not None:
            head.parts[:0] = [part for part in table.parts if (part.given.label, part.path) in self.in_head]
            head.tokens = table.tokens
        if apart:
            self.changes["tie_word_embeddings"] = False
            self.notes.append(f"{tie.head} is a tensor of its own now, and no longer tied to {tie.table}")

    # -- what fits ------------------------------------------------------------------------------------------------------

    def check(self, site: Site) -> None:
        """Whether a site's updates, or what replaces it, fit the tensor."""
        if site.source is None:
            if site.parts or site.tokens is not None or site.whole is None:
                close = nearest(site.name, self.state, 1)
                raise FormatError(f"the base has no such tensor{f' (the nearest is {close[0]})' if close else ''}")
            self.notes.append(f"{site.name} {site.whole.shape} is new: the base has none")
            return
        shape, dtype = self.state.shapes[site.source], self.state.dtypes[site.source]
        if dtype not in (*FLOATS, *FOUR_BITS) and site.whole is None:
            raise FormatError(f"the base has {dtype} there, no floating-point numbers: it is quantised, and rounded to its few "
                              "bits again the update would be gone. Merge into the base that it was made from")
        if bool(site.parts) + (site.tokens is not None) + (site.whole is not None) > 1:
            raise FormatError("an adapter has an update of it, and it is replaced, or some of its rows: it can be one")
        if site.whole is not None and site.whole.shape != shape:
            self.resized(site, shape)
        if site.tokens is not None:
            indices, rows = site.tokens
            if len(shape) != 2 or rows.shape != (len(indices), shape[1]) or not all(0 <= i < shape[0] for i in indices):
                raise FormatError(f"expected rows {(len(indices), *shape[1:])} of a table {shape}, got {rows.shape} for rows "
                                  f"{', '.join(map(str, indices[:5]))}")
        if site.parts:
            self.check_updates(site)

    def check_updates(self, site: Site) -> None:
        owner = site.name.rpartition(".")[0]
        name = f"{owner}.bias"
        replaced = self.sites.get(name)
        bias = replaced.whole if replaced is not None else self.state[name] if name in self.state else None
        if bias is not None:
            bias = bias.astype(wide_name(bias.dtype))  # rounded once, when it is written
        layer = site.layer(self.state, bias, fits_only=True)
        if layer.changes_bias():
            total = merged_bias(layer)
            self.sites[name] = Site(name, name if name in self.state else None, whole=total)

    def resized(self, site: Site, shape: tuple[int, ...]) -> None:
        """Another number of rows: a longer table of tokens, or a head with other classes."""
        assert site.whole is not None
        if site.whole.shape[1:] != shape[1:] or not len(site.whole):
            raise FormatError(f"expected {shape}, got {site.whole.shape}")
        rows = len(site.whole)
        if self.tie is not None and site.name in (self.tie.table, self.tie.head):
            other = self.tie.head if site.name == self.tie.table else self.tie.table
            partner = self.sites.get(other)
            beside = len(partner.whole) if partner is not None and partner.whole is not None else \
                self.state.shapes[other][0] if other in self.state else rows
            if beside != rows:
                raise FormatError(f"it would have {rows} rows, and {other} has {beside}: the vocabulary must be one")
            if (self.base.config or {}).get("vocab_size") == shape[0]:
                self.changes["vocab_size"] = rows
        self.notes.append(f"{site.name}: {rows} rows in the place of {shape[0]}")

    def fingerprint(self, given: Given) -> None:
        """Whether this is the base that the adapter belongs to; with `force` it is only written down."""
        updates, metadata = given.saved.updates, given.saved.metadata
        layers = {part.path: layer_of(self.state[site.source], updates[part.path], site.turned)
                  for site in self.sites.values() if site.source for part in site.parts if part.given is given}
        if not layers:
            return
        words, different, forced = compare(metadata, layers, {path: u.s for path, u in updates.items() if path in layers})
        self.fingerprints[given.label] = words
        if different and self.force:
            self.forced[given.label] = self.fingerprints[given.label] = forced_words(different)
        elif different:
            self.problems += [f"another base: {given.label}: {line}" for line in different]
        elif forced:
            self.forced[given.label] = forced

    def refuse(self) -> None:
        """Raise what is wrong, if anything is."""
        if self.problems:
            cure = [f"To merge all the same: {option('force=True', '--force')}: it is written down beside the result"] \
                if any(problem.startswith("another base") for problem in self.problems) else []
            raise FormatError("\n  ".join([f"merge into {self.base.path}: nothing was written:", *self.problems, *cure]))
