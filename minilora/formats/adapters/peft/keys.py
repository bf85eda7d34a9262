"""The names of tensors in PEFT's files: the path of a module, and which part of an adapter the tensor is.

A name is  prefixes . module path . part . adapter name . ending,  for example

    base_model.model.model.layers.0.q_proj.lora_A.default.weight

The prefixes are those of programs that wrap a model (PEFT itself, torch.compile, DistributedDataParallel, FSDP). PEFT takes the
adapter name out when it saves; state dicts that were saved around it have it, once or twice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

__all__ = ["PREFIX", "Name", "infixes", "is_part", "parse", "spell"]

PREFIX = "base_model.model."
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # no model calls an attribute so
DATA_PARALLEL = "module"  # but this one it may: taken off in front of everything only

# The parts of an adapter, and the endings that each may have behind the adapter's name.
ENDINGS = {
    "lora_A": ("weight",),
    "lora_B": ("weight", "bias"),
    "lora_embedding_A": ("", "weight"),
    "lora_embedding_B": ("", "weight"),
    "lora_magnitude_vector": ("", "weight"),
    "magnitude": ("", "weight"),
    "trainable_tokens_delta": ("",),
}
ALIASES = {"magnitude": "lora_magnitude_vector"}


class Name(NamedTuple):
    """What a tensor's name says.

    Attributes
    ----------
    path : str
        Of the module, without prefixes and without what PEFT puts between a module and what it wraps.
    part : str
        One of `ENDINGS`, "lora_bias" for the bias of lora_B, or "" for a parameter of the model itself.
    parameter : str
        Of the model itself: the name of the parameter in its module. "" otherwise.
    infix : tuple of str
        Adapter names in front of the ending.
    marks : frozenset of str
        Which of "base_layer", "modules_to_save", "original_module", "nested" (an update around another one of the same module)
        were in the name.
    """

    path: str
    part: str
    parameter: str = ""
    infix: tuple[str, ...] = ()
    marks: frozenset[str] = frozenset()


def parse(key: str, adapters: Collection[str] = ("default",)) -> Name | None:
    """The name behind a key, or None if a part of an adapter has an ending that PEFT does not write.

    Behind ``modules_to_save`` may stand the name of an adapter, or of a module inside of that which is saved: it is one of
    `adapters`, or a module.
    """
    words = _unwrapped(key.split("."))
    at = next((i for i, word in enumerate(words) if word in ENDINGS and i), None)
    if at is None:
        return _of_the_model(words, adapters)
    part, rest = words[at], words[at + 1:]
    ending = rest.pop() if rest and rest[-1] in ("weight", "bias") else ""
    if ending not in ENDINGS[part]:
        return None
    owner = words[:at]
    marks = {"base_layer"} & set(owner) | ({"nested"} if owner[-1] == "base_layer" else set())
    owner = [word for word in owner if word not in ("base_layer", "token_adapter")]
    if not owner:
        return None
    part = "lora_bias" if ending == "bias" else ALIASES.get(part, part)
    return Name(".".join(owner), part, "", tuple(rest), frozenset(marks))


def _of_the_model(words: list[str], adapters: Collection[str]) -> Name | None:
    inner = {"base_layer", "token_adapter", "modules_to_save", "original_module"}
    marks = inner & set(words[:-1])
    infix: tuple[str, ...] = ()
    if "modules_to_save" in marks:
        at = words.index("modules_to_save") + 1
        while words[at] in adapters and at + 1 < len(words):
            infix, words = (*infix, words[at]), words[:at] + words[at + 1:]
    plain = [word for word in words[:-1] if word not in inner]
    if not plain or not words[-1]:
        return None
    return Name(".".join(plain), "", words[-1], infix, frozenset(marks))


def _unwrapped(words: list[str]) -> list[str]:
    """The parts of a key without what wraps the model or a module of it."""
    words = [word for word in words if word not in WRAPPERS]
    while words and words[0] == DATA_PARALLEL:
        words = words[1:]
    at = 0
    while at + 1 < len(words):
        if words[at] == "base_model" and words[at + 1] == "model":
            words = words[:at] + words[at + 2:]
        else:
            at += 1
    return words


def infixes(names: Iterable[Name]) -> list[str]:
    """The adapter names that occur in front of endings, sorted."""
    return sorted({infix for name in names for infix in name.infix})


def is_part(key: str) -> bool:
    """Whether a key names a part of an adapter, with an ending that PEFT writes."""
    name = parse(key)
    return name is not None and bool(name.part)


def spell(path: str, ending: str, updated: Collection[str]) -> str:
    """The key of a part of `path`, or, without `ending`, of a parameter with that path.

    As PEFT writes it: with ``base_layer`` behind each updated module on the way.

    >>> spell("att.out_proj", "lora_A.weight", {"att", "att.out_proj"})
    'base_model.model.att.base_layer.out_proj.lora_A.weight'
    """
    words = path.split(".")
    spelled = []
    for i, word in enumerate(words):
        spelled.append(word)
        if i + 1 < len(words) and ".".join(words[:i + 1]) in updated:
            spelled.append("base_layer")
    return PREFIX + ".".join([*spelled, ending] if ending else spelled)
