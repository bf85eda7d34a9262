"""read: a folder or a file of JSON lines, as data to train, to evaluate and to test on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from ...errors import ConfigError, FileError, FormatError
from ...settings import number, whole
from .encoding import Encoded, Encoder, Tokenizer
from .jsonl import objects_in
from .labelling import answers_of, known_labels, names_of
from .problems import Problems
from .report import Part, Report, notes_on
from .rows import Row, checked, form_of
from .tokens import Tokens

__all__ = ["Texts", "read"]

PARTS = ("train", "valid", "test")
TRAIN_ON = ("completion", "assistant", "all")


@dataclasses.dataclass(frozen=True)
class Texts:
    """What `read` gives: data, and what is to be said about it.

    Attributes
    ----------
    train : Tokens
    valid, test : Tokens, optional
    report : Report
    """

    train: Tokens
    valid: Tokens | None
    test: Tokens | None
    report: Report


def read(path: Any, tokenizer: Tokenizer, *, valid_fraction: float | None = None, max_length: int = 2048,
         train_on: str = "completion", labels: Sequence[str] | None = None, ignore: Sequence[str] = (), seed: int = 0,
         few_lengths: bool = False) -> Texts:
    """Read texts to train on.

    Parameters
    ----------
    path : path
        A folder with train.jsonl and, optionally, valid.jsonl and test.jsonl; or one such file. Each line is a JSON object, and
        all have the same keys: "text"; "prompt" and "completion"; "messages"; "text" and "label"; or "text" and "score".
    tokenizer : minilora.models.Tokenizer
    valid_fraction : float, optional
        Put this share of the training rows, drawn, aside to evaluate on.
    max_length : int
        Tokens of a row. What is longer is cut at its end; how much is in the report.
    train_on : {"completion", "assistant", "all"}
        What is learned of rows with a prompt: the completion, of chats the last answer; of chats all answers; or everything.
    labels : sequence of str, optional
        The classes of a model, in order. By default those of the training rows, sorted; whole numbers are the classes' numbers.
    ignore : sequence of str
        Keys that rows may have besides.
    seed : int
        Of the rows that valid_fraction puts aside.
    few_lengths : bool
        Pad training batches to few lengths, for which a recorded run has a graph each: see `Tokens`.

    Returns
    -------
    Texts

    Raises
    ------
    FileError
        If there is no such file.
    FormatError
        With the first ten faults, each with file and line, and how many there are.
    ConfigError
        If a setting is out of range.

    Examples
    --------
    >>> data = read("reviews/", tokenizer, valid_fraction=0.05)                           # doctest: +SKIP
    >>> minilora.train.fit(model, data.train, valid=data.valid)                           # doctest: +SKIP
    """
    if train_on not in TRAIN_ON:
        raise ConfigError(f"train_on must be one of {', '.join(TRAIN_ON)}, got {train_on!r}")
    files, problems = files_of(Path(path), valid_fraction), Problems()
    rows = {part: [Row(file, *found) for found in objects_in(file, problems)] for part, file in files.items()}
    form = form_of([row for part in rows.values() for row in part], [ignore] if isinstance(ignore, str) else ignore, problems)
    rows = {part: checked(form, some, train_on, problems) for part, some in rows.items()}
    names = names_of(rows["train"], labels, problems) if form == "label" else None
    problems.complain()
    if valid_fraction is not None:
        rows["train"], rows["valid"] = set_aside(rows["train"], form, valid_fraction, whole("seed", seed, 0))
    known = None if names is None else known_labels(rows["train"], names, labels is not None)
    answers = {part: answers_of(form, some, known, problems) for part, some in rows.items()}
    encoder = Encoder(tokenizer, form, train_on, whole("max_length", max_length))
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else next(iter(tokenizer.eos_ids), 0)
    made = {part: as_tokens(some, list(encoder.encode(some)), answers[part], pad, max_length, problems,
                            few_lengths and part == "train")
            for part, some in rows.items()}
    problems.complain()
    empty = [part for part, (data, _) in made.items() if data is None]
    if empty:
        raise FormatError(f"{path}: max_length={max_length} leaves nothing to learn of any row in {', '.join(empty)}: the "
                          "prompts alone are longer. Give a larger max_length")
    data = {part: tokens for part, (tokens, _) in made.items() if tokens is not None}
    report = Report(str(path), form, train_on, max_length, names, {part: about for part, (_, about) in made.items()}, [])
    report.notes.extend(notes_on(report, data, answers, tokenizer))
    return Texts(data["train"], data.get("valid"), data.get("test"), report)


def files_of(path: Path, valid_fraction: float | None) -> dict[str, Path]:
    """The file of each part."""
    if valid_fraction is not None:
        number("valid_fraction", valid_fraction, 0.0, 1.0, ends="()")
    if path.is_file():
        return {"train": path}
    if not path.is_dir():
        raise FileError(f"{path}: there is no such file or folder: expected a folder with train.jsonl, or a file of JSON lines")
    found = {part: path / f"{part}.jsonl" for part in PARTS if (path / f"{part}.jsonl").is_file()}
    if "train" not in found:
        others = sorted(file.name for file in path.iterdir() if file.is_file())
        raise FileError(f"{path}: there is no train.jsonl" + (f", but {', '.join(others[:5])}: give the path of the file "
                        "itself, if it has JSON lines" if others else ": the folder has no files"))
    if "valid" in found and valid_fraction is not None:
        raise ConfigError(f"valid_fraction={valid_fraction} puts training rows aside, and there is {found['valid']}: leave out "
                          "one of the two")
    return found


def set_aside(rows: list[Row], form: str, share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training rows without a share of them, and that share: drawn, of each class all but one at the most."""
    drawn = numpy.random.default_rng(seed).permutation(len(rows)).tolist()
    last = {rows[i].fields["label"] if form == "label" else None: i for i in drawn}
    free = [i for i in drawn if i not in set(last.values())]
    if not free:
        raise ConfigError(f"valid_fraction={share:g}: of {len(rows)} rows none can be put aside, since each class must stay in "
                          "the training: give a valid.jsonl, or no fraction")
    aside = set(free[:max(1, round(share * len(rows)))])
    return [row for i, row in enumerate(rows) if i not in aside], [rows[i] for i in sorted(aside)]


def as_tokens(rows: list[Row], encoded: list[Encoded], answers: Any, pad: int, max_length: int,
              problems: Problems, few_lengths: bool = False) -> tuple[Tokens | None, Part]:
    """Rows as data, without those of which nothing would be learned, and what became of them."""
    for row, one in zip(rows, encoded):
        if one.fault:
            problems.add(row.path, row.line, one.fault)
    kept = [i for i, one in enumerate(encoded) if answers is not None or any(high > max(low, 1) for low, high in one.learned)]
    data = Tokens([encoded[i].ids for i in kept], None if answers is not None else [encoded[i].learned for i in kept],
                  answers=None if answers is None else answers[kept], pad_id=pad, max_length=max_length,
                  few_lengths=few_lengths) \
        if kept and not problems.count else None
    targets, tokens = (0, 0) if data is None else (data.total_targets, int(data.lengths.sum()))
    return data, Part(len(kept), tokens, targets, max((len(encoded[i].ids) for i in kept), default=0),
                      sum(encoded[i].lost > 0 for i in kept), sum(encoded[i].lost for i in kept), len(rows) - len(kept),
                      sum(one.shared for one in encoded))
