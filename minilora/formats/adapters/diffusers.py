"""diffusers' dialect: PEFT's keys behind the name of a part of the pipeline, and older spellings of the same.

    unet.mid_block.attn.to_q.lora_A.weight                    today's keys, beside lora_B.weight
    unet.mid_block.attn.to_q.lora.down.weight                 older: A is down, B is up
    text_encoder.layers.0.q_proj.lora_linear_layer.up.weight
    unet.mid_block.attn.processor.to_q_lora.down.weight       the oldest; out is to_out.0, and q_proj ... in a text encoder

Files of a single model have no such name in front. Where nothing says alpha, it is the rank of each module: s = 1. It is
said by ``__metadata__["lora_adapter_metadata"]``, the JSON of PEFT's config with the part in front of every field
(``unet.r``), or by tensors ``<module>.alpha``, as some programs write them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy

from ...errors import FormatError
from ...lora.config import Config
from .dialect import Source, Written
from .found import CONFIG
from .parts import alpha_in, alpha_of, json_object, refuse, sorted_keys, update_of
from .peft.settings import read_settings
from .saved import SavedAdapter, Update
from .scalings import config_of, folded, kept, partly, rounding_note, unsaid

__all__ = ["Diffusers", "in_pipeline"]

Array = Any
COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
PART = re.compile(rf"(?P<component>{'|'.join(COMPONENTS)})\.(?P<rest>.+)")
NEW = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.(?:weight|bias)|lora_magnitude_vector(?:\.weight)?|alpha)")
OLD = re.compile(r"(?P<module>.+?)(?P<way>\.lora|\.lora_linear_layer|_lora)\.(?P<part>down|up)\.weight")
PARTS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_B.bias": "bias", "lora_magnitude_vector": "magnitude",
         "lora_magnitude_vector.weight": "magnitude", "alpha": "alpha", "down": "A", "up": "B"}
# What an attention processor called its layers, and what they are called where they sit.
OLDEST = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
OLDEST_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
METADATA = "lora_adapter_metadata"


def _split(key: str) -> tuple[str, str] | None:
    key = key.replace(".processor.", ".")
    new, old = NEW.fullmatch(key), OLD.fullmatch(key)
    if new:
        return new["module"], PARTS[new["part"]]
    if not old:
        return None
    module = old["module"]
    if old["way"] == "_lora":
        table = OLDEST_TEXT if module.startswith("text_encoder") else OLDEST
        before, _, name = module.rpartition(".")
        if not before or name not in table:
            return None
        module = f"{before}.{table[name]}"
    return module, PARTS[old["part"]]


def in_pipeline(key: str) -> bool:
    """Whether a key begins with a part of a pipeline. ``transformer.h.0`` is GPT-2's, and no part of one."""
    return PART.fullmatch(key) is not None and not re.match(r"transformer\.h\.\d", key)


