"""mlx-lm's dialect: adapters.safetensors beside an adapter_config.json with `fine_tune_type` and `lora_parameters`.

Keys are the module paths of the model: ``model.layers.3.self_attn.q_proj.lora_a``. Both factors are transposed beside PEFT's,
also where every size is the same: lora_a (in, r), lora_b (r, out), and DoRA's `m` (out,). The update is
scale (lora_a lora_b)^T: `scale` is s itself, with no alpha behind it. One rank and one scale hold for the whole adapter.

mlx-lm builds its layers from the config before it looks at the tensors, and refuses a tensor that has no place then:

    keys         names inside a layer (``self_attn.q_proj``), or whole paths outside of the layers (``lm_head``)
    num_layers   counted from the last layer; -1 stands for all

A layer that is built and has no tensors starts at B = 0 and changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from .dialect import Source, Written
from .parts import named, number, refuse, sorted_keys, update_of
from .saved import SavedAdapter, Update
from .scalings import config_of, folded, kept, most_common, padded, partly, rounding_note, unsaid, with_dtype

__all__ = ["Mlx"]

Array = Any
PARTS = {"lora_a": "A", "lora_b": "B", "m": "magnitude"}
# The names of embeddings in mlx-lm's models: shapes do not tell them from linear layers.
EMBEDDINGS = ("embed_in", "embed_tokens", "embeddings", "tok_embeddings", "word_embeddings", "wpe", "wte")
IN_LAYER = re.compile(r"(?P<list>(?:[^.]+\.)*?[^.\d][^.]*)\.(?P<index>\d{1,6})\.(?P<rest>.+)")


def _split(key: str) -> tuple[str, str] | None:
    module, dot, leaf = key.rpartition(".")
    return (module, PARTS[leaf]) if dot and leaf in PARTS else None


class Mlx:
    """mlx-lm's adapters <-> `SavedAdapter`."""

    name = "mlx"

    def recognise(self, source: Source) -> bool:
        config = source.config or {}
        by_config = "peft_type" not in config and ("fine_tune_type" in config or "lora_parameters" in config)
        by_keys = bool(source.tensors) and "general.architecture" not in source.metadata and any(
            key.endswith((".lora_a", ".lora_b")) for key in source.tensors)
        return by_config or (by_keys and "peft_type" not in config)

    def read(self, source: Source, *, scale: float | None = None, embeddings: Sequence[str] = EMBEDDINGS) -> SavedAdapter:
        """An adapter from the tensors and the config beside them.

        Parameters
        ----------
        source : Source
        scale : float, optional
            s, for tensors without a config.
        embeddings : sequence of str
            Names of the modules that are embeddings: whole paths or their ends. Default: those that mlx-lm's models use.

        Raises
        ------
        FormatError
            With all that is not understood.
        """
        modules, problems = sorted_keys(source.tensors, _split)
        s, rank, dropout, dora = _settings(source, scale, problems)
        updates, notes = {}, []
        for path, parts in sorted(modules.items()):
            tensors = {part: source.tensors[key] for part, key in parts.items()}
            kind: Any = "embedding" if named(path, embeddings) else "linear"
            wrong = _wrong(kind, tensors, rank, dora)
            problems += [f"{path}: {line}" for line in wrong]
            if not wrong:
                update = update_of(path, kind, tensors["A"].T, tensors["B"].T, s, problems,
                                   magnitude=tensors.get("magnitude"))
                if update is not None:
                    updates[path] = update
        if not modules:
            problems.append("there is no lora_a and no lora_b in it")
        refuse(source.path, "this mlx adapter cannot be read", problems)
        found = [path for path in updates if updates[path].kind == "embedding"]
        if found:
            notes.append(f"{', '.join(found)}: read as embeddings, by name. mlx-lm puts such an update on a tied head too, and "
                         "so does load_adapter; written in another dialect by write_adapter, the head's part is not said")
        return SavedAdapter(updates, config_of(updates, lora_dropout=dropout), self.name, metadata=dict(source.metadata),
                            notes=tuple(notes))

    def write(self, adapter: SavedAdapter, *, num_layers: int | None = None, fold: bool = False, pad: bool = False,
              names: Mapping[str, str] | None = None, tied: bool | None = None, dtype: Any = None) -> Written:
        """The adapter as mlx-lm loads it.

        Parameters
        ----------
        adapter : SavedAdapter
        num_layers : int, optional
            How many layers the model has. Given, mlx-lm builds LoRA layers from the first adapted one on; else in all layers.
        fold : bool
            Multiply scalings that differ into B although that rounds it.
        pad : bool
            Fill lower ranks with zeros, which is exact.
        names : mapping of str to str, optional
            What paths begin with here, and what they begin with in mlx-lm's model: ``{"transformer.": "model."}`` for GPT-2.
        tied : bool, optional
            Whether the model's head is its embedding. Needed for an update of an embedding: mlx-lm puts it on a tied head too,
            PEFT does not. With True there must be an update of the head that is the same; both become one.
        dtype : optional
            Write in this float type.

        Raises
        ------
        FormatError
            Where mlx-lm's dialect cannot say it: each module with the reason and a way out.
        """
        problems = unsaid(adapter, self.name, {"dora", "embedding"})
        updates = adapter.updates
        if adapter.dialect != self.name:  # there it is meant as mlx-lm means it
            updates = _with_head(updates, tied, problems)
        refuse("write_adapter", "mlx cannot say this adapter", problems)
        updates, notes = _renamed(updates, names or {}, problems)
        if dtype is not None:
            updates = {path: with_dtype(update, dtype) for path, update in updates.items()}
        rank = max(update.r for update in updates.values())
        lower = {path: update.r for path, update in updates.items() if update.r != rank}
        if lower and not pad:
            problems += [f"{path}: rank {r}, and {rank} elsewhere: mlx has one rank. pad=True fills up with zeros, which is "
                         "exact; lora.recompress lowers a rank" for path, r in lower.items()]
        scale = most_common(update.s for update in updates.values())
        updates, unfolded, rounded = folded(updates, dict.fromkeys(updates, scale), fold)
        problems += [f"{line}: mlx has one scale. fold=True rounds it" for line in unfolded]
        problems += _odd_ones(updates)
        counted = _num_layers(updates, num_layers, problems, notes)
        refuse("write_adapter", "mlx cannot say this adapter", problems)
        if lower:
            updates = {path: padded(update, rank) for path, update in updates.items()}
            notes.append(f"padded: {len(lower)} modules of lower rank are filled with zeros up to rank {rank}")
        config = {"fine_tune_type": "dora" if any(u.magnitude is not None for u in updates.values()) else "lora",
                  "num_layers": counted,
                  "lora_parameters": {"rank": rank, "scale": scale, "dropout": adapter.config.lora_dropout,
                                      "keys": sorted({_key(path) for path in updates})}}
        metadata = kept(adapter.metadata, dict.fromkeys(updates, scale))
        return Written(_tensors(updates), metadata, config, ("adapters.safetensors", "adapter_config.json"),
                       (*notes, *rounding_note(rounded, updates)))


