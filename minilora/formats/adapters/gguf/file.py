"""llama.cpp's dialect: one GGUF file with lora_a and lora_b of every tensor, and one alpha for all.

    general.type "adapter", general.architecture, adapter.type "lora", adapter.lora.alpha (float32)
    blk.0.attn_q.weight.lora_a   A (r, in)
    blk.0.attn_q.weight.lora_b   B (out, r), for Llama's queries and keys with the rows in llama.cpp's order (`names`)
    token_embd.weight.lora_a     A of the embedding, transposed: (V, r)

llama.cpp takes s = alpha / r with the r of each tensor, whatever the rule was that s came from. So alpha is s r here, and
where it differs from module to module, the difference is multiplied into B. GPT-2's layers are stored (in, out) in its
checkpoints and (out, in) in GGUF; PEFT's A and B are the same for either, and stay as they are. (llama.cpp's own converter
swaps them.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy

from ....errors import FormatError
from ..dialect import Source, Written
from ..parts import number, refuse, sorted_keys, update_of
from ..saved import SavedAdapter, Update
from ..scalings import alpha_for, as_float32, config_of, folded, most_common, rounding_note, unsaid, with_dtype
from .names import ARCHITECTURES, MODEL_TYPES, Architecture, permuted, restored

__all__ = ["Gguf"]

Array = Any
ENDS = {".weight.lora_a": "A", ".weight.lora_b": "B"}
FIELDS = ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")


def _split(key: str) -> tuple[str, str] | None:
    return next(((key[:-len(end)], part) for end, part in ENDS.items() if key.endswith(end) and len(key) > len(end)), None)


class Gguf:
    """Adapters of llama.cpp <-> `SavedAdapter`."""

    name = "gguf"

    def recognise(self, source: Source) -> bool:
        """By the fields of a GGUF file: there are none of these names elsewhere."""
        return "general.architecture" in source.metadata and source.config is None

    def read(self, source: Source, *, base: Mapping[str, Any] | None = None, heads: int | None = None,
             kv_heads: int | None = None) -> SavedAdapter:
        """An adapter under the paths of transformers' models.

        Parameters
        ----------
        source : Source
        base : mapping, optional
            The config.json of the base: for Llama the number of its heads is needed, to put rows back in their order.
        heads, kv_heads : int, optional
            The same, said by itself: of queries, and of keys and values.

        Raises
        ------
        FormatError
            With all that is not understood.
        """
        said = source.metadata
        problems = [f"{name}: expected {want!r}, got {said.get(name)!r}" for name, want in
                    (("general.type", "adapter"), ("adapter.type", "lora")) if said.get(name) != want]
        if "adapter.alora.invocation_tokens" in said:
            problems.append("adapter.alora.invocation_tokens: an aLoRA, active from these tokens on only: minilora has none")
        architecture = ARCHITECTURES.get(said.get("general.architecture", ""))
        if architecture is None:
            problems.append(f"general.architecture: expected one of {', '.join(ARCHITECTURES)}, got "
                            f"{said.get('general.architecture')!r}: what its names and rows mean is not known here")
        alpha = _number(said.get("adapter.lora.alpha"))
        if alpha is None or alpha < 0:
            problems.append(f"adapter.lora.alpha: expected a number above 0, got {said.get('adapter.lora.alpha')!r}")
        modules, wrong = sorted_keys(source.tensors, _split)
        problems += wrong
        updates: dict[str, Update] = {}
        for name, parts in sorted(modules.items()):
            missing = [f"{name}: {end[1:]} is missing" for end, part in ENDS.items() if part not in parts]
            path = architecture.from_gguf(name) if architecture else None
            problems += missing
            if architecture and path is None:
                problems.append(f"{name}: no tensor of this architecture that an adapter can change")
            elif architecture and path is not None and not missing:
                A, B = (source.tensors[parts[part]] for part in ("A", "B"))
                count = _heads(name, B, base, heads, kv_heads, problems) if architecture.is_permuted(name) else None
                embedding = name == "token_embd"
                A, r = (A.T, A.shape[-1]) if embedding and A.ndim == 2 else (A, A.shape[0] if A.ndim else 1)
                update = update_of(path, "embedding" if embedding else "linear", A, restored(B, count) if count else B,
                                   (alpha or r) / max(r, 1), problems)
                if update is not None:
                    updates[path] = update
        if not modules:
            problems.append("there is no lora_a and no lora_b in it")
        refuse(source.path, "this GGUF adapter cannot be read", problems)
        return SavedAdapter(updates, config_of(updates), self.name, metadata=dict(said))

    def write(self, adapter: SavedAdapter, *, base: Mapping[str, Any] | None = None, architecture: str | None = None,
              heads: int | None = None, kv_heads: int | None = None, fold: bool = False, dtype: Any = None) -> Written:
        """The adapter for llama.cpp. Needs the gguf package.

        Parameters
        ----------
        adapter : SavedAdapter
        base : mapping, optional
            The config.json of the base: architecture, heads, and whether the head is tied follow from it.
        architecture : str, optional
            The same, said by itself: ``"gpt2"``, ``"llama"`` (also for Mistral), ``"qwen2"`` or ``"qwen3"``.
        heads, kv_heads : int, optional
            Of Llama: the heads of queries, and of keys and values (as many, if it is not said).
        fold : bool
            Multiply scalings that one alpha does not give into B although that rounds it.
        dtype : optional
            Write in this float type: float32, float16 or bfloat16.

        Raises
        ------
        FormatError
            Where llama.cpp cannot say it: each module with the reason and a way out; or if the package is missing.
        """
        _package()
        problems = unsaid(adapter, self.name, {"embedding"})
        chosen = architecture or MODEL_TYPES.get(str((base or {}).get("model_type")), "")
        if chosen not in ARCHITECTURES:
            told = f"model_type {base.get('model_type')!r}" if base and not architecture else f"architecture={architecture!r}"
            problems.append(f"{told}: give base, the base's config.json as a dict, or architecture, one of "
                            f"{', '.join(ARCHITECTURES)}")
        refuse("write_adapter", "gguf cannot say this adapter", problems)
        known = ARCHITECTURES[chosen]
        updates = adapter.updates
        if dtype is not None:
            updates = {path: with_dtype(update, dtype) for path, update in updates.items()}
        alphas = {path: alpha_for(update.s, update.r) for path, update in updates.items()}
        alpha = abs(most_common(alphas.values()))
        wanted = {path: u.s if alphas[path] == alpha else alpha / u.r for path, u in updates.items()}
        updates, unfolded, rounded = folded(updates, wanted, fold)
        problems += [f"{line}: alpha is {alpha:g} for all. fold=True rounds it" for line in unfolded]
        tensors = _tensors(updates, known, base or {}, heads, kv_heads, problems)
        stored = as_float32(alpha)
        if stored is None:
            problems.append(f"alpha {alpha:g} is outside float32")
        refuse("write_adapter", "gguf cannot say this adapter", problems)
        notes = [f"alpha {alpha!r} is no float32 and was rounded to one, by 6e-08 of itself at most"] if stored != alpha else []
        notes += rounding_note(rounded, updates)
        if "output.weight.lora_a" in tensors and (base or {}).get("tie_word_embeddings") is None:
            notes.append("lm_head: llama.cpp finds no such tensor if the model's head is its embedding")
        fields = dict(zip(FIELDS, (chosen, "adapter", "lora", repr(stored))))
        return Written(tensors, fields, None, ("adapter.gguf", ""), tuple(notes),
                       lambda path: _pack(path, tensors, chosen, float(fields["adapter.lora.alpha"])))


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise FormatError("writing GGUF needs the package gguf: pip install 'minilora[gguf]'") from error
    return gguf


def _number(text: str | None) -> float | None:
    try:
        return number(float(text or "nan"))
    except ValueError:
        return None


def _heads(name: str, B: Array, base: Mapping[str, Any] | None, heads: int | None, kv_heads: int | None,
           problems: list[str]) -> int | None:
    """How many heads the rows of B are of: queries, or keys; None, and a line added, if that is not said or does not fit."""
    said = base or {}
    of_queries = heads if heads is not None else said.get("num_attention_heads")
    of_keys = kv_heads if kv_heads is not None else said.get("num_key_value_heads")
    count = of_queries if name.endswith("attn_q") or of_keys is None else of_keys
    if count is None:
        problems.append(f"{name}: llama.cpp has these rows in another order, head by head: give base, the base's config.json "
                        "as a dict, or heads=32, kv_heads=8")
    elif isinstance(count, bool) or not isinstance(count, int) or count < 1 or B.ndim != 2 or len(B) % (2 * count):
        problems.append(f"{name}: {count!r} heads, and {B.shape} for B: its rows are to be {count} heads of an even size")
    else:
        return count
    return None


def _tensors(updates: Mapping[str, Update], known: Architecture, base: Mapping[str, Any], heads: int | None,
             kv_heads: int | None, problems: list[str]) -> dict[str, Array]:
    """GGUF's tensors, by GGUF's names."""
    tensors: dict[str, Array] = {}
    for path, update in sorted(updates.items()):
        name, A, B = known.to_gguf(path), update.A, update.B
        if name is None or (name == "token_embd") != (update.kind == "embedding"):
            names = [*known.outer, *(f"{known.layers}.0.{inner}" for inner in known.inner)]
            problems.append(f"{path}: llama.cpp has no {update.kind} layer of this path in this architecture that takes an "
                            f"update. It has {', '.join(names)}")
            continue
        if name == "output" and base.get("tie_word_embeddings"):
            problems.append(f"{path}: the base's head is its embedding, and llama.cpp has no tensor of its own for it: leave "
                            "this update out, or untie the head")
        if update.A.dtype == "float64":
            problems.append(f"{path}: float64: give dtype='float32', which rounds")
        if known.is_permuted(name):
            count = _heads(name, B, base, heads, kv_heads, problems)
            B = permuted(B, count) if count else B
        if f"{name}.weight.lora_a" in tensors:
            problems.append(f"{path}: another module has GGUF's name {name} too")
        tensors[f"{name}.weight.lora_a"] = numpy.ascontiguousarray(A.T if name == "token_embd" else A)
        tensors[f"{name}.weight.lora_b"] = numpy.ascontiguousarray(B)
    return tensors


def _pack(path: Path, tensors: Mapping[str, Array], architecture: str, alpha: float) -> None:
    """Write the file, whole or not at all."""
    from ...tensors.durable import replace_file

    gguf = _package()
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, array in tensors.items():
        if array.dtype.name == "bfloat16":  # NumPy's own types are known to the writer; these it takes as bytes
            writer.add_tensor(name, array.view(numpy.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, array)
    with replace_file(path) as file:
        writer.fout, writer.state = [file], gguf.gguf_writer.WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
