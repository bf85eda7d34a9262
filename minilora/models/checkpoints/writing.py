"""A model as a folder that transformers reads: config.json and safetensors, replaced as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import DTypeError, StateError
from ...formats.quantised.settings import FIELD
from ...nn.initial import undrawn
from ...nn.module import Module
from ..families import FAMILIES
from ..families.contract import Family, Head
from ..heads.pooled import SentenceClassifier, width_of
from ..heads.sentences import SentenceEncoder
from .held import dtype_of, quantised_fields, tensors_of
from .names import common_name
from .sentences import write_pooling

__all__ = ["save"]

SHARD = 5_000_000_000  # bytes, as transformers had it for years
OURS = ("model.safetensors", "model.safetensors.index.json", "model-?*-of-?*.safetensors")  # the forms of the weights
OLD_FIELDS = ("torch_dtype", "rope_theta", "rope_scaling", "_name_or_path", "num_labels", FIELD)  # are written in other fields


def save(model: Module, folder: Any, max_shard_bytes: int = SHARD) -> None:
    """Write a model as transformers does: config.json and model.safetensors, in several files if it is large.

    Parameters
    ----------
    model : Module
        A model of `minilora.models`, loaded or made, without adapters.
    folder : str or path
        Is made if need be. What else lies in it, a tokenizer, stays. The folder appears, or changes, in one step, when all is
        on the disk.
    max_shard_bytes : int
        Where the numbers are more than that, they come in several files, with an index.

    Raises
    ------
    StateError
        If the model holds adapters, or is not, or not any more, what its config says. Nothing is written then.
    DTypeError
        If it is no model that transformers knows.
    FileError
        If the operating system cannot write it.

    Notes
    -----
    Names, orientation and tied weights are those of transformers, dtypes those of the model. What config.json said when the
    model was loaded, and minilora does not use, is written back. Loading what was saved gives every number back to the bit.

    Examples
    --------
    >>> import minilora
    >>> config = minilora.nn.GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=2)
    >>> minilora.models.save(minilora.nn.GPT2(config, rng=0), "small")
    >>> minilora.models.load("small")([[1, 2, 3]]).shape
    (1, 3, 11)
    """
    from ...formats.tensors.durable import replace_folder
    from ...formats.tensors.writing import save_state

    body: Any = model.body if isinstance(model, (SentenceEncoder, SentenceClassifier)) else model
    family, head = family_of(body)
    fields = config_fields(body, family, head)
    if isinstance(model, SentenceClassifier):
        fields.update(model.labels.write())
        check_classifier(model)
    tensors = file_tensors(body, family, head)
    with replace_folder(Path(folder), OURS) as new:
        save_state(new / "model.safetensors", tensors, {"format": "pt"}, max_shard_bytes)
        (new / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if isinstance(model, (SentenceEncoder, SentenceClassifier)):
            write_pooling(model, new)


def family_of(model: Module) -> tuple[Family, Head]:
    """What a model is, by the kinds of its config and of itself."""
    kind = type(getattr(model, "config", None))
    for family in FAMILIES.values():
        if family.config is kind:
            for head in family.heads.values():
                if head.model is type(model):
                    return family, head
    raise DTypeError(f"save: expected a whole model of minilora.models, got {type(model).__name__}"
                     + (f" with a {kind.__name__}" if kind is not type(None) else "") + ": its parts, and models of your own, "
                     "are saved as a state dict, minilora.formats.save_state(path, model.state_dict())")


def config_fields(model: Any, family: Family, head: Head) -> dict[str, Any]:
    """The fields of config.json."""
    origin = getattr(model, "origin", None)
    kept: Mapping[str, Any] = {} if origin is None else origin.fields
    fields = {name: value for name, value in kept.items() if name not in OLD_FIELDS}
    fields.update(family.write(model.config))
    fields.update(quantised_fields(model, family, head, kept))
    if head.labelled:
        fields.update(model.labels.write())
    fields.update(model_type=family.model_type, architectures=[head.architecture], dtype=dtype_of(model))
    return fields


def file_tensors(model: Any, family: Family, head: Head) -> dict[str, Any]:
    """The parameters under transformers' names and in its orientation; views.

    Raises
    ------
    StateError
        If the parameters are not those that the config makes.
    """
    with undrawn():
        arguments = (model.config, model.labels) if head.labelled else (model.config,)
        fresh = head.model(*arguments)
    for attribute in head.optional.values():
        if getattr(model, attribute) is None:
            setattr(fresh, attribute, None)
    own, expected = dict(model.named_parameters()), {path: p.shape for path, p in fresh.named_parameters()}
    extra = [path for path in own if path not in expected]
    problems = [f"missing  {path} {shape}" for path, shape in expected.items() if path not in own]
    problems += [f"extra    {path} {own[path].shape}" for path in extra]
    problems += [f"shape    {path}: expected {shape}, got {own[path].shape}" for path, shape in expected.items()
                 if path in own and own[path].shape != shape]
    if problems:
        cure = ("" if not extra else "\n  adapters are saved by themselves, minilora.formats.save_adapter(model, folder), or "
                "become part of the weights first: minilora.lora.bake(model); what stands in front of the tokens by "
                "minilora.formats.save_prefix(model, folder), and is taken out by minilora.tuners.remove(model, name)")
        shown = problems[:20] + [f"... and {len(problems) - 20} more"] * (len(problems) > 20)
        raise StateError("\n  ".join([f"save: the parameters are not those of {head.architecture} with this config; nothing "
                                      "was written:", *shown]) + cure)
    bare = family.prefix if head is family.heads.get("base") else ""  # a body alone is written without what stands before it
    return {name: array for path, p in own.items()
            for name, array in tensors_of(common_name(path, family, head).removeprefix(bare), p.data,
                                          path.endswith(family.transposed)).items()}


def check_classifier(model: SentenceClassifier) -> None:
    """Raise `StateError` unless all that a classifier has beside its body is one linear layer, (d, n), with a bias."""
    n, d = model.labels.count, width_of(model.config)
    expected = {"classifier.weight": (n, d), "classifier.bias": (n,)}
    got = {path: p.shape for path, p in model.named_parameters() if not path.startswith(f"{model.body_name}.")}
    if got != expected:
        raise StateError(f"save: beside the encoder expected {expected}, got {got}; nothing was written. If an adapter trains "
                         "the classifier, minilora.formats.save_adapter(model, folder) saves both, and minilora.lora.bake("
                         "model) makes them part of the model")