def _settings(source: Source, scale: Any, problems: list[str]) -> tuple[float | None, int | None, float, bool]:
    """(scale, rank, dropout, DoRA or not) of the config, or of the option if there is no config."""
    if source.config is None:
        if number(scale) is None:
            problems.append("there is no adapter_config.json, and so no scale: give it, as in "
                            f"read_adapter({str(source.path)!r}, scale=20.0); got {scale!r}")
        return number(scale), None, 0.0, any(key.endswith(".m") for key in source.tensors)
    kind, given = source.config.get("fine_tune_type", "lora"), source.config.get("lora_parameters")
    if kind not in ("lora", "dora"):
        problems.append(f"fine_tune_type {kind!r}: expected 'lora' or 'dora'"
                        + (": a whole model was trained, and this is no adapter" if kind == "full" else ""))
    if not isinstance(given, Mapping):
        problems.append(f"lora_parameters: expected an object with rank, scale and dropout, got {given!r}")
        return None, None, 0.0, kind == "dora"
    if scale is not None:
        problems.append(f"scale={scale!r}: the config says it already: leave it out")
    for name in sorted(given.keys() - {"rank", "scale", "dropout", "keys"}):
        why = ": files of old versions with it multiply scale by alpha / rank" if name == "alpha" else ""
        problems.append(f"lora_parameters.{name}: unknown, got {given[name]!r}{why}")
    found, rank, dropout = number(given.get("scale")), given.get("rank"), given.get("dropout", 0.0)
    if found is None:
        problems.append(f"lora_parameters.scale: expected a finite number other than 0, got {given.get('scale')!r}")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        problems.append(f"lora_parameters.rank: expected a whole number of at least 1, got {rank!r}")
        rank = None
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        problems.append(f"lora_parameters.dropout: expected a number in [0, 1), got {dropout!r}")
        dropout = 0.0
    return found, rank, float(dropout), kind == "dora"


def _wrong(kind: str, tensors: Mapping[str, Array], rank: int | None, dora: bool) -> list[str]:
    """A line for everything in which the tensors of a module are no pair of mlx-lm's."""
    lines = [f"lora_{part.lower()} is missing" for part in ("A", "B") if part not in tensors]
    if any(tensor.ndim == 3 for part, tensor in tensors.items() if part != "magnitude"):
        return [*lines, "three axes: this is LoRASwitchLinear, an update of every expert of a mixture (MoE), which minilora "
                "does not have"]
    lines += [f"lora_{part.lower()}: expected two axes, got {tensors[part].shape}" for part in ("A", "B")
              if part in tensors and tensors[part].ndim != 2]
    if "magnitude" in tensors and kind == "embedding":
        lines.append("m: mlx-lm's DoRA of an embedding has a length for each token, PEFT's and minilora's one for each column: "
                     "another function")
    if ("magnitude" in tensors) != dora:
        lines.append("m is missing, and this is DoRA" if dora else "m, and fine_tune_type is not 'dora'")
    if rank is not None and not lines and tensors["A"].shape[1] != rank:
        lines.append(f"rank {rank} in the config, {tensors['A'].shape[1]} in the tensors: lora_a {tensors['A'].shape}")
    return lines