class Diffusers:
    """diffusers' adapters <-> `SavedAdapter`."""

    name = "diffusers"

    def recognise(self, source: Source) -> bool:
        if "peft_type" in (source.config or {}):
            return False
        if any(OLD.fullmatch(key) for key in source.tensors):
            return True
        new = [key for key in source.tensors if key.endswith((".lora_A.weight", ".lora_B.weight"))]
        return bool(new) and not any("base_model.model." in key for key in new) and (
            METADATA in source.metadata or all(map(in_pipeline, new)))

    def read(self, source: Source) -> SavedAdapter:
        """An adapter from the tensors and the metadata. Its paths begin with the part of the pipeline where the keys do.

        Raises
        ------
        FormatError
            With all that is not understood.
        """
        modules, problems = sorted_keys(source.tensors, _split)
        configs = _configs(source.metadata, problems)
        missing = [path for path, parts in modules.items() if "alpha" not in parts]
        given = None if METADATA in source.metadata or not missing else alpha_in(source.metadata, problems)
        updates: dict[str, Update] = {}
        for path, parts in sorted(modules.items()):
            tensors = {part: source.tensors[key] for part, key in parts.items()}
            absent = [f"{path}: lora_{part}.weight is missing" for part in ("A", "B") if part not in tensors]
            problems += absent
            if not absent:
                update = _update(path, tensors, configs, given, problems)
                if update is not None:
                    updates[path] = update
        with_part = [bool(PART.fullmatch(path)) for path in modules]
        if any(with_part) and not all(with_part):
            bare = next(path for path, found in zip(modules, with_part) if not found)
            problems.append(f"{bare}: no part of a pipeline in front, and others have one: diffusers leaves one kind out")
        if not modules:
            problems.append("there is no lora_A and no lora_B in it")
        refuse(source.path, "this diffusers adapter cannot be read", problems)
        untold = [] if configs or given else missing
        notes = tuple(f"nothing says alpha ({path} ...): s is 1, as diffusers takes it" for path in untold[:1])
        return SavedAdapter(updates, config_of(updates), self.name, metadata=dict(source.metadata), notes=notes)

    def write(self, adapter: SavedAdapter, *, component: str | None = None, metadata: bool = True,
              fold: bool = False) -> Written:
        """The adapter with today's keys.

        Parameters
        ----------
        adapter : SavedAdapter
        component : str, optional
            The part of the pipeline that paths without one belong to: ``"unet"``, ``"transformer"``. ``""`` writes them as
            they are: a file of a single model, for its `load_lora_adapter`.
        metadata : bool
            Say ranks and alphas in `lora_adapter_metadata`, the default. Without it every s has to be 1, for programs that do
            not read it.
        fold : bool
            Without metadata: multiply s into B although that rounds it.

        Raises
        ------
        FormatError
            Where this dialect cannot say it: each module with the reason and a way out.
        """
        problems = unsaid(adapter, self.name, {"dora", "lora_bias", "convolution"})
        refuse("write_adapter", "diffusers cannot say this adapter", problems)
        by_part = _by_part(adapter.updates, component, problems)
        refuse("write_adapter", "diffusers cannot say this adapter", problems)
        rounded, notes = 0, []
        tensors: dict[str, Array] = {}
        told: dict[str, Any] = {}
        scalings: dict[str, float] = {}
        for part, updates in by_part.items():
            problems += partly(updates, "magnitude", self.name) + partly(updates, "bias", self.name)
            if metadata:
                config = config_of(updates, lora_dropout=adapter.config.lora_dropout)
                told.update({_inside(part, field): value for field, value in config.to_dict().items()})
            else:
                updates, unfolded, count = folded(updates, dict.fromkeys(updates, 1.0), fold)
                problems += [f"{line}: nothing says alpha here. metadata=True says it, fold=True rounds" for line in unfolded]
                rounded += count
                notes = rounding_note(rounded, adapter.updates)
            tensors.update(_tensors(part, updates))
            scalings.update({_inside(part, path): update.s for path, update in updates.items()})
        refuse("write_adapter", "diffusers cannot say this adapter", problems)
        said = {METADATA: json.dumps(told, indent=2, sort_keys=True)} if told else {}
        renamed = {path: _inside(component or "", path) for path in adapter.updates if not PART.fullmatch(path)}
        return Written(tensors, {**kept(adapter.metadata, scalings, renamed), "format": "pt", **said}, None,
                       ("pytorch_lora_weights.safetensors", ""), tuple(notes))


def _configs(metadata: Mapping[str, str], problems: list[str]) -> dict[str, Config]:
    """The config of every part that the metadata has one for; of a single model under ``""``."""
    if METADATA not in metadata:
        return {}
    fields = json_object(metadata[METADATA])
    if fields is None:
        problems.append(f"__metadata__: {METADATA} is no JSON object: {metadata[METADATA][:60]!r}")
        return {}
    parts: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        found = PART.fullmatch(name)
        parts.setdefault(found["component"] if found else "", {})[found["rest"] if found else name] = value
    configs = {}
    for component, given in parts.items():
        try:
            configs[component] = read_settings(Path(METADATA), given)[0]
        except FormatError as error:
            problems.append(f"__metadata__: {str(error).replace(CONFIG, component or 'its fields')}")
            continue
        if configs[component].init_lora_weights in ("pissa", "olora"):
            problems.append(f"__metadata__: {METADATA}: init_lora_weights {configs[component].init_lora_weights!r}: the base "
                            "was changed too. Let PEFT convert it, with path_initial_model_for_weight_conversion")
    return configs


