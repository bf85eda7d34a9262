"""What `train` and `eval` share: texts to learn from, and a model with the head that their rows ask for."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError, FormatError
from .loading import tokenizer_of
from .output import say
from .terms import UsageError

__all__ = ["Wanted", "add_texts", "explained", "labels_beside", "own_labels", "read_texts", "wanted_of"]

CLASSIFIER = "sequence_classification"
POOLED = "sentence_classification"  # on the vector that a sentence encoder has of a text, in place of BERT's pooler


class Wanted(NamedTuple):
    """The head that rows of some form ask for: arguments of `models.load`."""

    head: str | None
    labels: Any = None
    problem_type: str | None = None

    def options(self) -> dict[str, Any]:
        """As keyword arguments."""
        return self._asdict()


def add_texts(parser: argparse.ArgumentParser) -> None:
    """The options of what is read, which `read_texts` looks at; those that few need are told in the verb's last lines.

    Beside them --tokenizer and --dtype are wanted, as in `loading.add_model`.
    """
    parser.add_argument("--data", metavar="PATH", type=Path, required=True,
                        help="a folder with train.jsonl, valid.jsonl, test.jsonl; or one such file")
    for flag, more in {"--max-seq-length": {"type": int},
                       "--train-on": {"choices": ("completion", "assistant", "all"), "default": "completion"},
                       "--labels": {"metavar": "A,B,..", "type": lambda text: text.split(",")},
                       "--problem-type": {"choices": ("single_label_classification", "regression")},
                       "--threads": {"type": int}}.items():
        parser.add_argument(flag, help=argparse.SUPPRESS, **more)  # type: ignore[arg-type]


def read_texts(args: argparse.Namespace, folder: Path, labels: Sequence[str] | None = None,
               fraction: float | None = None) -> Any:
    """The rows of ``--data`` as data, told on stderr.

    Parameters
    ----------
    args : Namespace
    folder : Path
        Of the model, for its tokenizer.
    labels : sequence of str, optional
        The classes that the model has. Not those of ``--labels``, which go before.
    fraction : float, optional
        Of the training rows, to evaluate on.
    """
    from ..train.data import read

    longest = args.max_seq_length or min(2048, positions(folder) or 2048)
    texts = read(args.data, tokenizer_of(args, folder), valid_fraction=fraction, max_length=longest, train_on=args.train_on,
                 labels=args.labels or labels, seed=getattr(args, "seed", 0),
                 few_lengths=getattr(args, "few_lengths", False))
    say(args, texts.report.header)
    for note in texts.report.notes:
        say(args, f"note: {note}")
    return texts


def positions(folder: Path) -> int | None:
    """How many positions a model of this folder has, or was trained to read, where its files say it."""
    if is_encoder(folder) and (most := pooling_of(folder).max_tokens):
        return int(most)
    fields = fields_of(folder)
    named = [fields.get(name) for name in ("max_position_embeddings", "n_positions")]
    found = next((value for value in named if type(value) is int and value > 0), None)
    return found - 2 if found and fields.get("model_type") in ("roberta", "xlm-roberta") else found  # counted from 2 there


def fields_of(folder: Path) -> dict[str, Any]:
    """What config.json says; nothing where there is none, which `models.load` will say better."""
    from ..models.checkpoints.fields import read_fields

    return dict(read_fields(folder)) if (folder / "config.json").is_file() else {}


def own_labels(folder: Path) -> list[str] | None:
    """The classes of a folder that holds a classifier; None if it holds something else, or does not name them."""
    from ..models.heads.labels import Labels

    fields = fields_of(folder)
    if not (classifies(fields) or is_encoder(folder) and pooling_of(folder).dense):
        return None
    try:
        return list(Labels.read(fields).names)
    except ConfigError:  # `models.load` says it, with the file
        return None


def classifies(fields: dict[str, Any]) -> bool:
    """Whether config.json is that of a classifier of transformers."""
    named = fields.get("architectures") or [""]
    return isinstance(named, list) and str(named[0]).endswith("ForSequenceClassification")


def is_encoder(folder: Path) -> bool:
    """Whether a folder holds an encoder of sentences, with or without a classifier on what it knows of a text."""
    return (folder / "modules.json").is_file() and not classifies(fields_of(folder))


def pooling_of(folder: Path) -> Any:
    """What modules.json of a sentence encoder says."""
    from ..models.checkpoints.sentences import read_pooling

    return read_pooling(folder)


def labels_beside(adapter: Path) -> list[str] | None:
    """The classes that a run wrote into run.json, beside its adapter: PEFT's files have no place for them."""
    from ..formats.adapters.beside import classes_beside

    return classes_beside(adapter).names


def wanted_of(args: argparse.Namespace, folder: Path, report: Any) -> Wanted:
    """The head that the rows which were read ask for."""
    form, kind = report.form, args.problem_type
    if form in ("label", "score") and kind is not None and (kind == "regression") != (form == "score"):
        raise UsageError(f"--problem-type {kind} does not go with rows of {form}: rows with a \"label\" are classified, with a "
                         '"score" a regression is trained')
    if form not in ("label", "score"):
        if kind is not None or args.labels:
            raise UsageError(f'--labels and --problem-type are for rows with a "label" or a "score", and these are of {form}')
        return Wanted("causal_lm")
    head = POOLED if is_encoder(folder) else CLASSIFIER
    if form == "score":
        return Wanted(head, 1, "regression")
    return Wanted(head, list(report.labels), kind or "single_label_classification")


@contextmanager
def explained(folder: Path, wanted: Wanted, form: str) -> Iterator[None]:
    """In this block a model is loaded: what cannot be had of it is said in the words of whoever gave data and folder."""
    try:
        yield
    except ConfigError as error:
        if "head must be" not in str(error):
            raise
        raise ConfigError(f"{folder}: rows of {form} ask for the head {wanted.head!r}, which this model cannot have: "
                          f"{error}") from error
    except FormatError as error:
        if form != "label":
            raise
        raise FormatError(f"{error}. Has the data other classes than the model? It asks for {len(wanted.labels)}: "
                          f"{', '.join(wanted.labels[:5])}") from error