def _key(path: str) -> str:
    """The name by which lora_parameters.keys finds a module: inside its layer, or the whole path."""
    found = IN_LAYER.fullmatch(path)
    return found["rest"] if found else path


def _tensors(updates: Mapping[str, Update]) -> dict[str, Array]:
    tensors = {}
    for path, update in updates.items():
        tensors[f"{path}.lora_a"] = numpy.ascontiguousarray(update.A.T)
        tensors[f"{path}.lora_b"] = numpy.ascontiguousarray(update.B.T)
        if update.magnitude is not None:
            tensors[f"{path}.m"] = update.magnitude
    return tensors


def _renamed(updates: Mapping[str, Update], names: Mapping[str, str], problems: list[str]
             ) -> tuple[dict[str, Update], list[str]]:
    """The updates under mlx-lm's paths, and a note if these are none that its models use."""
    new: dict[str, Update] = {}
    for path, update in updates.items():
        start = max((start for start in names if path.startswith(start)), key=len, default="")
        name = names.get(start, "") + path[len(start):]
        if name in new:
            problems.append(f"{path}: names={dict(names)!r} give this path to two modules: {name}")
        new[name] = update
    problems += [f"names: {start!r} begins no path" for start in names if not any(path.startswith(start) for path in updates)]
    odd = sorted({path.split(".")[0] for path in new} - {"model", "lm_head", "language_model", "backbone"})
    note = (f"paths begin with {', '.join(odd)}; in mlx-lm's models they begin with 'model.' (or are 'lm_head'). If mlx-lm "
            f"does not find them, say what to put there: names={{{odd[0] + '.'!r}: 'model.'}}" if odd else "")
    return new, [note] if note else []


def _num_layers(updates: Mapping[str, Update], count: Any, problems: list[str], notes: list[str]) -> int:
    """The config's num_layers: -1 for all, or from the first adapted layer to the last one of the model."""
    layers = [int(found["index"]) for found in map(IN_LAYER.fullmatch, updates) if found]
    if count is None:
        notes.append("num_layers is -1: mlx-lm builds LoRA layers in all layers; those without tensors change nothing. Give "
                     "num_layers, the number of layers of the model, to build them from the first adapted layer on")
        return -1
    if isinstance(count, bool) or not isinstance(count, int) or count < max(layers, default=0) + 1:
        problems.append(f"num_layers={count!r}: expected the number of layers of the model, at least "
                        f"{max(layers, default=0) + 1}")
        return -1
    return count - min(layers) if layers else 1


def _with_head(updates: Mapping[str, Update], tied: bool | None, problems: list[str]) -> Mapping[str, Update]:
    """The updates without those of a tied head, which mlx-lm has from the embedding.

    With the table W + s A^T B^T in the place of the head, logits change by s (h B) A: the head's A is B^T, and its B is A^T.
    """
    left = dict(updates)
    for path, update in updates.items():
        if update.kind != "embedding" or tied is False:
            continue
        head = next((name for name, other in updates.items() if other.kind == "linear" and other.s == update.s
                     and numpy.array_equal(other.A, update.B.T) and numpy.array_equal(other.B, update.A.T)), None)
        if tied and head is not None:
            del left[head]
        else:
            problems.append(f"{path}: an update of an embedding, and mlx-lm puts it on a tied head too, PEFT does not: "
                            + ("and no update of the head is the same: write PEFT's dialect" if tied else
                               "give tied=False if the model's head is a matrix of its own, tied=True if it is not"))
    return left


def _odd_ones(updates: Mapping[str, Update]) -> list[str]:
    """What mlx-lm has otherwise: one kind of update for all, experts in one stack, no numbers of 64 bits."""
    lines = partly(updates, "magnitude", "mlx")
    lines += [f"{path}: an expert by itself; mlx-lm has all of a layer in one stack (LoRASwitchLinear), which minilora does "
              "not write: merge the adapter into the model, or leave the experts out" for path in updates
              if re.search(r"(^|\.)experts\.\d", path)]
    doubles = [path for path, update in updates.items() if update.A.dtype == "float64"]
    if doubles:
        lines.append(f"{doubles[0]}: float64, which mlx computes with on no GPU: give dtype='float32', which rounds")
    return lines
