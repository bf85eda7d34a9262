"""A checkpoint from a folder: its config, a model without numbers, and the file's tensors in their places."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from ... import backend
from ...errors import ConfigError, FormatError
from ...formats.quantised.file import as_said
from ...nn.embedding import Embedding
from ...nn.initial import undrawn
from ...nn.linear import Linear
from ...nn.module import Module
from ...quant.sixteen import Sixteen
from ..families import FAMILIES
from ..families.contract import Family, Head
from ..heads.labels import Labels
from ..heads.pooled import SentenceClassifier
from ..heads.sentences import SentenceEncoder
from .fields import config_of, read_fields
from .held import IN_FILES, check_dtype, keeps, linear_weights, on_device, sixteen_weights
from .names import QUANTISED, Matched, match
from .sentences import Pooling, fill_classifier, read_pooling

__all__ = ["Origin", "load"]

ROWS = 1 << 20  # numbers compared at a time
LONGEST = 1 << 20  # positions of models that keep no table of them: their number may be more than that of the weights
SENTENCES = ("sentences", "sentence_classification")  # heads of any body that has tokens to pool


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """Where a loaded model came from: its attribute `origin`.

    Attributes
    ----------
    folder : Path
    fields : mapping
        What config.json said, in the spelling of transformers 5; `save` writes back what it does not know better.
    notes : tuple of str
        What deserves a look: tensors that were left aside, settings that count in training and are not computed here, a head
        that was drawn.
    drawn : tuple of str
        The parameters of that head.
    """

    folder: Path
    fields: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()


def load(folder: Any, dtype: Any = None, device: str | None = None, head: str | None = None, labels: Any = None,
         problem_type: str | None = None, rng: numpy.random.Generator | int | None = None) -> Any:
    """A model from a folder with config.json and safetensors, as transformers writes it.

    Parameters
    ----------
    folder : str or path
        Nothing is downloaded.
    dtype : {"float32", "float64", "float16", "keep"}, optional
        Of the weights. By default float32, and float64 if all weights of the file are. bfloat16 and float16 are converted; with
        "keep", the matrices of linear layers, embeddings and convolutions stay as the file has them, views of it in 16 bits,
        which are computed with in float32 and cannot be trained themselves (`stored`).
    device : str, optional
        The current one by default.
    head : str, optional
        What stands on the body: "base" for nothing, "causal_lm", "masked_lm", "sequence_classification",
        "token_classification", "sentences" for one vector a text (`SentenceEncoder`), "sentence_classification" for classes
        from it (`SentenceClassifier`). By default what the file has; a folder with modules.json is one of the last two. A head
        that the file has nothing of is drawn, and noted.
    labels : int or sequence of str, optional
        The classes of a classifier: how many, or their names. By default those of config.json.
    problem_type : str, optional
        See `Labels`.
    rng : numpy.random.Generator or int, optional
        Draws a new head, and the seeds of dropout.

    Returns
    -------
    Module
        In evaluation mode, as transformers gives it: ``model.train()`` switches dropout on, with the probabilities of the file.
        Its attribute `origin` (`Origin`) has notes about what was left aside.

    Raises
    ------
    FileError
        If the operating system cannot read it.
    FormatError
        If it is no checkpoint, or says something that is not computed here: all of it in one message.
    ConfigError
        If an argument is out of range, or there is no such head.

    Notes
    -----
    **Loading copies nothing**: weights that have the right dtype are read-only views of the mapped file, matrices that the file
    stores as (in, out) transposed ones. An optimizer copies what it trains when it is made; to write into such an array by
    yourself, put a copy in its place first: ``p.data = p.data.copy()``.
    """
    from ...formats.tensors.durable import recover_folder

    check_dtype(dtype)
    folder = recover_folder(folder)
    if head in SENTENCES or (head is None and (folder / "modules.json").is_file()):
        pooling = read_pooling(folder)
        if head == SENTENCES[1] or (head is None and pooling.dense):
            return _sentence_classifier(pooling, dtype, device, labels, problem_type, rng)
        return _sentence_encoder(folder, pooling, dtype, device, labels, problem_type, rng)
    rng = numpy.random.default_rng(rng)
    with backend.use(device or backend.current_device().name):
        made = prepared(folder, head, labels, problem_type, rng)
        model, notes = made.model, made.notes
        found = fill(model, made.file, made.family, made.head, dtype, new_head=head is not None, rng=rng)
    if found.missing:
        notes.append(f"drawn, because the file has no such head: {', '.join(found.missing)}")
    if found.aside:
        notes.append(f"left aside, because {made.head.architecture} has no such part: {', '.join(found.aside)}")
    model.origin = Origin(folder, made.fields, tuple(notes), tuple(found.missing))
    return model.eval()


class Prepared(NamedTuple):
    """A model without numbers, and what it was made from."""

    model: Any
    file: Any
    family: Family
    head: Head
    fields: Mapping[str, Any]
    notes: list[str]


def prepared(folder: Path, head: str | None, labels: Any = None, problem_type: str | None = None,
             rng: numpy.random.Generator | None = None) -> Prepared:
    """The model that config.json of a folder makes, undrawn, beside the tensors of the folder, unread: see `load`."""
    fields = read_fields(folder)
    family, chosen = choose(fields, head, folder)
    config, notes = config_of(family, chosen, fields, folder / "config.json")
    arguments: list[Any] = [config]
    if chosen.labelled:
        arguments.append(_labels(fields, labels, problem_type, folder))
    elif labels is not None or problem_type is not None:
        raise ConfigError(f"load: labels and problem_type are for classifiers, and this is {chosen.architecture}: give head=")
    file = as_said(open_weights(folder), fields, family.transposed)
    check_sizes(config, family, file, folder / "config.json")
    with undrawn():
        model = chosen.model(*arguments, rng=rng)
    for beginning, attribute in chosen.optional.items():
        if not any(beginning.removeprefix(family.prefix) in name for name in file.shapes):
            setattr(model, attribute, None)
    return Prepared(model, file, family, chosen, fields, notes)


def _sentence_encoder(folder: Path, pooling: Pooling, dtype: Any, device: str | None, labels: Any, problem_type: Any,
                      rng: Any) -> Any:
    if pooling.dense:
        raise FormatError(f"{folder / 'modules.json'}: a linear layer stands behind the pooling, so that it is no encoder of "
                          'sentences: load(folder, head="sentence_classification") reads it')
    body = load(pooling.folder, dtype, device, "base", labels, problem_type, rng)
    encoder = SentenceEncoder(body, *pooling[1:4])
    encoder.origin = body.origin
    return encoder.eval()


def _sentence_classifier(pooling: Pooling, dtype: Any, device: str | None, labels: Any, problem_type: Any, rng: Any) -> Any:
    rng = numpy.random.default_rng(rng)
    body = load(pooling.folder, dtype, device, "base", rng=rng)
    notes, drawn = list(body.origin.notes), () if pooling.dense else ("classifier.weight", "classifier.bias")
    if getattr(body, "pooler", None) is not None:
        body.pooler = None  # the mean, or the first token, is taken in its place
        notes.append("left aside, because SentenceClassifier has no such part: pooler")
    chosen = _labels(body.origin.fields, labels, problem_type, pooling.folder)
    with backend.use(device or backend.current_device().name):
        model: Any = SentenceClassifier(body, chosen, pooling.pooling, pooling.max_tokens, rng=rng)
        if pooling.dense:
            fill_classifier(model, pooling.dense)
    if drawn:
        notes.append(f"drawn, because the file has no such head: {', '.join(drawn)}")
    model.origin = body.origin = dataclasses.replace(body.origin, notes=tuple(notes), drawn=drawn)
    return model.eval()


def choose(fields: Mapping[str, Any], head: str | None, folder: Path) -> tuple[Family, Head]:
    """The family and the head that config.json names, or that are asked for."""
    where, kind = folder / "config.json", fields.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise FormatError(f"{where}: model_type is {kind!r}: only {', '.join(sorted(FAMILIES))} are read here")
    heads = family.heads
    if head is not None:
        if head not in heads:
            raise ConfigError(f"load: head must be one of {', '.join(heads)} for {family.model_type}, got {head!r}")
        return family, heads[head]
    named = fields.get("architectures") or []
    known = {name: one for one in heads.values() for name in (one.architecture, *one.aliases)}
    found = [known[name] for name in named if isinstance(name, str) and name in known] if isinstance(named, list) else []
    if len(found) != 1:
        raise FormatError(f"{where}: architectures is {named!r}: expected one of {', '.join(known)}. To read it as another: "
                          f"load(folder, head=...), one of {', '.join(heads)}")
    return family, found[0]


def check_sizes(config: Any, family: Family, file: Any, where: Path) -> None:
    """Raise `FormatError` where a config asks for more than its file can hold: so that nobody tries to build it."""
    numbers = sum(math.prod(shape) for shape in file.shapes.values())
    problems = [f"{field.name} is {value:,}, but the file holds {numbers:,} numbers" for field in dataclasses.fields(config)
                if type(value := getattr(config, field.name)) is int and value > numbers + LONGEST]
    layers = getattr(config, family.layers)
    if layers > len(file.shapes):
        problems.append(f"{family.layers} is {layers:,}, but the file holds {len(file.shapes):,} tensors")
    if problems:
        raise FormatError("\n  ".join([f"{where}: the file does not hold what it says:", *problems]))


def _labels(fields: Mapping[str, Any], labels: Any, problem_type: str | None, folder: Path) -> Labels:
    if labels is not None:
        return Labels(labels, problem_type)
    try:
        read = Labels.read(fields)
    except ConfigError as error:
        raise FormatError(f"{folder / 'config.json'}: {error}") from error
    return read if problem_type is None else Labels(read.names, problem_type)


def open_weights(folder: Path) -> Any:
    """The tensors of a folder, lazily: one file, or the parts that an index names."""
    from ...formats.tensors.reading import open_state

    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (folder / name).is_file():
            return open_state(folder / name)
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        raise FormatError(f"{folder}: the weights are in {pickles[0]}, a pickle, which can run code when it is read, and is "
                          "not read here. Where transformers is installed: transformers.AutoModel.from_pretrained(folder)"
                          ".save_pretrained(folder) writes model.safetensors")
    raise FormatError(f"{folder}: there is no model.safetensors, nor model.safetensors.index.json")


def fill(model: Module, file: Any, family: Family, head: Head, dtype: Any = None, new_head: bool = False,
         rng: numpy.random.Generator | None = None) -> Matched:
    """Put the tensors of a file in the places of a model's parameters: all of them or none. Dtype and heads as in `load`."""
    own = dict(model.named_parameters())
    found = match(own, file.shapes, file.dtypes, family, head, file.path, new_head, linear_weights(model))
    for copy, name in found.copies:
        _check_equal(file, copy, name)
    kinds = {file.dtypes[name] for name in found.taken.values()} - QUANTISED
    kept = sixteen_weights(model) if keeps(dtype) else set()
    dtype = numpy.dtype("float64" if kinds == {"F64"} else "float32") if dtype is None or keeps(dtype) else numpy.dtype(dtype)
    ready = {}
    for path, name in found.taken.items():
        array = file[name]
        array = array.T if path.endswith(family.transposed) else array
        held = Sixteen(array, dtype) if path in kept and file.dtypes[name] in IN_FILES else array.astype(dtype, copy=False)
        ready[path] = on_device(held)
    for path, array in ready.items():
        own[path].data = array
    _draw(model, set(found.missing), dtype, rng)
    return found


def _check_equal(file: Any, copy: str, name: str) -> None:
    a, b = file[copy], file[name]
    same = a.shape == b.shape and a.dtype == b.dtype
    a, b = a.reshape(-1), b.reshape(-1)
    if not same or not all(numpy.array_equal(a[i:i + ROWS], b[i:i + ROWS]) for i in range(0, a.size, ROWS)):
        raise FormatError(f"{file.path}: {copy} and {name} are different, but config.json says that they are one (tied): if "
                          "the model was trained with two, set tie_word_embeddings to false in config.json")


def _draw(model: Module, paths: set[str], dtype: Any, rng: numpy.random.Generator | None) -> None:
    """First numbers for the parameters of a new head."""
    std = getattr(getattr(model, "config"), "initializer_range", 0.02)
    for place, module in model.named_modules():
        for name, p in module.own_parameters():
            if (f"{place}.{name}" if place else name) not in paths:
                continue
            drawn = numpy.zeros(p.shape)
            if name == "weight":
                matrix = isinstance(module, (Linear, Embedding))
                drawn = numpy.random.default_rng(rng).normal(0.0, std, p.shape) if matrix else drawn + 1.0
            p.data = backend.asarray(drawn.astype(dtype))
