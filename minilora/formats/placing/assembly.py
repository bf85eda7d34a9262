"""The parts of an adapter file as parts of one model: made ready beside it, put in when all of them fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy

from ... import backend, nn
from ...errors import FormatError, MiniloraError, StateError
from ...lora.adapters.finite import nonfinite
from ...lora.adapters.injection import replace
from ...lora.adapters.inventory import inventory, tied_head
from ...lora.adapters.switching import activate
from ...lora.adapters.switching import bias_mode as mode_of
from ...lora.config import Config
from ...lora.layers.adapter import Adapter
from ...lora.layers.base import AdaptedLayer
from ...lora.layers.embedding import Embedding
from ...lora.layers.places import layers_of, named_through, saved_of
from ...lora.layers.saved import SavedModule
from ...lora.layers.tokens import TokenTable
from ...tensor import Parameter
from ..adapters.saved import SavedAdapter, Update
from .fingerprint import FORCED, KEY, compare, exact_scalings, forced_words
from .fitting import adapter_for, on_host
from .names import Mapped, NameMapping, resolve
from .report import LoadedLayer, LoadReport
from .tied import heads_of, pair_in, said_in_head
from .whole import as_base, bias_mode, copies_of, missing_biases, places_of

__all__ = ["Assembly"]

Array = Any


class _Ready(NamedTuple):
    """An adapter that fits, with what its row in the report says."""

    base: nn.Module
    layer: AdaptedLayer
    adapter: Adapter
    update: Update


class Assembly:
    """One load: what is ready to be put in, and what is wrong, until all of it is known."""

    def __init__(self, model: nn.Module, saved: SavedAdapter, name: str, mapping: NameMapping | None, force: bool) -> None:
        self.model, self.name, self.mapping, self.force = model, name, mapping, force
        self.heads = heads_of(model)
        self.in_head = said_in_head(saved)
        pair = pair_in(saved.updates) if self.heads else None
        if pair is not None:  # one update of a table that makes the logits, written as two
            saved = dataclasses.replace(saved, updates={path: u for path, u in saved.updates.items() if path != pair[0]})
            self.in_head.add(pair[1])
        self.saved = saved
        self.problems: list[str] = []
        self.notes = list(saved.notes)
        self.mapped = Mapped({}, "")
        self.config: Config = saved.config
        self.ready: dict[str, _Ready] = {}
        self.wholes: dict[str, nn.Module] = {}
        self.tables: dict[str, tuple[int, ...]] = {}
        self.new_biases: dict[str, tuple[Parameter, Array]] = {}
        self.fingerprint, self.forced = "", False
        self.modules = named_through(model)

    def fit(self) -> None:
        """Make all parts ready, and note what does not fit."""
        self.names()
        self.layers()
        self.biases()
        self.copies()
        self.tokens()
        self.compare()

    # -- what is meant --------------------------------------------------------------------------------------------------

    def names(self) -> None:
        """Find the module for every path; nothing else can be said before."""
        saved = self.saved
        if not saved.updates:
            raise FormatError("the file holds no update of any layer: there is nothing to put into a model")
        shapes = saved.shapes()
        try:
            self.mapped = resolve(shapes, self.model, self.mapping)
        except FormatError as error:
            tied = tied_head(inventory(self.model))
            if tied and any(path.split(".")[-1] == "lm_head" for path in shapes):
                raise FormatError(f"{error}\n  lm_head{tied}") from None
            raise

    def parameter_path(self, path: str) -> str:
        owner, _, name = path.rpartition(".")
        return f"{self.mapped.paths[owner]}.{name}"

    def attempt(self, path: str, what: Callable[[], None]) -> None:
        try:
            what()
        except MiniloraError as error:
            self.problems.append(f"{path}: {error}")

    # -- what fits ------------------------------------------------------------------------------------------------------

    def layers(self) -> None:
        saved, rng, seen = self.saved, numpy.random.default_rng(0), dict[int, str]()
        adapted = [self.mapped.paths[path] for path in saved.updates]
        biases = [self.parameter_path(path) for path in saved.biases]
        mode, notes = bias_mode(biases, saved.config, adapted)
        self.notes += notes
        self.config = config = saved.config if mode == saved.config.bias else dataclasses.replace(saved.config, bias=mode)
        scalings = exact_scalings(saved.metadata, {path: update.s for path, update in saved.updates.items()})
        for path, update in saved.updates.items():
            here = self.mapped.paths[path]
            base = self.modules[here]

            def fit() -> None:
                if seen.setdefault(id(base), path) != path:
                    raise FormatError(f"this is the layer of {seen[id(base)]} at another place")
                exact = dataclasses.replace(update, s=scalings[path])
                ready = self.ready[here] = _Ready(base, *adapter_for(base, exact, config, rng, path), update)
                ready.adapter.in_head = path in self.in_head
                if isinstance(ready.layer, Embedding) and here in self.heads:
                    ready.layer.makes_logits = True

            self.attempt(path, fit)
        zero = all(not numpy.any(u.A) or not numpy.any(u.B) for u in saved.updates.values())
        if zero and not any(note.startswith("untrained") for note in self.notes):  # what `read_adapter` says
            self.notes.append("untrained: every update is 0")

    def biases(self) -> None:
        if self.config.bias == "none":
            return
        owners = {name for layer in layers_of(self.model).values() for name, adapter in layer.adapters.items()
                  if mode_of(adapter) != "none"}
        if owners:
            raise StateError(f"load_adapter: the file sets biases of the base, and so does adapter {owners.pop()!r} of this "
                             "model: only one can. Remove that one, or load into another copy of the model")
        for path, array in self.saved.biases.items():
            here = self.parameter_path(path)
            p = getattr(self.modules[here.rpartition(".")[0]], here.rpartition(".")[2], None)
            if not isinstance(p, Parameter) or p.shape != array.shape:
                there = f"expected {p.shape}" if isinstance(p, Parameter) else "the model has no such bias"
                self.problems.append(f"{path} {array.shape}: {there}")
            else:
                self.attempt(path, lambda: self.new_biases.update({here: (p, on_host(array, p.dtype))}))
        layers = {path: ready.layer for path, ready in self.ready.items()}
        wholes = [self.mapped.paths[path.rpartition(".")[0]] for path in self.saved.saved]
        self.problems += [f"{path}: missing in the file, which has bias={self.config.bias!r}"
                          for path in missing_biases(self.config.bias, self.new_biases, self.model, layers, wholes)]

    def copies(self) -> None:
        arrays = {self.parameter_path(path): array for path, array in self.saved.saved.items()}
        keys = {self.parameter_path(path): path for path in self.saved.saved}
        adapted = {self.mapped.paths[path] for path in self.saved.updates}
        for place, paths in places_of(arrays, self.model, self.config, adapted).items():
            module = self.modules[place]
            inside = {path[len(place) + 1:]: arrays[path] for path in paths}
            if place in adapted:
                self.whole_table(place, inside, keys)
                continue
            if isinstance(module, AdaptedLayer):
                self.problems.append(f"{place}: the file replaces it as a whole, and other adapters of this model adapt it: "
                                     "remove them first, or load into another copy of the model")
                continue

            def copied() -> None:
                self.wholes[place], notes = copies_of(place, module, inside)
                self.notes.extend(notes)

            self.attempt(place, copied)
        named = {path for path in self.wholes if path.endswith(tuple(self.config.modules_to_save or ("\0",)))}
        self.notes += [f"{path} is in the file as a whole, though the config does not name it" for path in self.wholes
                       if path not in named]

    def tokens(self) -> None:
        """Rows of embeddings: the table with those rows takes the embedding's place."""
        for path, token in self.saved.tokens.items():
            here = self.mapped.paths[path]
            base: Any = self.modules[here]

            def fit() -> None:
                if here in self.ready or here in self.wholes:
                    raise FormatError("the file has rows of this embedding, and an update or the whole of it: it can be one")
                if isinstance(base, nn.Embedding) and token.rows.shape != (len(token.indices), base.embedding_dim):
                    raise FormatError(f"expected rows {(len(token.indices), base.embedding_dim)}, got {token.rows.shape}")
                table = TokenTable(base, token.indices)
                table.rows = Parameter(backend.to_device(on_host(token.rows, table.rows.dtype), base.weight.device))
                self.wholes[here], self.tables[here] = table, table.indices

            self.attempt(path, fit)

    def whole_table(self, place: str, inside: Mapping[str, Array], keys: Mapping[str, str]) -> None:
        """A weight that comes along with the update of the same layer: PEFT saves embeddings so. It must be the base's."""
        for name, array in inside.items():
            own = getattr(self.modules[place], name, None)
            if isinstance(own, Parameter) and own.shape == array.shape and \
                    numpy.array_equal(backend.to_host(own.data), on_host(array, own.dtype)):
                self.notes.append(f"{place}.{name} is in the file beside its update, and equals that of this base")
            else:
                shape = f"{own.shape}" if isinstance(own, Parameter) else "none"
                self.problems.append(
                    f"{place}.{name} {array.shape}: the file brings the base's own {name} along, beside its update, and it is "
                    f"another one than this model's ({shape}): the vocabulary was changed, or that layer trained"
                    + as_base(place, self.modules[place], keys[f"{place}.{name}"], array))

    def compare(self) -> None:
        """Whether this is the base that the file belongs to; with `force` it is only written down."""
        saved = self.saved
        layers = {path: self.ready[here].layer for path in saved.updates if (here := self.mapped.paths[path]) in self.ready}
        words, different, forced = compare(saved.metadata, layers, {path: update.s for path, update in saved.updates.items()})
        own = saved.metadata if saved.dialect == "peft" else {}  # other dialects' metadata are about their own files
        origin = {key: text for key, text in own.items() if key not in (KEY, "format")}
        if different and self.force:
            self.fingerprint = words = forced_words(different)
            self.notes.append(f"another base: {words}")
            forced = words
        elif different:
            self.problems += [f"another base: {line}" for line in different]
        self.fingerprint, self.forced = words, bool(different) and self.force
        for ready in self.ready.values():
            ready.adapter.origin = {**origin, FORCED: forced} if forced else origin

    def finite(self) -> None:
        for path, ready in self.ready.items():
            self.problems += nonfinite(path, {name: p.data for name, p in ready.adapter.own_parameters()})
        for path, module in self.wholes.items():
            self.problems += nonfinite(path, {name: p.data for name, p in module.named_parameters()})
        for path, (_, array) in self.new_biases.items():
            self.problems += nonfinite("", {path: array})

    def refuse(self, origin: str) -> None:
        if self.problems:
            cures = {"not finite": "If NaN and inf are meant, give allow_nonfinite=True",
                     "another base": "To load it all the same, give force=True: it is written down, also in the next file"}
            cure = [text for start, text in cures.items() if any(problem.startswith(start) for problem in self.problems)]
            raise FormatError("\n  ".join([f"the adapter from {origin} does not fit this model; nothing was changed:",
                                           *self.problems, *cure]))

    # -- putting in -----------------------------------------------------------------------------------------------------

    def written(self) -> list[Array]:
        """The arrays that are written in place: biases in an optimizer's flat array."""
        return [p.data for p, _ in self.new_biases.values() if p.room is not None]

    def put_in(self, origin: str, trainable: bool) -> LoadReport:
        new: dict[int, Any] = {}
        for ready in self.ready.values():
            ready.layer.attach(self.name, ready.adapter)
            new[id(ready.base)] = ready.layer
        wrappers = saved_of(self.model)
        for place, own in self.wholes.items():
            wrapper = wrappers.get(place)
            if wrapper is None:
                wrapper = new[id(self.modules[place])] = SavedModule(self.modules[place])
            wrapper.take(self.name, own)
        replace(self.model, new)
        for p, array in self.new_biases.values():
            data = backend.to_device(array, p.device)
            if p.room is None:
                p.data, p.grad = data, None
            else:
                p.data[...] = data
                p.version += 1
        activate(self.model, self.name, trainable=trainable)
        return self.report(origin)

    def report(self, origin: str) -> LoadReport:
        rows = []
        for path, (_, layer, adapter, update) in self.ready.items():
            more = ["DoRA"] if adapter.magnitude is not None else []
            more += ["logits too" if adapter.in_head else "not in the logits"] if path in self.heads else []
            more += ["lora_bias"] if adapter.lora_bias is not None else []
            more += [f"start of {self.config.init_lora_weights!r} computed again"] if adapter.start_A is not None else []
            rule = "alpha / sqrt r" if adapter.use_rslora else "alpha / r"
            rows.append(LoadedLayer(path, update.kind, adapter.r, adapter.lora_alpha, adapter.scaling, rule, ", ".join(more)))
        return LoadReport(self.name, origin, tuple(rows), tuple(path for path in self.wholes if path not in self.tables),
                          tuple(self.new_biases), self.tables, self.mapped.how,
                          self.fingerprint, self.forced, tuple(self.notes))
