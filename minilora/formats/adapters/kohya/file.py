"""kohya's dialect: lora_down, lora_up and alpha of every module, under names in which every dot is an underscore.

    lora_unet_down_blocks_0_attn_to_q.lora_down.weight    A: (r, in), or (r, C_in, *kernel)
    lora_unet_down_blocks_0_attn_to_q.lora_up.weight      B: (out, r), or (out, r, 1, ...)
    lora_unet_down_blocks_0_attn_to_q.alpha               s = alpha / r; without it alpha is r and s is 1
    lora_unet_down_blocks_0_attn_to_q.dora_scale          DoRA as in LyCORIS

The prefix names the part of a diffusion pipeline. Which underscores were dots, the list of the model's modules tells.

DoRA in LyCORIS has two forms (lycoris/modules/locon.py). With wd_on_output, `dora_scale` is (out, 1, ...): the weight W + s B A
is divided by the length of each of its rows, plus 1.2e-7, and multiplied by dora_scale: PEFT's and minilora's DoRA to rounding.
Without it, (1, in, ...): lengths over the outputs, one for each input, which is another function and is refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import numpy

from ..dialect import Source, Written
from .names import Names, lora_names
from ..parts import alpha_in, alpha_of, refuse, sorted_keys, update_of
from ..saved import SavedAdapter, Update
from ..scalings import alpha_for, as_float32, config_of, folded, kept, rounding_note, unsaid

__all__ = ["Kohya"]

Array = Any
PARTS = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha", "dora_scale": "magnitude"}
KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha|dora_scale)")


def _split(key: str) -> tuple[str, str] | None:
    found = KEY.fullmatch(key)
    return (found["module"], PARTS[found["part"]]) if found else None


class Kohya:
    """kohya's adapters, LyCORIS's LoCon and DoRA among them <-> `SavedAdapter`."""

    name = "kohya"

    def recognise(self, source: Source) -> bool:
        return "peft_type" not in (source.config or {}) and any(
            key.endswith((".lora_down.weight", ".lora_up.weight")) for key in source.tensors)

    def read(self, source: Source, *, modules: Any = None) -> SavedAdapter:
        """An adapter from the tensors.

        Parameters
        ----------
        source : Source
        modules : model, sequence of str, or mapping of str to one of them, optional
            The model that the adapter is for, or the paths of its modules: they tell which underscores are dots, and become the
            paths of the updates. For a file with several parts of a pipeline, one for each:
            ``{"unet": unet, "text_encoder": text_encoder}``. Without it the names stay as they are in the file.

        Raises
        ------
        FormatError
            With all that is not understood.
        """
        layers, problems = sorted_keys(source.tensors, _split)
        names = Names(layers, modules, problems)
        without = [name for name, parts in layers.items() if "alpha" not in parts]
        given = alpha_in(source.metadata, problems) if without else None
        updates: dict[str, Update] = {}
        places: dict[str, str] = {}
        for name, parts in sorted(layers.items()):
            path = names.path(name)
            tensors = {part: source.tensors[key] for part, key in parts.items()}
            missing = [f"{name}: {part} is missing" for part in PARTS if part[:5] == "lora_" and PARTS[part] not in tensors]
            problems += missing
            if missing or path is None:
                continue
            if path in places:
                problems.append(f"{name}: this is {path!r}, and so is {places[path]}")
            places[path] = name
            tensors["A"], tensors["B"] = names.shaped(path, tensors["A"], tensors["B"])
            update = _update(name, tensors, given, problems)
            if update is not None:
                updates[path] = update
        if not layers:
            problems.append("there is no lora_down and no lora_up in it")
        refuse(source.path, "this kohya adapter cannot be read", problems)
        notes = [*names.notes, *_note_without([] if given else without, source.metadata)]
        return SavedAdapter(updates, config_of(updates), self.name, metadata=dict(source.metadata), notes=tuple(notes))

    def write(self, adapter: SavedAdapter, *, prefix: str = "lora_unet", fold: bool = False) -> Written:
        """The adapter with an alpha for every module.

        Parameters
        ----------
        adapter : SavedAdapter
            Paths that begin with ``unet.``, ``transformer.``, ``text_encoder.`` or ``text_encoder_2.`` get the prefix of
            that part; names as kohya has them stay.
        prefix : str
            For paths that begin with no part of a pipeline.
        fold : bool
            Multiply scalings whose alpha lies outside float32's range into B.

        Raises
        ------
        FormatError
            Where kohya's dialect cannot say it: each module with the reason and a way out.
        """
        problems = unsaid(adapter, self.name, {"dora", "convolution"})
        refuse("write_adapter", "kohya cannot say this adapter", problems)
        names = lora_names(adapter.updates, prefix, problems)
        updates, rounded = _sayable(adapter.updates, fold, problems)
        for path, update in updates.items():
            if update.B.shape[1] != update.r:
                problems.append(f"{path}: a grouped convolution: B {update.B.shape} for rank {update.r}. kohya's have one "
                                "group: write PEFT's dialect")
        refuse("write_adapter", "kohya cannot say this adapter", problems)
        tensors: dict[str, Array] = {}
        alphas, unequal = {}, 0
        for path, update in updates.items():
            alphas[path] = numpy.float32(alpha_for(update.s, update.r))
            unequal += float(alphas[path]) / update.r != update.s
            tensors[f"{names[path]}.lora_down.weight"] = numpy.ascontiguousarray(update.A)
            tensors[f"{names[path]}.lora_up.weight"] = numpy.ascontiguousarray(update.B)
            tensors[f"{names[path]}.alpha"] = numpy.array(alphas[path])
            if update.magnitude is not None:
                tensors[f"{names[path]}.dora_scale"] = update.magnitude.reshape(-1, *[1] * (update.A.ndim - 1))
        notes = [f"alpha: that of {unequal} modules is no float32 and was rounded to one, by 6e-08 of itself at most"]
        return Written(tensors, _metadata(adapter, updates, alphas, tensors), None, ("lora.safetensors", ""),
                       (*(notes if unequal else []), *rounding_note(rounded, updates)))


def _update(name: str, tensors: Mapping[str, Array], given: float | None, problems: list[str]) -> Update | None:
    """The update of one module, both of whose factors are there."""
    A, B = tensors["A"], tensors["B"]
    lengths = _lengths(name, tensors.get("magnitude"), A.shape, B.shape, problems)
    if A.ndim > 2 and B.ndim > 1 and A.shape[0] != B.shape[1]:  # which a convolution in groups may have elsewhere
        problems.append(f"{name}: lora_down {A.shape} has rank {A.shape[0]}, lora_up {B.shape} has rank {B.shape[1]}")
        return None
    alpha, r = tensors.get("alpha"), max(A.shape[0], 1) if A.ndim else 1
    told = given if alpha is None else alpha_of(name, alpha, problems)
    return update_of(name, "convolution" if A.ndim > 2 else "linear", A, B, (told or r) / r, problems, magnitude=lengths)


def _lengths(name: str, scale: Array | None, a: tuple[int, ...], b: tuple[int, ...], problems: list[str]) -> Array | None:
    """DoRA's lengths (out,) of LyCORIS's dora_scale, if it is the form that has the same function."""
    if scale is None:
        return None
    out, into, ones = b[:1], a[1:2], (1,) * (len(a) - 1)
    if scale.shape == (*out, *ones):
        return scale.reshape(-1)
    why = f"expected {(*out, *ones)}, a length for each output, got {scale.shape}"
    if scale.shape == (1, *into, *ones[1:]):
        why = (f"{scale.shape} holds a length for each input (LyCORIS without wd_on_output): another function than DoRA's "
               "lengths of the outputs. Train with wd_on_output=True, or merge the adapter in LyCORIS")
    problems.append(f"{name}.dora_scale: {why}")
    return None


def _note_without(names: list[str], metadata: Mapping[str, str]) -> list[str]:
    if not names:
        return []
    trained = metadata.get("ss_network_alpha")
    told = f". The metadata says ss_network_alpha {trained!r}, which programs that load it do not read" if trained else ""
    return [f"{len(names)} modules have no alpha ({names[0]} ...): it is the rank then, so that s = 1{told}"]


def _sayable(updates: Mapping[str, Update], fold: bool, problems: list[str]) -> tuple[dict[str, Update], int]:
    """The updates with an s above 0 whose alpha is a normal float32: the sign, and what lies outside, goes into B."""
    sizes = {path: abs(update.s) for path, update in updates.items()}
    outside = {path for path, s in sizes.items() if as_float32(alpha_for(s, updates[path].r)) is None}
    problems += [f"{path}: alpha {updates[path].s * updates[path].r:g} is outside float32: fold=True multiplies it into B"
                 for path in outside if not fold]
    done, unfolded, rounded = folded(updates, {path: 1.0 if path in outside and fold else s for path, s in sizes.items()}, fold)
    problems += unfolded
    return done, rounded


def _metadata(adapter: SavedAdapter, updates: Mapping[str, Update], alphas: Mapping[str, Any],
              tensors: Mapping[str, Array]) -> dict[str, str]:
    """The metadata that stays true, with rank and alpha of these tensors, and the hash by which webui finds a model."""
    ranks, numbers = {update.r for update in updates.values()}, {float(alpha) for alpha in alphas.values()}
    said = {"ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
            "ss_network_alpha": f"{numbers.pop():.9g}" if len(numbers) == 1 else "Dynamic"}
    scalings = {path: float(alphas[path]) / update.r for path, update in updates.items()}
    return {"ss_network_module": "networks.lora", **kept(adapter.metadata, scalings), **said,
            "sshs_model_hash": model_hash(tensors)}


def model_hash(tensors: Mapping[str, Array]) -> str:
    """kohya's sshs_model_hash: SHA-256 of all that stands behind the header of a safetensors file.

    In the order of that file: wider types first, bfloat16 before float16, then by name.
    """
    order = {"float64": 0, "float32": 1, "bfloat16": 2, "float16": 3}
    digest = hashlib.sha256()
    for name in sorted(tensors, key=lambda name: (order[tensors[name].dtype.name], name)):
        digest.update(numpy.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()
