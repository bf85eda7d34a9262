"""loralib's dialect: the state dict of `lora_state_dict`, ``<module>.lora_A`` and ``<module>.lora_B``, and biases by its mode.

The file holds the attributes of loralib's layers and nothing else: r, lora_alpha and the kind of a layer live in the code that
built the model, so the caller gives them. Shapes:

    Linear        A (r, in)          B (out, r)
    Embedding     A (r, V)           B (d, r)            the same shapes: `embeddings` names them
    MergedLinear  A (m r, in)        B (m out / L, r)    m of L fused layers have an update: `enable_lora`
    Conv2d        A (r k, C_in k)    B (out k, r k)      kernel k x k, one group: `convolutions`

MergedLinear is one ordinary update of rank m r, with B block-diagonal: `lora.gradients.fused`. Conv2d's D is B A, of shape
(out k, C_in k), read in row-major order as (out, C_in, k, k). With row (o, a) for o k + a, the entries of output o are those of
its k rows one after the other:

    D[o, (a, c)] = sum_q B[(o, a), q] A[q, c]          a < k, c < C_in k, q < r k

So it is an update as PEFT has it, of rank r k^2: A'[(a, q), (b, c)] = [a = b] A[q, c] and B'[o, (a, q)] = B[(o, a), q], and
both are copies: exact. Where B is a Kronecker product with the identity, B[(o, a), (j, b)] = [a = b] B'[o, j], rank r is
enough, with A' = A in another shape; that is how an update of PEFT's, which always has this form, is written. Exact again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from ...errors import ConfigError, ShapeError
from ...lora.gradients.fused import block_diagonal, slots_of
from .dialect import Source, Written
from .parts import named, number, refuse, sorted_keys, update_of
from .saved import SavedAdapter, Update
from .scalings import alpha_for, config_of, folded, kept, most_common, rounding_note, unsaid

__all__ = ["Loralib"]

Array = Any
Enabled = Sequence[bool] | Mapping[str, Sequence[bool]] | None
PARTS = {"lora_A": "A", "lora_B": "B", "magnitude": "magnitude", "lora_bias": "lora_bias"}  # the last two: minilora's own
OF_THE_BASE = ("weight", "bias")


def _split(key: str) -> tuple[str, str] | None:
    module, _, leaf = key.rpartition(".")
    if leaf in PARTS:
        return module, PARTS[leaf]
    return (module, leaf) if leaf in OF_THE_BASE and module else None


class Loralib:
    """State dicts of loralib, and of `lora.lora_state_dict` <-> `SavedAdapter`."""

    name = "loralib"

    def recognise(self, source: Source) -> bool:
        """By keys that end in lora_A or lora_B, with nothing behind it."""
        return "peft_type" not in (source.config or {}) and any(
            f".{key}".endswith((".lora_A", ".lora_B")) for key in source.tensors)

    def read(self, source: Source, *, lora_alpha: float | None = None, r: int | None = None, enable_lora: Enabled = None,
             embeddings: Sequence[str] = (), convolutions: Mapping[str, int] | None = None) -> SavedAdapter:
        """An adapter from a state dict and the settings of the code that made it.

        Parameters
        ----------
        source : Source
        lora_alpha : float
            loralib's default is 1; here it must be said.
        r : int, optional
            The rank that the layers were made with. It follows from the tensors; given, it is checked.
        enable_lora : sequence of bool, or mapping of str to one, optional
            Of MergedLinear: of every one, or by name (a path or its end).
        embeddings : sequence of str
            Names of the layers that are embeddings.
        convolutions : mapping of str to int, optional
            Names of the layers that are Conv2d, each with its kernel size.

        Raises
        ------
        FormatError
            With all that is not understood, and the line to type for settings that are missing.
        """
        modules, problems = sorted_keys(source.tensors, _split)
        alpha = number(lora_alpha)
        if alpha is None:
            problems.append(f"lora_alpha: the file does not say it: read_adapter({str(source.path)!r}, lora_alpha=16); "
                            f"got {lora_alpha!r}")
        kinds = _Kinds(r, enable_lora, embeddings, convolutions or {}, str(source.path))
        updates: dict[str, Update] = {}
        base: dict[str, Array] = {}
        for path, parts in sorted(modules.items()):
            tensors = {part: source.tensors[key] for part, key in parts.items()}
            base.update({parts[part]: tensors[part] for part in OF_THE_BASE if part in parts})
            if tensors.keys() - set(OF_THE_BASE):
                if "weight" in tensors:
                    problems.append(f"{parts['weight']}: the weight of a layer with LoRA: this is a checkpoint of the whole "
                                    "model, and merged if it was saved in eval(). Save lora_state_dict(model)")
                update = kinds.update(path, tensors, alpha or 1.0, problems)
                if update is not None:
                    updates[path] = update
        problems += kinds.unused(modules)
        if not updates and not problems:
            problems.append("there is no lora_A and no lora_B in it")
        refuse(source.path, "this loralib state dict cannot be read", problems)
        whole = {path for path, parts in modules.items() if "weight" in parts}
        saved = {key: array for key, array in base.items() if key.rpartition(".")[0] in whole}
        biases = {key: array for key, array in base.items() if key not in saved}
        mode = "none" if not biases else "lora_only" if {key[:-5] for key in biases} <= updates.keys() else "all"
        config = config_of(updates, bias=mode, modules_to_save=sorted(whole) or None)
        return SavedAdapter(updates, config, self.name, saved, biases, metadata=dict(source.metadata), notes=kinds.notes())

    def write(self, adapter: SavedAdapter, *, lora_alpha: float | None = None, enable_lora: Enabled = None,
              fold: bool = False) -> Written:
        """The adapter as a state dict; the notes say with which r and lora_alpha the layers have to be made.

        Parameters
        ----------
        adapter : SavedAdapter
        lora_alpha : float, optional
            Of the code that will load it. Default: that of most modules.
        enable_lora : sequence of bool, or mapping of str to one, optional
            The modules that are MergedLinear there: all, or by name.
        fold : bool
            Multiply scalings that lora_alpha / r does not give into B although that rounds it.

        Raises
        ------
        FormatError
            Where a state dict of loralib cannot say it: each module with the reason and a way out.
        """
        problems = unsaid(adapter, self.name, {"biases", "embedding", "convolution"})
        refuse("write_adapter", "loralib cannot say this adapter", problems)
        kinds = _Kinds(None, enable_lora, (), {}, "write_adapter")
        ranks = {path: kinds.rank(path, update, problems) for path, update in adapter.updates.items()}
        alphas = {path: alpha_for(update.s, ranks[path]) for path, update in adapter.updates.items()}
        alpha = most_common(alphas.values()) if lora_alpha is None else number(lora_alpha)
        if alpha is None:
            problems.append(f"lora_alpha={lora_alpha!r}: expected a finite number other than 0")
        wanted = {path: u.s if alpha is None or alphas[path] == alpha else alpha / ranks[path]
                  for path, u in adapter.updates.items()}
        updates, unfolded, rounded = folded(adapter.updates, wanted, fold)
        problems += [f"{line}: lora_alpha is {alpha:g} for all. fold=True rounds it" for line in unfolded]
        tensors: dict[str, Array] = {}
        for path, update in updates.items():
            A, B = kinds.factors(path, update, problems)
            start = f"{path}." if path else ""
            tensors.update({f"{start}lora_A": numpy.ascontiguousarray(A), f"{start}lora_B": numpy.ascontiguousarray(B)})
        problems += kinds.unused(updates)
        refuse("write_adapter", "loralib cannot say this adapter", problems)
        said = {path: update.s for path, update in updates.items()}
        notes = (*_settings(updates, ranks, alpha or 1.0), *rounding_note(rounded, updates))
        return Written({**tensors, **adapter.biases}, {**kept(adapter.metadata, said), "format": "pt"}, None,
                       ("lora.safetensors", ""), notes)


class _Kinds:
    """What each layer is, by what the caller says: the tensors tell it in part only."""

    def __init__(self, r: int | None, enable_lora: Enabled, embeddings: Sequence[str], convolutions: Mapping[str, int],
                 where: str) -> None:
        self.r, self.embeddings, self.convolutions, self.where = r, tuple(embeddings), convolutions, where
        self.for_all = None if isinstance(enable_lora, Mapping) or enable_lora is None else enable_lora
        self.by_name = dict(enable_lora) if isinstance(enable_lora, Mapping) else {}
        for on in ([] if self.for_all is None else [self.for_all]) + [*self.by_name.values()]:
            if not isinstance(on, (list, tuple)) or not on or not all(type(each) is bool for each in on):
                raise ConfigError(f"enable_lora: expected a list of True and False, one for each fused layer, got {on!r}")
        self.linear: list[str] = []

    def enabled(self, path: str) -> Sequence[bool] | None:
        found = [tuple(on) for name, on in self.by_name.items() if named(path, [name])]
        return found[0] if found else None

    def unused(self, paths: Any) -> list[str]:
        """A line for every name that no layer has."""
        given = [("enable_lora", self.by_name), ("embeddings", self.embeddings), ("convolutions", self.convolutions)]
        return [f"{option}: {name!r} names no layer of the file" for option, names in given for name in names
                if not any(named(path, [name]) for path in paths)]

    def notes(self) -> tuple[str, ...]:
        if not self.linear:
            return ()
        return (f"{len(self.linear)} modules were read as linear layers ({self.linear[0]} ...): the tensors do not tell "
                "embeddings and convolutions from them, embeddings= and convolutions= do",)

    def update(self, path: str, tensors: Mapping[str, Array], alpha: float, problems: list[str]) -> Update | None:
        """The update of a module, of whichever kind."""
        missing = [f"{path}: lora_{part} is missing" for part in ("A", "B") if part not in tensors]
        problems += missing
        if missing:
            return None
        A, B, kind, count = tensors["A"], tensors["B"], "linear", len(problems)
        kernel = next((k for name, k in self.convolutions.items() if named(path, [name])), None)
        on = self.enabled(path)
        if A.ndim > 2 or B.ndim > 2:
            r, kind = A.shape[0], "convolution"  # of minilora's own layers, as PEFT has it
        elif 0 in A.shape + B.shape or A.ndim != 2 or B.ndim != 2:
            r = 1  # refused below, with the shapes
        elif kernel is not None:
            A, B, r = self._convolution(path, A, B, kernel, problems)
            kind = "convolution"
        elif on is not None or (A.shape[0] != B.shape[1] and A.shape[0] % B.shape[1] == 0):
            A, B, r = self._fused(path, A, B, on or self.for_all, problems)
        else:
            r, kind = A.shape[0], "embedding" if named(path, self.embeddings) else "linear"
            self.linear += [path] if kind == "linear" else []
        if self.r not in (None, r) and len(problems) == count:
            problems.append(f"{path}: r={self.r}, and the tensors have {r}, A {tensors['A'].shape} and B {tensors['B'].shape}. "
                            "If this is MergedLinear or Conv2d, say enable_lora={...} or convolutions={...}")
        if len(problems) > count:
            return None
        return update_of(path, kind, A, B, alpha / max(r, 1), problems, bias=tensors.get("lora_bias"),  # type: ignore[arg-type]
                         magnitude=tensors.get("magnitude"))

    def _fused(self, path: str, A: Array, B: Array, on: Sequence[bool] | None,
               problems: list[str]) -> tuple[Array, Array, int]:
        r, m = B.shape[1], A.shape[0] // B.shape[1]
        if on is None:
            problems.append(f"{path}: A {A.shape} and B {B.shape}: MergedLinear with {m} of its layers enabled. Which ones the "
                            f"file does not say: read_adapter({self.where!r}, ..., enable_lora={[True, False, True][:m + 1]})")
            return A, B, r
        out = B.shape[0] // max(sum(on), 1) * len(on)
        try:
            A, B, _ = block_diagonal(A, B, 1.0, on, out)
        except (ConfigError, ShapeError) as error:
            problems.append(f"{path}: enable_lora={list(on)}: {error}")
        return A, B, r

    def _convolution(self, path: str, A: Array, B: Array, k: int, problems: list[str]) -> tuple[Array, Array, int]:
        rows = A.shape[0]
        if isinstance(k, bool) or not isinstance(k, int) or k < 1 or rows % k or A.shape[1] % k or B.shape[0] % k \
                or B.shape[1] != rows:
            problems.append(f"{path}: no convolution with kernel {k!r} has A {A.shape} and B {B.shape}: expected A (r k, C_in "
                            "k) and B (out k, r k)")
            return A, B, 1
        out, into, r = B.shape[0] // k, A.shape[1] // k, rows // k
        inner = B[::k, ::k]
        if (B == numpy.kron(inner, numpy.eye(k, dtype=B.dtype))).all():
            return A.reshape(r, into, k, k), inner.reshape(out, r, 1, 1), r
        whole = numpy.zeros((k, rows, k, into * k), dtype=A.dtype)
        for a in range(k):
            whole[a, :, a] = A
        return whole.reshape(k * rows, into, k, k), B.reshape(out, k * rows, 1, 1), r

    def rank(self, path: str, update: Update, problems: list[str]) -> int:
        """The r of loralib's layer that can hold an update."""
        on = self.enabled(path) or (self.for_all if update.kind == "linear" else None)
        m = sum(on) if on else 1
        if update.r % max(m, 1) or not m:
            problems.append(f"{path}: rank {update.r} has no equal parts for enable_lora={list(on or ())}")
            return update.r
        return update.r // m

    def factors(self, path: str, update: Update, problems: list[str]) -> tuple[Array, Array]:
        """A and B in loralib's shapes."""
        A, B = update.A, update.B
        if update.kind == "convolution":
            k = A.shape[-1]
            if A.ndim != 4 or A.shape[2] != k or B.shape[1] != update.r:
                problems.append(f"{path}: loralib's convolutions that work have a square kernel and one group, got A {A.shape} "
                                f"and B {B.shape}: write PEFT's dialect")
                return A, B
            return A.reshape(update.r * k, -1), numpy.kron(B.reshape(len(B), update.r), numpy.eye(k, dtype=B.dtype))
        on = self.enabled(path) or (self.for_all if update.kind == "linear" else None)
        if on is None:
            return A, B
        m = max(sum(on), 1)
        try:
            slots = slots_of("MergedLinear", on, len(B), None, A.shape, (len(B) // len(on) * m, update.r // m))
        except (ConfigError, ShapeError) as error:
            problems.append(f"{path}: {error}")
            return A, B
        own = numpy.concatenate([B[slot.outputs, slot.ranks] for slot in slots])
        if (block_diagonal(A, own, 1.0, on, len(B))[1] != B).any():
            problems.append(f"{path}: the layers of enable_lora={list(on)} share ranks here, and in MergedLinear each has "
                            "ranks of its own: leave it out, for an ordinary Linear")
        return A, own


def _settings(updates: Mapping[str, Update], ranks: Mapping[str, int], alpha: float) -> list[str]:
    """The note that says what the code has to make: a state dict says neither r nor lora_alpha."""
    common = most_common(ranks.values())
    others = [f"{path} r={r}" for path, r in ranks.items() if r != common]
    embeddings = [path for path, update in updates.items() if update.kind == "embedding"]
    convolutions = {path: update.A.shape[-1] for path, update in updates.items() if update.kind == "convolution"}
    line = f"the file does not say it: make the layers with r={common}, lora_alpha={alpha:g}"
    line += f" ({', '.join(others)})" if others else ""
    kinds = [f"embeddings={embeddings}"] if embeddings else []
    kinds += [f"convolutions={convolutions}"] if convolutions else []
    return [line + (f"; to read it here give {', '.join(kinds)} too" if kinds else "")]