def _update(path: str, tensors: Mapping[str, Array], configs: Mapping[str, Config], given: float | None,
            problems: list[str]) -> Update | None:
    """The update of one module, both of whose factors are there."""
    A, B, m = tensors["A"], tensors["B"], tensors.get("magnitude")
    r = max(A.shape[0], 1) if A.ndim else 1
    s = (given or r) / r
    found = PART.fullmatch(path)
    component, inner = (found["component"], found["rest"]) if found else ("", path)
    if configs and component not in configs:
        problems.append(f"{path}: {METADATA} says nothing of {component or 'a file without parts'}")
    elif configs:
        config = configs[component]
        rank = config.rank_at(inner)
        s = config.scaling_for(rank, config.alpha_at(inner))
        if rank != r:
            problems.append(f"{path}: rank {rank} in {METADATA}, {r} in the tensors: lora_A {A.shape}")
        if config.use_dora != (m is not None):
            problems.append(f"{path}: lora_magnitude_vector " + ("is missing, and use_dora is on" if m is None else
                                                                 "is there, and use_dora is off"))
    if "alpha" in tensors:
        s = (alpha_of(path, tensors["alpha"], problems) or r) / r
    if m is not None:
        wide = (1, *B.shape[:1], *[1] * (A.ndim - 2))
        m = m.reshape(-1) if A.ndim > 2 and m.shape == wide else m
    return update_of(path, "convolution" if A.ndim > 2 else "linear", A, B, s, problems, bias=tensors.get("bias"), magnitude=m)


def _by_part(updates: Mapping[str, Update], component: Any, problems: list[str]) -> dict[str, dict[str, Update]]:
    """The updates of every part, by their paths inside of it."""
    parts: dict[str, dict[str, Update]] = {}
    if component not in (None, "", *COMPONENTS):
        problems.append(f"component={component!r}: expected one of {', '.join(COMPONENTS)}, or ''")
    for path, update in updates.items():
        found = PART.fullmatch(path)
        if not found and path.startswith(("lora_unet_", "lora_te", "lora_transformer_")) and "." not in path:
            problems.append(f"{path}: this is kohya's name, not a path: read the file with modules=")
        elif not found and component is None:
            problems.append(f"{path}: which part of a pipeline is it of? Give component='unet', or component='' for a file of "
                            "one model")
        else:
            part, inner = (found["component"], found["rest"]) if found else (component, path)
            if inner in parts.setdefault(part, {}):
                problems.append(f"{path}: {part}.{inner} is there twice")
            parts[part][inner] = update
    if "" in parts and len(parts) > 1:
        problems.append("component='': the other paths name a part of a pipeline, and a file has that for all or for none")
    return parts


def _inside(component: str, name: str) -> str:
    return f"{component}.{name}" if component else name


def _tensors(component: str, updates: Mapping[str, Update]) -> dict[str, Array]:
    tensors = {}
    for path, update in updates.items():
        start = _inside(component, path)
        tensors[f"{start}.lora_A.weight"] = numpy.ascontiguousarray(update.A)
        tensors[f"{start}.lora_B.weight"] = numpy.ascontiguousarray(update.B)
        if update.bias is not None:
            tensors[f"{start}.lora_B.bias"] = update.bias
        if update.magnitude is not None:
            convolution = update.kind == "convolution"
            tensors[f"{start}.lora_magnitude_vector"] = (
                update.magnitude.reshape(1, -1, *[1] * (update.A.ndim - 2)) if convolution else update.magnitude)
    return tensors
